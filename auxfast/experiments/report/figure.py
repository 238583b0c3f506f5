"""The picture of a comparison: scores, learning curves, learned loss weights, residuals and cost of the outer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.report.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, draw_course, tidy
from auxfast.experiments.report.rows import Row, Section, methods, rows
from auxfast.train.methods import Method
from auxfast.train.run import Run

_COLOURS = {  # of the families; frozen combiners have their family's, drawn hollow or dashed
    "stl": BLACK,
    "equal": GREY,
    "uncertainty": SKY,
    "dwa": "#999933",
    "gradnorm": "#882255",
    "gcs": "#44aa99",
    "mgda": "#aa4499",
    "linear": BLUE,
    "deep-linear": GREEN,
    "nonlinear": RED,
    "polynomial": PURPLE,
    "conv": ORANGE,
}
_DASHES = {"learned": "-", "frozen": "--", "fixed": ":"}
_FREE = (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5))  # not monotone
_FEW_LOSSES = (BLACK, BLUE, RED, GREEN)
_MOST_NAMED = 12  # losses in a legend
_COLUMNS = 4
NOTE = (
    "Scores: ticks are seeds; circles, bars and figures are mean ± standard error, hollow where a combiner is not "
    "learned; dotted line: the first method. Curves: mean over seeds; weights: ± one standard deviation. Residuals: "
    "median and quartiles."
)


def draw_sections(all_sections: Sequence[Section]) -> Any:
    """A matplotlib Figure of all sections, one below the other.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    heights = [_height(section) for section in all_sections]
    figure = import_extra("matplotlib.figure", "matplotlib").Figure(
        figsize=(18, sum(heights) + 0.5), dpi=100, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, section in zip(parts, all_sections, strict=True):
        _draw_section(part, section)
    figure.supxlabel(NOTE, fontsize=9.5, color=GREY)
    return figure


def _height(section: Section) -> float:
    """In inches."""
    return 0.9 + max(4.0, 0.4 * len(methods(section))) + 4.2 * _weight_rows(section)


def _weight_rows(section: Section) -> int:
    """Rows of panels below the first: weights of each learned method, and residual and cost if there is one."""
    learned = sum(method.learned for method in methods(section))
    return -(-(learned + 2) // _COLUMNS) if learned else 0


def _draw_section(part: Any, section: Section) -> None:
    part.suptitle(section.title, fontsize=13, fontweight="bold")
    weight_rows = _weight_rows(section)
    ratios = [_height(section) - 0.9 - 4.2 * weight_rows, *[4.2] * weight_rows]
    top, *bottom = part.subfigures(1 + weight_rows, 1, squeeze=False, height_ratios=ratios)[:, 0]
    scores, curves = top.subplots(1, 2, width_ratios=(1.3, 1))
    made = rows(section)
    _draw_scores(scores, section, made)
    _draw_curves(curves, section, made)
    panels = [axes for row in bottom for axes in row.subplots(1, _COLUMNS)]
    learned = [row.method for row in made if row.method.learned]
    for axes, method in zip(panels, learned, strict=False):
        _draw_weights(axes, section, method)
    if learned:
        _draw_residuals(panels[len(learned)], section, learned)
        _draw_cost(panels[len(learned) + 1], made)
    for axes in panels[len(learned) + 2 :]:
        axes.set_axis_off()


def _draw_scores(axes: Any, section: Section, made: Sequence[Row]) -> None:
    """One line a method: its seeds, mean and standard error, and in figures these two and the difference to STL."""
    for y, row in enumerate(made):
        colour, filled = _COLOURS[row.method.family], row.method.learned or not row.method.is_combiner
        style = {"color": colour, "markersize": 7}
        axes.plot(list(row.scores.values()), [y + 0.22] * len(row.scores), "|", alpha=0.5, **style)
        face = colour if filled else "white"
        axes.errorbar(
            row.mean.mean, y, xerr=row.mean.sem or 0, fmt="o", markerfacecolor=face, capsize=4, linewidth=2, **style
        )
        texts = [str(row.mean), *(row.differences[base].signed() for base in ("stl",) if base in row.differences)]
        _write_columns(
            axes, y, [text.replace("+-", "±") for text in texts], fontweight="bold" if row.best else "normal"
        )
    _write_columns(axes, -0.75, ["score", "minus STL"], color=GREY)
    axes.axvline(made[0].mean.mean, color=GREY, linewidth=1, linestyle=":", zorder=0)
    axes.set_yticks(range(len(made)), [_short(row.method) for row in made])
    axes.set_ylim(len(made) - 0.4, -0.6)
    axes.set_xlabel(f"test score: {section.experiment.score_name}")
    axes.set_title("Test score", fontsize=11)
    tidy(axes)


def _write_columns(axes: Any, y: float, texts: Sequence[str], **style: Any) -> None:
    """Up to two columns of text to the right of the axes, at height `y` of the data."""
    for x, text in zip((1.12, 1.34), texts, strict=False):
        place = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "center", "annotation_clip": False}
        axes.annotate(text, (x, y), fontsize=9.5, **place, **style)


def _draw_curves(axes: Any, section: Section, made: Sequence[Row]) -> None:
    """Main loss of training batches, which all methods have in common; or the validation score, if it was watched."""
    watched = all(record.validation_score is not None for run in section.runs for record in run.records)
    for row in made:
        records = [run.records for run in section.runs if run.method == row.method]
        seen = [[r.validation_score if watched else r.main_loss for r in own] for own in records]
        shortest = min(map(len, seen))
        values = np.array([own[:shortest] for own in seen], dtype=float)  # None is NaN
        colour = _COLOURS[row.method.family]
        dash = _DASHES[row.method.phi] if row.method.monotone else _FREE
        axes.plot(range(1, shortest + 1), values.mean(axis=0), linestyle=dash, color=colour, label=_short(row.method))
    if not watched:
        _log_scale(axes)
    _label_steps(axes)
    axes.set_ylabel("validation score" if watched else "main loss of a training batch")
    axes.set_title("Validation score" if watched else "Main training loss", fontsize=11)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
    tidy(axes)


def _draw_weights(axes: Any, section: Section, method: Method) -> None:
    """Weight of each loss over the outer steps, for one learned combiner."""
    runs = [run for run in section.runs if run.method == method]
    names = section.experiment.loss_names
    for j, (name, colour) in enumerate(zip(names, _loss_colours(len(names)), strict=True)):
        label = name if len(names) <= _MOST_NAMED or j in (0, 1, len(names) - 1) else "_"
        draw_course(axes, [[record.loss_weights[j] for record in run.records] for run in runs], colour, label)
    if method.monotone:
        axes.set_ylim(bottom=0)
    _label_steps(axes)
    axes.set_ylabel("weight: d training loss / d loss")
    axes.set_title(f"Loss weights: {method.label}", fontsize=11)
    axes.legend(fontsize=8, framealpha=0.8, edgecolor="none", loc="best")
    tidy(axes)


def _loss_colours(count: int) -> Sequence[Any]:
    """The main loss is black; few losses get distinct colours, many a sequence from dark to light."""
    if count <= len(_FEW_LOSSES):
        return _FEW_LOSSES[:count]
    colour_map = import_extra("matplotlib", "matplotlib").colormaps["viridis"]
    return [BLACK, *(colour_map(0.1 + 0.8 * j / (count - 2)) for j in range(count - 1))]


def _draw_residuals(axes: Any, section: Section, learned: Sequence[Method]) -> None:
    """Relative residual of the linear solve at each outer step: how far each hypergradient can be trusted."""
    for method in learned:
        residual = _residuals([run for run in section.runs if run.method == method])
        low, middle, high = np.quantile(residual, (0.25, 0.5, 0.75), axis=0, method="nearest")
        steps, colour = range(1, len(middle) + 1), _COLOURS[method.family]
        dash = "-" if method.monotone else _FREE
        axes.plot(steps, middle, linestyle=dash, color=colour, linewidth=1.8, label=_short(method))
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":")  # what a solution of zero has
    _log_scale(axes)
    _label_steps(axes)
    axes.set_ylabel("relative residual  ‖b - Hx‖ / ‖b‖")
    axes.set_title("Residual of the solve (0: exact, 1: no better than none)", fontsize=11)
    axes.legend(fontsize=9, framealpha=1, edgecolor="none")
    tidy(axes)


