"""Results of runs: scores, paired differences, findings and cost, in rows and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

from auxfast.experiments.base import Experiment, Finding, run_config, updated
from auxfast.experiments.report.notes import notes_on_runs
from auxfast.experiments.report.statistics import (
    VERDICT_SEEDS,
    Estimate,
    estimate,
    learned_against_controls,
    not_known,
    paired_difference,
    scores,
)
from auxfast.train.files import RunError
from auxfast.train.methods import COMBINER_LABELS, LABEL_LABELS, OWN, WEIGHTING_LABELS, Method
from auxfast.train.run import Run, RunResult
from auxfast.train.serialization import flattened, to_table

BASELINES = ("stl", "equal", "frozen")  # the last is a combiner's own frozen control


class Section(NamedTuple):
    """The finished runs of an experiment in one of its settings."""

    experiment: Experiment
    setting: str
    runs: list[Run]

    @property
    def title(self) -> str:
        return self.experiment.title + (f"; {self.setting}" if self.setting else "")


class Results(NamedTuple):
    """Results of an experiment's runs.

    `runs` are the finished ones, in the order in which they were given, `sections` the same by setting, in the
    experiment's order, and `left_out` those which are not finished.
    """

    experiment: Experiment
    runs: list[Run]
    sections: list[Section]
    findings: list[Finding]
    left_out: list[Run]

    @property
    def unfinished(self) -> int:
        return len(self.left_out)


class Row(NamedTuple):
    """One method in one setting.

    `best`: it scores above every other method there by more than noise (see `Estimate.beyond_noise`). `further_scores`:
    means of the task's further scores, by their names, over the runs that have them.
    Seconds and Hessian-vector products are those of a run, as a mean.
    """

    method: Method
    scores: dict[int, float]  # keyed by seed
    mean: Estimate
    differences: dict[str, Estimate]  # keyed by baseline; paired over the seeds that both have
    best: bool
    further_scores: dict[str, Estimate]
    inner_seconds: float
    outer_seconds: float
    matvecs: float

    @property
    def seconds(self) -> float:
        return self.inner_seconds + self.outer_seconds

    @property
    def outer_share(self) -> float:
        """Share of the training time that is spent in outer steps."""
        return self.outer_seconds / self.seconds


def results_of(experiment: Experiment, runs: Iterable[Run]) -> Results:
    """Results of these runs of the experiment.

    Raises:
        RunError: two are of the same method, setting and seed, or have other losses; or one does not fit the experiment
            (any more).
    """
    known = [updated(experiment, run) for run in runs]
    named = [run for run in known if run.losses]
    for run in named:
        if run.losses != named[0].losses:
            losses = f"{', '.join(named[0].losses)}, and {', '.join(run.losses)}"
            raise RunError(f"{named[0].path} and {run.path} have other losses ({losses}): report them apart")
    if not experiment.loss_names and known:
        experiment = replace(experiment, loss_names=known[0].losses)
    finished = [run for run in known if run.result is not None]
    seen: dict[Any, Run] = {}
    for run in finished:
        first = seen.setdefault((run.setting, run.method, run.seed), run)
        if first is not run:
            raise RunError(f"{first.path} and {run.path} are the same run: report one of the folders")
    by_setting = {setting: [run for run in finished if run.setting == setting] for setting in experiment.settings}
    sections = [Section(experiment, setting, own) for setting, own in by_setting.items() if own]
    seeds = len({run.seed for run in finished})
    found = (experiment.findings or learned_against_controls)(finished) if finished else []
    findings = [_decided(finding, seeds) for finding in found]
    return Results(experiment, finished, sections, findings, [run for run in known if run.result is None])


def _decided(finding: Finding, seeds: int) -> Finding:
    """The finding, without a verdict where there are too few seeds for one."""
    if finding.holds is None or seeds >= VERDICT_SEEDS:
        return finding
    return Finding(f"{finding.text} ({not_known(seeds)})", None)


def methods(section: Section) -> list[Method]:
    """Methods that were run: first the experiment's in its order, then the others by families, controls first."""
    families = [*WEIGHTING_LABELS, *COMBINER_LABELS, *LABEL_LABELS, OWN]
    order = {name: place for place, name in enumerate(section.experiment.methods)}
    phis = ["frozen", "learned", "fixed"]

    def place(m: Method) -> tuple[int, int, bool, int]:
        return order.get(m.name, len(order)), families.index(m.family), not m.monotone, phis.index(m.phi)

    return sorted({run.method for run in section.runs}, key=place)


def rows(section: Section) -> list[Row]:
    """Rows, one for each method that was run."""
    all_scores = {m: scores(section.runs, m.name, section.setting) for m in methods(section)}
    made = []
    for method, own in all_scores.items():
        others = {other.name: paired_difference(own, theirs) for other, theirs in all_scores.items() if other != method}
        above = [difference is not None and difference.above_noise() for difference in others.values()]
        baselines = zip(BASELINES, ("stl", "equal", replace(method, phi="frozen").name), strict=True)
        results = [run.result for run in section.runs if run.method == method and run.result is not None]
        matvecs = [sum(record.matvecs or 0 for record in run.records) for run in section.runs if run.method == method]
        made.append(
            Row(
                method=method,
                scores=own,
                mean=estimate(list(own.values())),
                differences={base: d for base, name in baselines if (d := others.get(name)) is not None},
                best=bool(above) and all(above),
                further_scores=_further_scores(results),
                inner_seconds=fmean(result.inner_seconds for result in results),
                outer_seconds=fmean(result.outer_seconds for result in results),
                matvecs=fmean(matvecs),
            )
        )
    return made


