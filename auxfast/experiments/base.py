"""What an experiment is: a problem, the settings that were chosen for it, and what it is there to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from auxfast.train.config import RunConfig
from auxfast.train.task import Task

if TYPE_CHECKING:
    from auxfast.experiments.runs import RunFolder


class MakeTask(Protocol):
    """Draws a task with the experiment's own options (`RunConfig.task`).

    `hold_out`: keep the auxiliary set from training; without, its samples are trained on like all others, so that
    every method has the same labels to spend.
    """

    def __call__(self, seed: int, options: Any, *, hold_out: bool) -> Task: ...


class Finding(NamedTuple):
    """What an experiment set out to show, with the measured figures, and whether it holds (None: too few runs)."""

    text: str
    holds: bool | None


@dataclass(frozen=True)
class Experiment:
    """A problem, and the settings that were chosen for it.

    Args:
        name: as on the command line.
        title: one line for tables and pictures.
        about: a sentence or two for a reader of the report: what the task is, what the auxiliaries are.
        score_name: what `Task.score` is, with its unit.
        loss_names: as the task's, the main loss first.
        config: how it is trained.
        make_task: draws a task.
        methods: names of what is compared, in the order of the table.
        settings: variations, by name: each a change of some of the configuration's entries, {"task.shots": 5}.
        package: what has to be installed for the data: the module, and its name on the package index.
        draw: makes a picture of its own, of runs of this experiment.
        findings: what the runs show of what the experiment set out to show.
    """

    name: str
    title: str
    about: str
    score_name: str
    loss_names: tuple[str, ...]
    config: RunConfig
    make_task: MakeTask
    methods: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    package: tuple[str, str] | None = None
    draw: Callable[[Path, Sequence[RunFolder]], None] | None = None
    findings: Callable[[Sequence[RunFolder]], list[Finding]] | None = None
