"""What the suite's runs show: a row for each task and learned combiner, beside its frozen start and Equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from auxfast.experiments.report.statistics import Estimate, estimate, paired_difference, scores
from auxfast.train.methods import parse_method
from auxfast.train.run import Run
from auxfast.train.trainer import OuterRecord
from benchmarks.learning.tasks import CHOSEN_ON, TASKS

BASELINES = ("frozen", "equal", "stl")
DEAD, EXPLODED = 0.01, 10.0  # shares: of the main loss's weight, and of the weights' total at the start
HEAD = ("task", "combiner", "score", "over frozen", "over Equal", "over STL", "shares of weights", "outer loss", "lost")


@dataclass(frozen=True)
class Row:
    """One learned combiner on one task, in one of its settings.

    Args:
        score: mean test score.
        over: mean difference from each of the `BASELINES`, paired over the seeds that both have.
        shares: share of the total that each loss's weight has in the end, as a mean.
        outer_loss: its mean at the first and at the last outer step.
        crashed, dead, exploded: seeds without a result; with all auxiliaries below 1% of the main loss's weight in the
            end; whose total of weights grew tenfold.
        scores: test scores of all methods, by seed.
    """

    task: str
    setting: str
    combiner: str
    score: Estimate | None
    over: dict[str, Estimate | None]
    shares: dict[str, float]
    outer_loss: tuple[float, float] | None
    crashed: list[int]
    dead: list[int]
    exploded: list[int]
    scores: dict[str, dict[int, float]]

    @property
    def place(self) -> str:
        return f"{self.task}, {self.setting}" if self.setting else self.task

    def sign(self, baseline: str) -> int:
        """1 above and -1 below the baseline, beyond noise (see `Estimate.beyond_noise`); else 0."""
        over = self.over[baseline]
        return 0 if over is None or not over.beyond_noise() else 1 if over.mean > 0 else -1


def make_rows(runs: Sequence[Run]) -> list[Row]:
    """Rows in the order of the suite's tasks and methods."""
    rows = []
    for task in TASKS.values():
        for setting in task.settings:
            own = [run for run in runs if (run.experiment, run.setting) == (task.name, setting)]
            by_method = {method: scores(own, method, setting) for method in task.methods}
            for method in task.methods:
                learned = [run for run in own if run.method.name == method]
                if learned and parse_method(method).learned:
                    rows.append(_row(learned, by_method, task.loss_names))
    return rows


def _row(runs: Sequence[Run], by_method: dict[str, dict[int, float]], loss_names: tuple[str, ...]) -> Row:
    run, method = runs[0], runs[0].method.name
    ends = [run for run in runs if run.result is not None]
    shares = [[weight / total for weight in weights] for weights in map(_last_weights, ends) if (total := sum(weights))]
    outer = [[r.outer_loss for r in run.records if r.outer_loss is not None] for run in ends]
    own, baselines = by_method[method], {"frozen": f"{method}-frozen", "equal": "equal", "stl": "stl"}
    return Row(
        task=run.experiment,
        setting=run.setting,
        combiner=method,
        score=estimate(list(own.values())) if own else None,
        over={name: paired_difference(own, by_method[other]) for name, other in baselines.items()},
        shares=dict(zip(loss_names, map(fmean, zip(*shares, strict=True)), strict=True)) if shares else {},
        outer_loss=(fmean(losses[0] for losses in outer), fmean(losses[-1] for losses in outer)) if outer else None,
        crashed=[run.seed for run in runs if run.result is None],
        dead=[run.seed for run in ends if _is_dead(_last_weights(run))],
        exploded=[run.seed for run in runs if _has_exploded(run.records)],
        scores=by_method,
    )


def _last_weights(run: Run) -> tuple[float, ...]:
    return run.records[-1].loss_weights


def _is_dead(weights: Sequence[float]) -> bool:
    main, *auxiliaries = weights
    return max(auxiliaries) < DEAD * main


def _has_exploded(records: Sequence[OuterRecord]) -> bool:
    return any(sum(record.loss_weights) >= EXPLODED * sum(records[0].loss_weights) for record in records)


def as_json(row: Row) -> dict[str, Any]:
    """The row as a table, with the sign of each difference (see `Row.sign`)."""
    over = {baseline: over and {**over._asdict(), "sign": row.sign(baseline)} for baseline, over in row.over.items()}
    return {**asdict(row), "score": row.score and row.score._asdict(), "over": over}


def as_markdown(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown, which can be read as plain text too, and what they show together."""
    lines = [HEAD, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    table = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    notes = (
        "Bold: beyond noise, by Student's t test at 5%, paired over the seeds. Shares: the smallest and the largest. "
        "Lost: seeds that crashed, whose auxiliaries all died (below 1% of the main loss's weight), and whose weights "
        "exploded (tenfold).\n*: the defaults were chosen on this task, on other seeds."
    )
    return "\n".join([*table, "", notes, "", *_summary(rows)])


def _cells(row: Row) -> tuple[str, ...]:
    ranked = sorted(row.shares.items(), key=lambda item: item[1])
    return (
        row.place + " *" * (row.task in CHOSEN_ON),
        row.combiner,
        "-" if row.score is None else str(row.score),
        *(_difference(row, baseline) for baseline in BASELINES),
        " to ".join(f"{share:.3f} ({name})" for name, share in (ranked[0], ranked[-1])) if ranked else "-",
        "-" if row.outer_loss is None else "{:.3g} to {:.3g}".format(*row.outer_loss),
        _lost([row]),
    )


def _difference(row: Row, baseline: str) -> str:
    over = row.over[baseline]
    if over is None:
        return "-"
    return f"**{over.signed()}**" if row.sign(baseline) else over.signed()


def _lost(rows: Iterable[Row]) -> str:
    counts = {name: sum(len(getattr(row, name)) for row in rows) for name in ("crashed", "dead", "exploded")}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def _summary(rows: Sequence[Row]) -> list[str]:
    """A line for each combiner: where it is above, where below, and what was lost."""
    lines = []
    for combiner in dict.fromkeys(row.combiner for row in rows):
        own = [row for row in rows if row.combiner == combiner]
        parts = [
            _count(own, ("frozen", "equal"), 1, "above its frozen start and Equal"),
            _count(own, ("frozen",), -1, "below its frozen start"),
            _count(own, ("equal",), -1, "below Equal"),
        ]
        lines.append(f"- {combiner}: {'; '.join(filter(None, [*parts, f'lost: {_lost(own)}']))}.")
    return lines


def _count(rows: Sequence[Row], baselines: Sequence[str], sign: int, words: str) -> str:
    """How many of the rows have this sign beside each baseline, and which; nothing where noise is not known."""
    known = [row for row in rows if all((over := row.over[name]) and over.sem is not None for name in baselines)]
    places = [row.place for row in known if all(row.sign(name) == sign for name in baselines)]
    return f"{words} in {len(places)} of {len(known)}" + f" ({'; '.join(places)})" * bool(places) if known else ""