def _further_scores(results: Sequence[RunResult]) -> dict[str, Estimate]:
    names = dict.fromkeys(name for result in results for name in result.further_scores)
    return {name: estimate([r.further_scores[name] for r in results if name in r.further_scores]) for name in names}


def differing_entries(section: Section) -> dict[str, list[Any]]:
    """Entries of the configuration in which runs differ that should not: by dotted name, the values that were met."""
    tables = [flattened(run.config) for run in section.runs]
    values: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for table in tables for key in table):
        met = [table.get(key) for table in tables]
        if any(value != met[0] for value in met):
            values[key] = [value for i, value in enumerate(met) if value not in met[:i]]
    return values


def table(section: Section, made: Sequence[Row]) -> list[list[str]]:
    """A line of titles, and one for each of the section's rows: score, difference to each baseline that was run, the
    task's further scores, and what a run takes as a ratio."""
    baselines = [base for base in BASELINES if any(base in row.differences for row in made)]
    unit = reference(made)
    titles = [section.experiment.score_name, *(f"minus {base}" for base in baselines)]
    further = list(dict.fromkeys(name for row in made for name in row.further_scores))
    lines = [["method", *titles, *further, f"time / {unit.method.name}", "seeds"]]
    for row in made:
        differences = [row.differences[base].signed() if base in row.differences else "" for base in baselines]
        cost = f"{row.seconds / unit.seconds:.1f}"
        figures = [str(row.further_scores.get(name, "")) for name in further]
        lines.append([row.method.label, str(row.mean), *differences, *figures, cost, str(len(row.scores))])
    return lines


def reference(made: Sequence[Row]) -> Row:
    """The row whose time is the unit: Equal's, or else the first."""
    return next((row for row in made if row.method.name == "equal"), made[0])


def validation_cost(section: Section) -> list[str]:
    """A remark on what the validation scores took, where they were recorded."""
    records = [record for run in section.runs for record in run.records]
    validating = sum(record.validation_seconds for record in records)
    training = sum(record.inner_seconds + record.outer_seconds for record in records)
    return [f"validation scores took {validating / training:.1%} on top of the training time"] if validating else []


def chosen_entries(section: Section) -> dict[str, dict[str, Any]]:
    """Entries that a search of the experiment's grid has chosen, and not the same for all methods: by dotted name, the
    value of each method. A control has that of the method that it controls."""
    of_grid = {entry for axis in section.experiment.grid for entry in axis.entries}
    chosen = {}
    for key in filter(of_grid.__contains__, differing_entries(section)):
        values: dict[str, list[Any]] = {}
        for run in section.runs:
            values.setdefault(replace(run.method, phi="learned").name, []).append(flattened(run.config).get(key))
        if all(value == own[0] for own in values.values() for value in own):
            chosen[key] = {name: own[0] for name, own in values.items()}
    return chosen


def remarks(section: Section) -> list[str]:
    """Remarks on all runs, for below the table: the search's choices, and what validation took."""
    chosen = chosen_entries(section)
    values = {key: ", ".join(f"{name} {value!r}" for name, value in own.items()) for key, own in chosen.items()}
    return [
        f"{key} is each method's own, as a search chooses it: {text}" for key, text in values.items()
    ] + validation_cost(section)


def changed_entries(section: Section) -> dict[str, tuple[Any, Any]]:
    """Entries in which the first run's configuration is not the experiment's: by dotted name, theirs and the run's."""
    defaults = run_config(section.experiment, section.setting)
    before, after = flattened(to_table(defaults)), flattened(section.runs[0].config)
    return {
        key: (before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    }


def cautions(section: Section) -> list[str]:
    """Remarks on the runs and their configurations that a reader of the table has to know."""
    chosen = chosen_entries(section)
    texts = [
        f"{key} is {run!r} here, and {own!r} in the experiment"
        for key, (own, run) in changed_entries(section).items()
        if key not in chosen
    ]
    for key, values in differing_entries(section).items():
        if key not in chosen:
            texts.append(f"not all runs have the same {key}: {', '.join(map(repr, values))}")
    places = list(dict.fromkeys(run.origin for run in section.runs if run.origin))
    if len(places) > 1:
        texts.append(f"the runs are of experiments in several places, which may not be the same: {', '.join(places)}")
    return texts + notes_on_runs(section.runs)


def describe_unfinished(results: Results) -> list[str]:
    """A sentence on the runs that are left out, if there are any: how many, which seeds, and how to finish them."""
    if not results.left_out:
        return []
    seeds: dict[str, list[str]] = {}
    for run in results.left_out:
        name = f"{run.setting}, {run.method.name}" if run.setting else run.method.name
        seeds.setdefault(name, []).append(str(run.seed))
    names = "; ".join(f"{name}: {'seeds' if len(own) > 1 else 'seed'} {', '.join(own)}" for name, own in seeds.items())
    count = f"{results.unfinished} unfinished run{'s' * (results.unfinished > 1)} of {results.experiment.name}"
    return [f"left out: {count} ({names}); the same `auxfast train` with --resume goes on from there"]
