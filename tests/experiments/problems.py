"""A small experiment."""

from __future__ import annotations

from train.problems import Noisy, NoisyOptions, train_config

from auxfast.experiments import Experiment
from auxfast.solvers import Neumann
from auxfast.train import CombinerConfig, RunConfig


def noisy_experiment(**changes) -> Experiment:
    settings = {
        "outer_steps": 7,
        "inner_steps": 3,
        "checkpoint_every": 2,
        "solver": Neumann(steps=3, step_size=0.05),
        **changes,
    }
    return Experiment(
        name="noisy regression",
        title="Noisy",
        about="",
        score_name="score",
        loss_names=Noisy.loss_names,
        config=RunConfig(train_config(**settings), CombinerConfig(hidden=(4,)), task=NoisyOptions()),
        make_task=lambda seed, options, *, hold_out: Noisy(seed, options, hold_out),
        methods=("stl", "linear"),
        settings={"": {}, "more features": {"task.features": 6}},
    )
