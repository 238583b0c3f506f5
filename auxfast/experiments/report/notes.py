"""Notes on runs: what their records warn of, in a few words for a progress bar, a line or a report."""

from __future__ import annotations

from collections.abc import Sequence

from auxfast.implicit.watch import Watch
from auxfast.train.run import Run
from auxfast.train.trainer import OuterRecord

_WORDS = {
    "vanished": "auxiliaries below 1%",
    "grown": "weights grew tenfold",
    "outer loss rising": "outer loss rising",
}


class NoteTaker:
    """Notes on a run, taken record by record. `main`: index of the main loss."""

    def __init__(self, main: int = 0) -> None:
        self._watch, self._skipped, self._main = Watch(), 0, main

    def add(self, record: OuterRecord) -> None:
        """Takes notes of the next record."""
        self._skipped += record.skipped
        if record.outer_loss is not None:
            self._watch.observe(record.outer_loss, record.loss_weights, self._main)

    @property
    def notes(self) -> list[str]:
        """The notes so far; none where nothing is learned."""
        skipped = self._skipped
        found = [f"skipped {skipped} step{'s' * (skipped > 1)}"] if skipped else []
        return found + [_WORDS[kind] for kind in self._watch.noticed]


def notes(run: Run) -> list[str]:
    """Notes on a run."""
    taker = NoteTaker(run.main)
    for record in run.records:
        taker.add(record)
    return taker.notes


def skipped_steps(records: Sequence[OuterRecord]) -> int:
    """The number of outer steps that changed nothing."""
    return sum(record.skipped for record in records)


def notes_on_runs(runs: Sequence[Run]) -> list[str]:
    """A note for each method, with the seeds that it is on."""
    seeds: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for note in notes(run):
            seeds.setdefault(run.method.name, {}).setdefault(note, []).append(str(run.seed))
    told = []
    for method, found in seeds.items():
        parts = [f"{note} (seed{'s' * (len(own) > 1)} {', '.join(own)})" for note, own in found.items()]
        told.append(f"{method}: {'; '.join(parts)}")
    return told
