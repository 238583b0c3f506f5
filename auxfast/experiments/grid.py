"""`auxfast train --grid`: hyperparameters, chosen for each method by validation scores (paper, appendix B)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from auxfast.experiments.base import Experiment, plan_run
from auxfast.experiments.command import Comparison, train_all
from auxfast.train.averaging import of_first
from auxfast.train.config import RunConfig
from auxfast.train.files import RunError
from auxfast.train.methods import Method
from auxfast.train.recording import DivergedError, RunPlan, check_plans
from auxfast.train.serialization import flattened, override


class Candidate(NamedTuple):
    """A combination of values from the grid, and its runs from the search's seeds."""

    changes: dict[str, Any]
    plans: tuple[RunPlan, ...]


def search(comparison: Comparison, seeds: Sequence[int]) -> Comparison:
    """Trains every combination of the experiment's grid from `seeds`. Returns the comparison with that one, for each
    method in each setting, whose mean validation score is highest, and prints it. Test scores play no part.

    A control is trained as its learned method is, and so has that one's choice. Entries that were asked for by an
    override are not searched. The runs are in the folder beside `out` whose name ends in "-grid", apart from those
    that a report is of; with `resume` the search goes on where it was interrupted.

    Raises:
        ValueError: the experiment has no grid, or a seed is one of the comparison too.
        RunError: see `record_run`; or training diverged with all combinations of a method.
    """
    candidates = plan_search(comparison, seeds)
    searched = [plan for own in candidates.values() for candidate in own for plan in candidate.plans]
    for plans in (comparison.plans, searched):
        of_first(comparison.process_group, partial(check_plans, plans, resume=comparison.resume))
    print(f"grid: {len(searched)} runs from seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}", flush=True)
    chosen, trained, total = {}, 0, sum(len(own) for own in candidates.values() if len(own) > 1)
    for (setting, method), own in candidates.items():
        title = ", ".join(filter(None, (setting, method.name)))
        scores = [0.0]
        if len(own) > 1:
            scores = []
            for candidate in own:
                scores.append(_validation_score(comparison, candidate))
                trained += 1
                words = f"{_words(candidate.changes)}: validation score {scores[-1]:.4g}"
                print(f"grid: [{trained}/{total}] {title}, {words}", flush=True)
        if not any(math.isfinite(score) for score in scores):
            raise RunError(f"grid: training diverged with all of the {len(own)} combinations for {title}")
        best = max(range(len(own)), key=lambda index: scores[index])
        chosen[setting, method] = own[best].changes
        told = f" (validation score {scores[best]:.4g}, best of {len(own)})" if len(own) > 1 else ""
        print(f"grid: {title}: {_words(own[best].changes) or 'nothing to choose'}{told}", flush=True)
    plans = [
        _planned(comparison.experiment, plan, changed(plan.config, chosen[plan.setting, _learned(plan.method)]))
        for plan in comparison.plans
    ]
    return replace(comparison, plans=tuple(plans))


def plan_search(comparison: Comparison, seeds: Sequence[int]) -> dict[tuple[str, Method], list[Candidate]]:
    """The combinations to train for each setting and learned method of a comparison. A single one needs no training,
    and has no plans.

    Raises:
        ValueError: see `search`.
    """
    experiment = comparison.experiment
    if not experiment.grid:
        raise ValueError(f"--grid: {experiment.name} has no grid")
    if common := sorted({plan.seed for plan in comparison.plans} & set(seeds)):
        raise ValueError(f"--grid: got seed {common[0]}, which is one of --seeds: its results would look too good")
    candidates: dict[tuple[str, Method], list[Candidate]] = {}
    for plan in comparison.plans:
        method = _learned(plan.method)
        if (plan.setting, method) in candidates:
            continue
        combinations = list(_combinations(comparison, method))
        own = candidates[plan.setting, method] = []
        for changes in combinations:
            config = changed(plan.config, changes)
            of_method = replace(plan, method=method, out=_folder(plan.out, changes))
            runs = [_planned(experiment, replace(of_method, seed=seed), config) for seed in sorted(set(seeds))]
            own.append(Candidate(changes, tuple(runs if len(combinations) > 1 else [])))
    return candidates


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with these changes. Where `train.inner_steps` is among them, the outer steps and the patience
    change too, so that all combinations train equally long.

    Raises:
        ValueError: see `override`.
    """
    made = override(config, changes)
    factor = config.train.inner_steps / made.train.inner_steps
    if factor == 1 or "train.outer_steps" in changes:
        return made
    steps: dict[str, Any] = {"train.outer_steps": max(1, round(config.train.outer_steps * factor))}
    if config.train.patience is not None:
        steps["train.patience"] = max(1, round(config.train.patience * factor))
    return override(made, steps)


def _learned(method: Method) -> Method:
    return replace(method, phi="learned")


def _combinations(comparison: Comparison, method: Method) -> Iterator[dict[str, Any]]:
    """Values by key, for each combination of the axes that matter to a method."""
    given = flattened(comparison.overrides)
    axes = [
        axis
        for axis in comparison.experiment.grid
        if axis.key not in given and (not axis.families or method.family in axis.families)
    ]
    for values in product(*(axis.values for axis in axes)):
        yield {axis.key: value for axis, value in zip(axes, values, strict=True)}


def _folder(out: Path, changes: Mapping[str, Any]) -> Path:
    """The folder of a combination's runs, whose name says the values."""
    whole = Path(os.path.abspath(out))  # a relative one may have no name of its own: "." or ".."
    return whole.with_name(f"{whole.name}-grid") / re.sub(r"[^A-Za-z0-9._=,-]+", "-", _words(changes, "=", ","))


def _words(changes: Mapping[str, Any], between: str = " = ", after: str = ", ") -> str:
    return after.join(f"{key}{between}{value}" for key, value in changes.items())


def _planned(experiment: Experiment, plan: RunPlan, config: RunConfig) -> RunPlan:
    """The plan with another configuration, and the task that this one draws."""
    return plan_run(experiment, plan.setting, plan.method, plan.seed, plan.out, config)


def _validation_score(comparison: Comparison, candidate: Candidate) -> float:
    """The mean validation score of a combination's runs; minus infinity if training diverged."""
    try:
        runs = train_all(replace(comparison, plans=candidate.plans), tell=False)
    except DivergedError as error:
        print(f"grid: {error}", flush=True)
        return -math.inf
    scores = [run.result.validation_score for run in runs if run.result is not None]
    return -math.inf if any(map(math.isnan, scores)) else fmean(scores)