def _label_steps(axes: Any) -> None:
    axes.set_xlabel("outer step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _log_scale(axes: Any) -> None:
    """With plain numbers at the ticks; call it when everything is drawn."""
    axes.set_yscale("log")
    ticker = import_extra("matplotlib.ticker", "matplotlib")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=9))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _residuals(runs: Sequence[Run]) -> np.ndarray:
    """(runs, outer steps), cut to the shortest."""
    steps = min(len(run.records) for run in runs)
    known = [[record.residual for record in run.records[:steps]] for run in runs]
    return np.array([[np.inf if residual is None else residual for residual in own] for own in known])


def _draw_cost(axes: Any, made: Sequence[Row]) -> None:
    """Seconds of inner and outer steps of a run, and its Hessian-vector products."""
    for y, row in enumerate(made):
        inner, outer = row.inner_seconds, row.outer_seconds
        axes.barh(y, inner, color=GREY, label="inner steps" if y == 0 else "_")
        axes.barh(y, outer, left=inner, color=ORANGE, label="outer steps" if y == 0 else "_")
        text = f"{row.outer_share:.0%} outer, {row.matvecs:.0f} products" if row.method.learned else ""
        axes.annotate(text, (inner + outer, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(range(len(made)), [_short(row.method) for row in made], fontsize=8.5)
    axes.set_ylim(len(made) - 0.4, -0.6)
    axes.set_xlim(right=1.8 * max(row.inner_seconds + row.outer_seconds for row in made))
    axes.set_xlabel("seconds of training, mean over seeds")
    axes.set_title("Cost (products: with the Hessian)", fontsize=11)
    axes.legend(fontsize=9, frameon=False, loc="upper right")
    tidy(axes)


def _short(method: Method) -> str:
    """A label without its remark in brackets."""
    return method.label.partition(" (")[0]
