"""The picture of a demo's results: scores, learned loss weights, residuals; one row an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from auxfast.data.extras import import_extra
from auxfast.train.report import short_label

# Okabe and Ito's palette: told apart by readers with any kind of colour vision.
_BLACK, _GREY, _BLUE, _RED, _GREEN = "#000000", "#7f7f7f", "#0072b2", "#d55e00", "#009e73"
_METHOD_COLOURS = {"linear": _BLUE, "nonlinear": _RED, "conv": _RED}  # with their frozen controls; the others are grey
_FEW_LOSSES = (_BLACK, _BLUE, _RED, _GREEN)
_DASHES = ("-", "--", "-.", ":")


def draw_report(path: Path, results: dict[str, Any]) -> None:
    """Draw `results` (as `results.json` has them) to a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure_module = import_extra("matplotlib.figure", "matplotlib")
    experiments = results["experiments"]
    figure = figure_module.Figure(figsize=(18, 4.6 * len(experiments) + 0.5), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    rows = figure.subfigures(len(experiments), 1, squeeze=False)[:, 0]
    for row, experiment in zip(rows, experiments.values(), strict=True):
        row.suptitle(experiment["title"], fontsize=13, fontweight="bold")
        scores, *weights, residual = row.subplots(1, 4, width_ratios=(1.5, 1, 1, 0.95))
        _draw_scores(scores, experiment)
        for axes, name in zip(weights, _learned(experiment), strict=True):
            _draw_weights(axes, experiment, name)
        weights[-1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
        _draw_residuals(residual, experiment)
    seeds = len(results["seeds"])
    note = (
        f"{seeds} seed{'s' * (seeds > 1)}. Scores: ticks are seeds; circles, bars and figures mean ± SEM, hollow if "
        "the combiner is frozen; dotted line: STL. Weights: mean over seeds ± one standard deviation. "
        "Residuals: median and quartiles over seeds."
    )
    figure.supxlabel(note, fontsize=9.5, color=_GREY)
    figure.savefig(path)


def _learned(experiment: Any) -> list[str]:
    """The names of the two learned methods."""
    return [name for name, method in experiment["methods"].items() if "history" in method]


def _draw_scores(axes: Any, experiment: dict[str, Any]) -> None:
    """One line a method: its seeds, mean and standard error, and those two in figures."""
    methods = experiment["methods"]
    for y, (name, method) in enumerate(methods.items()):
        colour = _METHOD_COLOURS.get(name.removesuffix("-frozen"), _GREY)
        filled = colour if not name.endswith("-frozen") else "white"
        scores, mean, sem = method["scores"], method["mean"], method["sem"] or 0.0
        style = {"color": colour, "markersize": 7}
        axes.plot(scores, [y + 0.22] * len(scores), "|", alpha=0.5, **style)
        axes.errorbar(mean, y, xerr=sem, fmt="o", markerfacecolor=filled, capsize=4, linewidth=2, **style)
        difference = method["paired difference to stl"]
        figures = [_plus_minus(mean, method["sem"]), _plus_minus(difference["mean"], difference["sem"], "+.1f")]
        _write_figures(axes, y, figures if name != "stl" else figures[:1])
    _write_figures(axes, -0.75, ["score", "minus STL"], color=_GREY)
    axes.axvline(methods["stl"]["mean"], color=_GREY, linewidth=1, linestyle=":", zorder=0)
    axes.set_yticks(range(len(methods)), [short_label(method["label"]) for method in methods.values()])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_xlabel(f"test score: {experiment['score']}")
    axes.set_title("Test score", fontsize=11)
    _tidy(axes)


def _plus_minus(mean: float, sem: float | None, form: str = ".1f") -> str:
    return f"{mean:{form}}" + ("" if sem is None else f" ± {sem:.1f}")


def _write_figures(axes: Any, y: float, figures: Sequence[str], **style: Any) -> None:
    """Write up to two columns of text to the right of the axes, at height `y` of the data."""
    for x, text in zip((1.14, 1.4), figures, strict=False):
        place = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "center", "annotation_clip": False}
        axes.annotate(text, (x, y), fontsize=9.5, **place, **style)


def _draw_weights(axes: Any, experiment: dict[str, Any], name: str) -> None:
    """Weight of each loss over the outer steps, for one learned combiner."""
    history = experiment["methods"][name]["history"]
    weights = np.array([run["loss_weights"] for run in history])  # (seeds, outer steps, losses)
    losses = experiment["losses"]
    for j, (loss, colour) in enumerate(zip(losses, _loss_colours(len(losses)), strict=True)):
        mean, deviation = weights[:, :, j].mean(axis=0), weights[:, :, j].std(axis=0)
        band = (np.maximum(mean - deviation, 0), mean + deviation)  # monotone: no weight is below 0
        _draw_band(axes, mean, band, colour, _DASHES[j % 4], loss)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("outer step")
    axes.set_ylabel("weight: d training loss / d loss")
    axes.set_title(f"Loss weights, {name} combiner", fontsize=11)
    _tidy(axes)


def _loss_colours(count: int) -> Sequence[Any]:
    """The main loss is black; few losses get distinct colours, many a sequence from dark to light."""
    if count <= len(_FEW_LOSSES):
        return _FEW_LOSSES[:count]
    colour_map = import_extra("matplotlib", "matplotlib").colormaps["viridis"]
    return [_BLACK, *(colour_map(0.1 + 0.8 * j / (count - 2)) for j in range(count - 1))]


def _draw_residuals(axes: Any, experiment: dict[str, Any]) -> None:
    """Relative residual of the linear solve at each outer step: how far each hypergradient can be trusted."""
    for name, dash in zip(_learned(experiment), ("-", "--"), strict=True):
        runs = experiment["methods"][name]["history"]
        residual = np.array([[np.inf if r is None else r for r in run["residual"]] for run in runs])
        low, middle, high = np.quantile(residual, (0.25, 0.5, 0.75), axis=0, method="nearest")
        _draw_band(axes, middle, (low, high), _METHOD_COLOURS[name], dash, name)
    axes.set_yscale("log")
    axes.axhline(1, color=_GREY, linewidth=1, linestyle=":")  # what a solution of zero has
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.1), max(high, 1.3))
    ticker = import_extra("matplotlib.ticker", "matplotlib")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("outer step")
    axes.set_ylabel("relative residual  ‖b - Hx‖ / ‖b‖")
    axes.set_title("Residual of the solve", fontsize=11)
    axes.legend(fontsize=9, framealpha=1, edgecolor="none")
    _tidy(axes)


def _draw_band(
    axes: Any, middle: np.ndarray, band: tuple[np.ndarray, np.ndarray], colour: Any, dash: str, label: str
) -> None:
    """A line over the outer steps, and a band around it; each (outer steps,)."""
    steps = np.arange(1, len(middle) + 1)
    axes.plot(steps, middle, dash, color=colour, linewidth=1.8, label=label)
    axes.fill_between(steps, *band, color=colour, alpha=0.12, linewidth=0)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
