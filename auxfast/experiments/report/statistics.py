"""Scores of runs and means over seeds, which findings, tables and pictures are made of."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from auxfast.experiments.base import Finding
from auxfast.experiments.data.extras import import_extra
from auxfast.train.methods import parse_method
from auxfast.train.run import Run

VERDICT_SEEDS = 5  # with fewer, only differences of several times the noise could ever be told from chance


class Estimate(NamedTuple):
    """Mean over `seeds` seeds, and its standard error (None for a single seed)."""

    mean: float
    sem: float | None
    seeds: int

    def __str__(self) -> str:
        """Text with digits down to the first of the standard error, but one decimal at least."""
        if self.sem is None:
            return f"{self.mean:.4g}"
        decimals = 1 if not 0 < self.sem < math.inf else max(1, -math.floor(math.log10(self.sem)))
        return f"{self.mean:.{decimals}f} +- {self.sem:.{decimals}f}"

    def signed(self) -> str:
        return f"{'+' if self.mean >= 0 else ''}{self}"

    def beyond_noise(self) -> bool | None:
        """Whether the mean differs from 0 by more than chance explains, by Student's t test at 5%, two-sided: from
        five seeds by 2.8 standard errors, from many by 2. None below `VERDICT_SEEDS` seeds: it is not known.

        Raises:
            MissingExtraError: SciPy is not installed.
        """
        if self.sem is None or self.seeds < VERDICT_SEEDS:
            return None
        student = import_extra("scipy.stats", "scipy").t
        return bool(abs(self.mean) > student.ppf(0.975, self.seeds - 1) * self.sem)

    def above_noise(self) -> bool | None:
        """Whether the mean is above 0, and beyond noise; None: see `beyond_noise`."""
        beyond = self.beyond_noise()
        return beyond and self.mean > 0


def not_known(seeds: int) -> str:
    """Words for a verdict that `seeds` seeds are too few for."""
    return f"not known: {seeds} seed{'s' * (seeds != 1)}, a verdict takes {VERDICT_SEEDS}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean (deviation with n - 1, over sqrt(n))."""
    sem = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), sem, len(values))


def paired_difference(own: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Estimate of `own - baseline` over the seeds that both have, seed by seed: what two scores of one seed have in
    common drops out. None if there is no such seed."""
    differences = [own[seed] - baseline[seed] for seed in own if seed in baseline]
    return estimate(differences) if differences else None


def finished(runs: Iterable[Run], method: str, setting: str = "") -> list[Run]:
    """The finished runs of a method in a setting, in the seeds' order."""
    own = (run for run in runs if run.result is not None and run.method.name == method and run.setting == setting)
    return sorted(own, key=lambda run: run.seed)


def scores(runs: Iterable[Run], method: str, setting: str = "") -> dict[int, float]:
    """Test scores of the finished runs of a method in a setting, by seed, in the seeds' order."""
    return {run.seed: run.result.score for run in finished(runs, method, setting) if run.result is not None}


def compare(claim: str, own: Mapping[int, float], baseline: Mapping[int, float]) -> Finding:
    """Finding whether `own` scores, by seed, are above `baseline`'s beyond noise, paired over the seeds that both have.
    `claim` says so in words."""
    difference = paired_difference(own, baseline)
    if difference is None:
        return Finding(f"{claim}: {not_known(0)}.", None)
    holds = difference.above_noise()
    seeds = f"; {not_known(difference.seeds)}" if holds is None else f", paired over {difference.seeds} seeds"
    return Finding(f"{claim}: the difference is {difference.signed()}{seeds}.", holds)


def better(runs: Sequence[Run], method: str, baseline: str, setting: str = "") -> Finding:
    """Finding whether a method scores above another in a setting (see `compare`)."""
    claim = _claim(method, baseline)
    own, base = scores(runs, method, setting), scores(runs, baseline, setting)
    return compare(f"{setting}: {claim}" if setting else claim, own, base)


def learned_against_controls(
    runs: Sequence[Run], methods: Collection[str] | None = None, baselines: Sequence[str] = ("stl", "equal")
) -> list[Finding]:
    """Findings whether each learned method, or those of these names, scores above each baseline and above its own
    frozen start, in each setting: as far as these were run."""
    ran = dict.fromkeys((run.setting, run.method.name) for run in runs)
    learned = [(run.setting, run.method.name) for run in runs if run.method.learned]
    return [
        better(runs, method, control, setting)
        for setting, method in dict.fromkeys(learned)
        if methods is None or method in methods
        for control in (*baselines, f"{method}-frozen")
        if (setting, control) in ran
    ]


def better_everywhere(runs: Sequence[Run], method: str, baseline: str, settings: Iterable[str]) -> Finding:
    """Finding whether a method scores above another in each of the settings (see `compare`)."""
    parts: list[str] = []
    holds: list[bool | None] = []
    for setting in settings:
        difference = paired_difference(scores(runs, method, setting), scores(runs, baseline, setting))
        holds.append(None if difference is None else difference.above_noise())
        seeds = 0 if difference is None else difference.seeds
        figure = "" if difference is None else f"{difference.signed()} "
        parts.append(f"{setting}: {figure}({not_known(seeds) if holds[-1] is None else f'{seeds} seeds'})")
    text = f"{_claim(method, baseline)} in every setting; the paired differences are {'; '.join(parts)}."
    return Finding(text, False if False in holds else None if None in holds else True)


def _claim(method: str, baseline: str) -> str:
    return f"{parse_method(method).label} scores above {parse_method(baseline).label}"
