"""Experiments, by name."""

from __future__ import annotations

from collections.abc import Iterable

from auxfast.experiments.base import Experiment
from auxfast.experiments.paper import (
    deep_supervision,
    diabetes,
    digits,
    fixed_auxiliary,
    illustrative,
    missing_labels,
    noisy_auxiliaries,
    polynomial_kernel,
    sensitivity,
    stereo,
    weight_decay,
)
from auxfast.train.run import Run, not_of_this_version

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        illustrative.EXPERIMENT,
        noisy_auxiliaries.EXPERIMENT,
        polynomial_kernel.EXPERIMENT,
        fixed_auxiliary.EXPERIMENT,
        diabetes.EXPERIMENT,
        digits.EXPERIMENT,
        missing_labels.EXPERIMENT,
        sensitivity.SIZE,
        sensitivity.DEPTH,
        deep_supervision.EXPERIMENT,
        stereo.EXPERIMENT,
        weight_decay.EXPERIMENT,
    )
}


def get_experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none; says which there are.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment: got {name!r}, must be one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def by_experiment(runs: Iterable[Run]) -> list[tuple[Experiment, list[Run]]]:
    """Each experiment with its runs, in the order in which their names are met.

    Raises:
        RunError: a run is of an experiment that there is not (any more).
    """
    found: dict[str, tuple[Experiment, list[Run]]] = {}
    for run in runs:
        try:
            _, own = found.setdefault(run.experiment, (get_experiment(run.experiment), []))
        except ValueError as error:
            raise not_of_this_version(run.path, error) from error
        own.append(run)
    return list(found.values())
