"""The outer loop of every task of the suite: the defaults of the trainer.

A task has its own inner training, which its user brings: sizes, optimizer and its learning rate, batches, numbers of
steps. Everything of the outer loop is what `TrainConfig()` and `CombinerConfig()` have by default.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from auxfast.experiments.base import Experiment
from auxfast.train.config import CombinerConfig, Component, RunConfig, TrainConfig

METHODS = (
    *("stl", "equal", "linear-frozen", "linear"),
    *("deep-linear-frozen", "deep-linear", "nonlinear-frozen", "nonlinear"),
)


def untuned_config(
    *,
    outer_steps: int,
    inner_steps: int,
    inner_optimizer: Component,
    weight_decay: float = 0.0,
    weight: float = 1.0,
    task: Any = None,
) -> RunConfig:
    """The configuration of a task with this inner training.

    weight: weight of each auxiliary loss in Equal, and at the start of every combiner.
    """
    train = TrainConfig(
        outer_steps=outer_steps,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        weight_decay=weight_decay,
    )
    combiner = CombinerConfig(initial_weight=weight)
    return RunConfig(train, combiner, {"equal": {"auxiliary_weight": weight}}, task)


def untuned(experiment: Experiment, *, weight: float = 1.0, **changes: Any) -> Experiment:
    """A shipped experiment's task and inner training, with the suite's outer loop and methods in place of its own.

    changes: entries of the inner training that differ, such as `outer_steps`; see `untuned_config`.
    """
    train = experiment.config.train
    inner = {name: getattr(train, name) for name in ("outer_steps", "inner_steps", "inner_optimizer", "weight_decay")}
    config = untuned_config(**{"task": experiment.config.task, "weight": weight, **inner, **changes})
    return replace(experiment, config=config, methods=METHODS, settings={"": {}}, draw=None, findings=None)
