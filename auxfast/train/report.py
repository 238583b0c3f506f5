"""Scores over seeds: statistics, a table, and the file of results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """Mean over seeds, and its standard error (None for a single seed)."""

    mean: float
    sem: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f} +- " + ("?" if self.sem is None else f"{self.sem:.1f}")

    def signed(self) -> str:
        return f"{'+' if self.mean >= 0 else ''}{self}"

    def beyond_noise(self) -> bool:
        """Whether the mean differs from 0 by more than two standard errors."""
        return self.sem is not None and abs(self.mean) > 2 * self.sem


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean (deviation with n - 1, over sqrt(n))."""
    sem = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), sem)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean and standard error of `values - baseline`, seed by seed: what the seeds have in common drops out.

    Raises:
        ValueError: the two are not of one length.
    """
    return estimate([value - base for value, base in zip(values, baseline, strict=True)])


def short_label(label: str) -> str:
    """A method's label without its remark in brackets."""
    return label.partition(" (")[0]


def score_table(labels: Mapping[str, str], scores: Mapping[str, Sequence[float]], baselines: Sequence[str]) -> str:
    """One line for each method: mean +- SEM, and the paired differences to each of the `baselines`.

    Args:
        labels: what to print for each method, in order.
        scores: for each method its scores, seed by seed, in the same order of seeds.
    """
    rows = [["method", "score", *(f"against {short_label(labels[base])}" for base in baselines)]]
    for name, label in labels.items():
        own = scores[name]
        differences = ["" if name == b else paired_difference(own, scores[b]).signed() for b in baselines]
        rows.append([label, str(estimate(own)), *differences])
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(width[0]), *(cell.rjust(w) for cell, w in zip(row[1:], width[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(path: Path, content: Any) -> None:
    """Write `content` whole or not at all: a reader never meets half a file.

    Raises:
        ValueError: `content` holds a number that JSON does not have (inf, NaN).
        OSError: the file cannot be written.
    """
    text = json.dumps(content, indent=1, allow_nan=False)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
