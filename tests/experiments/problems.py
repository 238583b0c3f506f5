"""A small experiment."""

from __future__ import annotations

from train.problems import Noisy, noisy_config

from auxfast.experiments import Experiment


def noisy_experiment(**changes) -> Experiment:
    """The experiment of the task `Noisy`; `changes` are those of `noisy_config`."""
    return Experiment(
        name="noisy regression",
        title="Noisy",
        about="",
        score_name="score",
        loss_names=Noisy.loss_names,
        config=noisy_config(**changes),
        make_task=lambda seed, options, *, hold_out: Noisy(seed, options, hold_out),
        methods=("stl", "linear"),
        settings={"": {}, "more features": {"task.features": 6}},
        findings=lambda runs: [],
    )
