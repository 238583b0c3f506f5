"""Experiments: a problem, the settings that were chosen for it, and the claims that its runs are to show."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from auxfast.nn import Combiner
from auxfast.train.config import RunConfig
from auxfast.train.methods import Method, parse_method
from auxfast.train.recording import OnOuterStep, RunPlan, record_run, restore_run
from auxfast.train.run import Run, not_of_this_version, read_config
from auxfast.train.serialization import override, to_table
from auxfast.train.task import Task

MakeTask = Callable[..., Task]
"""Draws a task: `make_task(seed)`, with one or both of two further arguments, if you like.

options: the experiment's own options (`RunConfig.task`).
hold_out: whether the auxiliary set is kept from training. Otherwise its samples are trained on like all others, so that
    every method has the same labels to spend.
"""


class Finding(NamedTuple):
    """A claim of an experiment with the measured figures, and whether it holds (None: too few runs to know)."""

    text: str
    holds: bool | None


class Axis(NamedTuple):
    """An axis of an experiment's grid: an entry of the configuration, and the values among which a search chooses one
    for each method.

    key: such as "train.weight_decay".
    families: those of the methods that it matters to, such as "maxl" or "nonlinear"; empty: all.
    """

    key: str
    values: tuple[Any, ...]
    families: tuple[str, ...] = ()

    @property
    def entries(self) -> tuple[str, ...]:
        """The key, and the entries that change with it: those that keep a run as long, whatever its inner steps."""
        return (self.key, *(("train.outer_steps", "train.patience") if self.key == "train.inner_steps" else ()))


@dataclass(frozen=True)
class Experiment:
    """A problem, and the settings that were chosen for it. `Experiment("mine", make_task)` is enough for one's own.

    Args:
        name: name on the command line, and of the folder of its runs.
        make_task: draws a task, see `MakeTask`.
        title: one line for tables and pictures; the name, if there is none.
        about: a sentence or two for a reader of the report, on the task and the auxiliaries.
        score_name: name of `Task.score`, with its unit.
        loss_names: names of the task's losses; empty: as the task has them.
        config: configuration of its runs.
        methods: names of the methods that are compared, in the order of the table.
        settings: variations by name, each a change of some of the configuration's entries: {"task.shots": 5}.
        grid: what `auxfast train --grid` searches for each method before it trains it.
        package: module that the data need, and the name of its package on the index.
        draw: draws the experiment's own picture of its runs to a file, an SVG for a page.
        findings: claims of the experiment, as its runs decide them; None: that each learned method is better than STL,
            than Equal, and than its own frozen start, as far as these were run.
        origin: where it was imported from, `FILE.py:NAME` or `MODULE:NAME`; empty if it is one of auxfast, or nowhere.

    Raises:
        TypeError, ValueError: the name is no name for a folder, or `make_task` or a method is none.
    """

    name: str
    make_task: MakeTask
    title: str = ""
    about: str = ""
    score_name: str = "score"
    loss_names: tuple[str, ...] = ()
    config: RunConfig = field(default_factory=RunConfig)
    methods: Sequence[str] = ("stl", "equal", "linear-frozen", "linear")
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    grid: Sequence[Axis] = ()
    package: tuple[str, str] | None = None
    draw: Callable[[Path, Sequence[Run]], None] | None = None
    findings: Callable[[Sequence[Run]], list[Finding]] | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.search("[A-Za-z0-9]", self.name):
            raise ValueError(f"name: got {self.name!r}, must be a name for a folder, with a letter or a digit")
        if not callable(self.make_task):
            raise TypeError(f"make_task: got {type(self.make_task).__name__}, must be a function make_task(seed)")
        if isinstance(self.methods, str) or not self.methods:
            raise TypeError(f"methods: got {self.methods!r}, must be a list of names, such as ('equal', 'linear')")
        for method in self.methods:
            parse_method(method)
        object.__setattr__(self, "title", self.title or self.name)


def run_config(experiment: Experiment, setting: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The experiment's configuration in this setting, with `overrides`.

    Raises:
        ValueError: there is no such setting; or see `override`.
    """
    if setting not in experiment.settings:
        names = ", ".join(map(repr, filter(None, experiment.settings)))
        allowed = f"must be one of {names}" if names else "which has no settings: leave it out"
        raise ValueError(f"setting: got {setting!r} for {experiment.name}, {allowed}")
    return override(override(experiment.config, experiment.settings[setting]), overrides or {})


def plan_run(experiment: Experiment, setting: str, method: Method, seed: int, out: Path, config: RunConfig) -> RunPlan:
    """The run of one method from one seed, with the `config` of this setting (see `run_config`)."""
    make_task = _task_maker(experiment, method, seed, config)
    return RunPlan(out, experiment.name, setting, method, seed, config, make_task, experiment.origin)


def _task_maker(experiment: Experiment, method: Method, seed: int, config: RunConfig) -> Callable[[], Task]:
    """The experiment's `make_task` with those arguments that it takes."""
    taken = inspect.signature(experiment.make_task).parameters
    if config.task is not None and "options" not in taken:
        raise ValueError(f"config.task: got {config.task!r}, and make_task takes no `options`")
    given = {"options": config.task, "hold_out": method.holds_out}
    return partial(experiment.make_task, seed, **{name: value for name, value in given.items() if name in taken})


def train_run(
    experiment: Experiment,
    setting: str,
    method: Method,
    seed: int,
    out: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_outer_step: OnOuterStep | None = None,
) -> Run:
    """Trains and scores one method of an experiment from one seed (see `record_run`).

    Args:
        setting: one of `experiment.settings`.
        out: the folder of all runs.
        overrides: changes of the configuration, see `override`; they come after those of the setting.

    Raises:
        ValueError: there is no such setting or entry of the configuration.
        RunError: see `record_run`.
    """
    plan = plan_run(experiment, setting, method, seed, out, run_config(experiment, setting, overrides))
    return record_run(plan, resume=resume, on_outer_step=on_outer_step)


def restore(experiment: Experiment, run: Run) -> tuple[Task, Combiner | None]:
    """Task and combiner of a run of this experiment (see `restore_run`)."""
    config = read_config(experiment.config, run)
    return restore_run(run, config, _task_maker(experiment, run.method, run.seed, config))


def updated(experiment: Experiment, run: Run) -> Run:
    """The run with a complete configuration: entries that are newer than the run have the experiment's values.

    Raises:
        RunError: its setting or its entries are not those of the experiment (any more).
    """
    if run.setting not in experiment.settings:
        raise not_of_this_version(run.path, f"{experiment.name} has no setting {run.setting!r}")
    return replace(run, config=to_table(read_config(experiment.config, run)))
