"""Notes on runs: what their records warn of, in a few words for a progress bar, a line or a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from auxfast.train.run import Run
from auxfast.train.trainer import OuterRecord

_WINDOW = 10  # outer steps over which the outer loss is summed: a single batch says little
_RISE = 1.2  # ratio to the lowest sum from which the outer loss counts as rising


def notes(records: Sequence[OuterRecord]) -> list[str]:
    """Notes on a run with these records so far, whose first loss is the main one; none where nothing is learned."""
    if not records or records[-1].outer_loss is None:
        return []
    found = []
    if skipped := skipped_steps(records):
        found.append(f"skipped {skipped} step{'s' * (skipped > 1)}")
    start, (main, *auxiliaries) = records[0].loss_weights, records[-1].loss_weights
    if auxiliaries and max(auxiliaries) < 0.01 * main:
        found.append("auxiliaries below 1%")
    if max(main, *auxiliaries) > 10 * max(start):
        found.append("weights grew tenfold")
    totals = list(accumulate((record.outer_loss or 0.0 for record in records), initial=0.0))
    windows = [later - earlier for earlier, later in zip(totals, totals[_WINDOW:], strict=False)]
    if windows and windows[-1] > _RISE * min(windows) > 0:
        found.append("outer loss rising")
    return found


def skipped_steps(records: Sequence[OuterRecord]) -> int:
    """The number of outer steps that changed nothing."""
    return sum(record.skipped for record in records)


def notes_on_runs(runs: Sequence[Run]) -> list[str]:
    """A note for each method, with the seeds that it is on."""
    seeds: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for note in notes(run.records):
            seeds.setdefault(run.method.name, {}).setdefault(note, []).append(str(run.seed))
    told = []
    for method, found in seeds.items():
        parts = [f"{note} (seed{'s' * (len(own) > 1)} {', '.join(own)})" for note, own in found.items()]
        told.append(f"{method}: {'; '.join(parts)}")
    return told
