"""Experiments by name: the shipped ones, those of other packages, and one's own in a file or a module."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from auxfast.experiments.base import Experiment
from auxfast.experiments.paper import EXPERIMENTS
from auxfast.train.config import RunConfig
from auxfast.train.files import RunError, described, start_again
from auxfast.train.run import CONFIG, Run, not_of_this_version, read_config
from auxfast.train.task import Task

GROUP = "auxfast.experiments"  # of entry points, by which installed packages add experiments


def get_experiment(name: str) -> Experiment:
    """The experiment of that name, or at that place.

    Args:
        name: a shipped experiment's name, an entry point's, or `FILE.py:NAME` or `MODULE:NAME`.

    Raises:
        ValueError: there is none, and says which there are; or it cannot be imported.
    """
    if ":" in name:
        return _import_experiment(name)
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    packaged = _of_packages()
    if name in packaged:
        return _import_experiment(packaged[name].value.partition("[")[0].strip())  # it may name extras in brackets
    names = ", ".join([*EXPERIMENTS, *packaged])
    raise ValueError(f"experiment: got {name!r}, must be one of {names}; or FILE.py:NAME or MODULE:NAME")


def titles() -> Iterator[tuple[str, str]]:
    """Name and title of each experiment that has a name."""
    for name, experiment in EXPERIMENTS.items():
        yield name, experiment.title
    for name in _of_packages():
        try:
            yield name, get_experiment(name).title
        except ValueError as error:
            yield name, str(error)


def by_experiment(runs: Iterable[Run]) -> list[tuple[Experiment, list[Run]]]:
    """Each experiment with its runs, in the order in which their names are met.

    Raises:
        RunError: a run is of an experiment that there is not (any more).
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.experiment, []).append(run)
    return [(_experiment_of(own), own) for own in by_name.values()]


def refuse_shipped_name(experiment: Experiment) -> None:
    """Raises ValueError where an experiment has the name of a shipped one: a report would confuse them."""
    if EXPERIMENTS.get(experiment.name, experiment) is not experiment:
        raise ValueError(f"name: got {experiment.name!r}, which is an experiment of auxfast: choose another")


def _of_packages() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in EXPERIMENTS}


def _import_experiment(place: str) -> Experiment:
    """The experiment at `FILE.py:NAME` or `MODULE:NAME`, which remembers that place."""
    where, _, name = place.rpartition(":")
    is_file = where.endswith(".py")
    try:
        found = getattr(_load(Path(where).resolve()) if is_file else _import(where), name)
    except (Exception, SystemExit) as error:  # it is the user's code
        raise ValueError(f"experiment: cannot import {place}: {described(error)}") from error
    if not isinstance(found, Experiment):
        kind = type(found).__name__
        raise ValueError(f"experiment: {place} is a {kind}, must be an auxfast.experiments.Experiment")
    return replace(found, origin=f"{Path(where).resolve() if is_file else where}:{name}")


def _load(path: Path) -> ModuleType:
    """Runs a file as a module of its own. Its imports are searched in its folder first, as Python does for a script."""
    spec = spec_from_file_location(f"auxfast-file-{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the types of their fields
    _search_first(str(path.parent))
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    """Imports a module, from the working directory too, as `python -m` does."""
    _search_first(os.getcwd())
    return import_module(name)


def _search_first(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _experiment_of(runs: list[Run]) -> Experiment:
    """The experiment that these runs of one name are of."""
    first = runs[0]
    if first.experiment in EXPERIMENTS:
        return EXPERIMENTS[first.experiment]
    origin = next((run.origin for run in runs if run.origin), "")
    try:
        if origin or not first.losses:
            return get_experiment(origin or first.experiment)
    except ValueError as error:
        if not origin:
            raise not_of_this_version(first.path, error) from error
        raise RunError(
            f"{first.path / CONFIG} names an experiment that is not there any more ({error}): put it back, or write "
            f'the new place as its "origin"; or {start_again(first.path / CONFIG)}'
        ) from error
    return Experiment(
        first.experiment,
        _make_no_task,
        loss_names=first.losses,
        config=read_config(RunConfig(task=first.config.get("task")), first),
        settings={run.setting: {} for run in runs},
    )


def _make_no_task(seed: int, options: object) -> Task:
    raise RunError("its runs do not say how this experiment's task is made")
