"""Methods compared on one's own task, in one call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auxfast.experiments.base import Experiment, MakeTask
from auxfast.experiments.command import plan_runs, run_comparison
from auxfast.experiments.report.page import write_report
from auxfast.experiments.report.rows import Results
from auxfast.experiments.report.statistics import Estimate, paired_difference
from auxfast.experiments.report.text import describe
from auxfast.train.config import RunConfig
from auxfast.train.run import Run
from auxfast.train.serialization import override


@dataclass(frozen=True)
class ComparisonResult:
    """What `compare` returns. Its text is the table.

    runs: the runs, in the order in which they were made.
    scores: test scores by method and seed: `scores["linear"][0]`.
    """

    results: Results

    @property
    def runs(self) -> list[Run]:
        return self.results.runs

    @property
    def scores(self) -> dict[str, dict[int, float]]:
        scores: dict[str, dict[int, float]] = {}
        for run in self.runs:
            assert run.result is not None
            scores.setdefault(run.method.name, {})[run.seed] = run.result.score
        return scores

    def difference(self, method: str, baseline: str) -> Estimate | None:
        """Score of a method above a baseline, paired by seed: mean, standard error, and whether it is `beyond_noise()`.
        None if they have no seed in common."""
        return paired_difference(self.scores[method], self.scores[baseline])

    def report(self, path: str | Path) -> None:
        """Writes a page with pictures (`path` ends in .html), or one picture (.png).

        Raises:
            ValueError, MissingExtraError, RunError: see `write_report`.
        """
        write_report([self.results], Path(path))

    def __str__(self) -> str:
        return describe(self.results)


def compare(
    make_task: MakeTask,
    methods: Sequence[str] = ("stl", "equal", "linear-frozen", "linear"),
    *,
    seeds: Iterable[int] = range(5),
    config: RunConfig | Mapping[str, Any] | None = None,
    out: str | Path = "auxfast-runs",
    name: str | None = None,
    resume: bool = False,
) -> ComparisonResult:
    """Trains a task with every method from every seed, prints a table, and keeps each run in a folder of its own.

    Before that one task is drawn, each of its methods is called once, and faults are told. It is of one process;
    several share a run by `torchrun -m auxfast train FILE.py:EXPERIMENT`, see `docs/trainer.md`.

        result = compare(make_task, ["stl", "equal", "linear-frozen", "linear"], seeds=range(5))
        result.report("report.html")

    Args:
        make_task: `make_task(seed)` draws an `auxfast.train.Task`. If it has an argument `hold_out`, that says whether
            the auxiliary set is kept from training: it is not for `stl`, `equal` and other weightings, which need none,
            so that every method has the same labels to spend.
        methods: names of methods, see `auxfast.train.parse_method`.
        config: a configuration, or changes of the default one: {"train.outer_steps": 100, "combiner.hidden": (10,)}.
        out: folder of all runs; `auxfast report` reads it.
        name: name of the comparison, and of its folder in `out`; None: that of `make_task`.
        resume: go on with unfinished runs, and skip finished ones.

    Raises:
        TypeError, ValueError: an argument, or what the task has or returns, is not what it must be; names it, before
            any training.
        MissingExtraError: cattrs or tqdm is not installed; or SciPy, for the table.
        RunError: a run cannot be made, see `auxfast.train.record_run`. Finished runs are kept.
    """
    if config is not None and not isinstance(config, (RunConfig, Mapping)):
        raise TypeError(f"config: got {type(config).__name__}, must be a RunConfig, or a dict of changes")
    made = config if isinstance(config, RunConfig) else override(RunConfig(), config or {})
    experiment = Experiment(name or _name(make_task), make_task, config=made, methods=methods)
    comparison = plan_runs(experiment, seeds=_checked_seeds(seeds), out=Path(out), resume=resume)
    return ComparisonResult(run_comparison(comparison))


def _name(make_task: Any) -> str:
    name = getattr(make_task, "__name__", "")
    return name if re.fullmatch(r"\w+", name) else "comparison"


def _checked_seeds(seeds: Any) -> list[int]:
    checked = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else None
    if not checked or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in checked):
        raise TypeError(f"seeds: got {seeds!r}, must be integers of at least 0, such as range(5)")
    return checked
