"""The picture of an experiment in several settings: each method's score against what the settings vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from auxfast.experiments.report.drawing import BLACK, BLUE, GREEN, GREY, RED, new_figure, tidy
from auxfast.experiments.report.statistics import Estimate, estimate, scores
from auxfast.train.methods import Method, parse_method
from auxfast.train.run import Run

_COLOURS = {"equal": GREEN, "linear": BLUE, "nonlinear": RED}


def draw_score_curves(
    path: Path,
    runs: Sequence[Run],
    methods: Sequence[str],
    positions: Mapping[str, float],
    *,
    title: str,
    x_label: str,
    y_label: str,
    note: str,
) -> None:
    """Draw to a PNG one line a method: mean and standard error of its test scores over seeds, in each setting. Settings
    and methods without finished runs are left out.

    Args:
        methods: all but "stl", which is drawn as one level for all settings: they do not concern it.
        positions: where on the x axis each setting is, by its name.
        note: below the picture: what a reader should look for.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure(7.5, 5)
    axes = figure.subplots()
    _draw_level(axes, runs)
    nudge = 0.012 * (max(positions.values()) - min(positions.values()))  # error bars should not hide each other
    for i, name in enumerate(methods):
        of_setting = {setting: scores(runs, name, setting) for setting in positions}
        points = [(positions[s], estimate(list(own.values()))) for s, own in of_setting.items() if own]
        if points:
            _draw_line(axes, parse_method(name), points, nudge * (i - (len(methods) - 1) / 2))
    axes.set_xticks(list(positions.values()))
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"test score: {y_label}")
    axes.set_title(title, fontsize=12, fontweight="bold")
    axes.legend(fontsize=9, framealpha=1, edgecolor="none")
    tidy(axes)
    seeds = len({run.seed for run in runs if run.result})
    figure.supxlabel(f"{note}\nMean ± standard error over {seeds} seeds.", fontsize=9, color=GREY)
    figure.savefig(path)


def _draw_level(axes: Any, runs: Sequence[Run]) -> None:
    """Mean and standard error over seeds of STL's scores, each seed's own being its mean over settings."""
    of_seed: dict[int, list[float]] = {}
    for run in runs:
        if run.method.name == "stl" and run.result is not None:
            of_seed.setdefault(run.seed, []).append(run.result.score)
    if of_seed:
        mean, sem, _ = estimate([fmean(own) for own in of_seed.values()])
        axes.axhline(mean, color=BLACK, linestyle=":", linewidth=1.8, label=parse_method("stl").label)
        axes.axhspan(mean - (sem or 0.0), mean + (sem or 0.0), color=BLACK, alpha=0.08, linewidth=0)


def _draw_line(axes: Any, method: Method, points: Sequence[tuple[float, Estimate]], shift: float) -> None:
    frozen, colour = method.phi == "frozen", _COLOURS[method.family]
    axes.errorbar(
        [x + shift for x, _ in points],
        [e.mean for _, e in points],
        yerr=[e.sem or 0.0 for _, e in points],
        fmt="o--" if frozen else "o-" if method.is_combiner else "s-.",
        color=colour,
        markerfacecolor="white" if frozen else colour,
        label=method.label,
        linewidth=1.8,
        capsize=4,
    )
