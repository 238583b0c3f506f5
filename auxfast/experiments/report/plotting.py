"""Pictures: what all of them share, the experiments' own kinds, and the comparison of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.report.rows import Row, Section, methods, reference, rows
from auxfast.experiments.report.statistics import Estimate, estimate, scores
from auxfast.train.methods import Method, parse_method
from auxfast.train.run import Run
from auxfast.train.trainer import OuterRecord

# Okabe and Ito's palette, which readers with any kind of colour vision can tell apart.
BLACK, GREY, BLUE, RED, GREEN, ORANGE, PURPLE, SKY = (
    "#000000",
    "#7f7f7f",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#e69f00",
    "#cc79a7",
    "#56b4e9",
)
_COLOURS = {  # frozen combiners have their family's colour, and are drawn hollow or dashed
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
    "own": "#332288",
    "auxilearn-labels": BLUE,
    "maxl": ORANGE,
    "maxl-f": GREEN,
}


def new_figure(width: float, height: float, dpi: int = 110) -> Any:
    """A matplotlib Figure of `width` times `height` inches, which no window system has to know of.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    module = import_extra("matplotlib.figure", "matplotlib")
    return module.Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def tidy(axes: Any) -> None:
    """Removes the frame where there is no axis, and adds a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def draw_course(
    axes: Any, courses: Sequence[Sequence[float]], colour: Any, label: str, dash: Any = "-"
) -> tuple[int, float]:
    """A line over the outer steps: the mean of the runs' `courses`, and their standard deviation as a band.

    Args:
        courses: (runs, outer steps); cut to the shortest, should runs have stopped early.

    Returns:
        The line's end.
    """
    steps = min(map(len, courses))
    values = np.array([course[:steps] for course in courses])
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    axes.plot(range(1, steps + 1), mean, linestyle=dash, color=colour, linewidth=1.8, label=label)
    axes.fill_between(range(1, steps + 1), mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
    return steps, mean[-1]


# ------------------------------------------------------------------------------------------------- scores over settings


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
    """Draws to a PNG one line a method: mean and standard error of its test scores over seeds, in each setting.

    Settings and methods without finished runs are left out.

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
    nudge = 0.012 * (max(positions.values()) - min(positions.values()))  # keeps error bars from hiding each other
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
    """Draws mean and standard error over seeds of STL's scores, each seed's own being its mean over settings."""
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
        fmt="o--" if frozen else "o-" if method.holds_out else "s-.",
        color=colour,
        markerfacecolor="white" if frozen else colour,
        label=method.label,
        linewidth=1.8,
        capsize=4,
    )


# ---------------------------------------------------------------------------------------------------------- loss images


def draw_loss_images(
    path: str | Path,
    images: Tensor,
    losses: Tensor,
    weights: Tensor,
    loss_names: Sequence[str],
    mask: Tensor | None = None,
) -> None:
    """Draws to a PNG, one row an image: the image, the channels of its losses, and those of its weights.

    Args:
        images: (batch, 3, H, W), red, green and blue in [0, 1], or (batch, 1, H, W), grey levels of any range.
        losses: (batch, num_losses, H, W).
        weights: (batch, num_losses, H, W), as `auxfast.nn.ConvCombiner.loss_weights` gives them; drawn times the number
            of pixels, so that 1 is the weight in a mean over all pixels.
        loss_names: one for each channel.
        mask: (batch, num_losses, H, W); where it is 0, losses and weights are left grey.

    Colours have one scale for each column.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: shapes do not fit together.
        OSError: the file cannot be written.
    """
    if losses.dim() != 4:
        raise ValueError(f"losses must be (batch, num_losses, H, W), got {tuple(losses.shape)}")
    batch, num_losses, height, width = losses.shape
    channels = images.shape[1] if images.dim() == 4 else 0
    if channels not in (1, 3) or images.shape != (batch, channels, height, width):
        raise ValueError(f"images must be ({batch}, 1 or 3, {height}, {width}), got {tuple(images.shape)}")
    for name, tensor in (("weights", weights), ("mask", mask)):
        if tensor is not None and tensor.shape != losses.shape:
            raise ValueError(f"{name} must have the losses' shape {tuple(losses.shape)}, got {tuple(tensor.shape)}")
    if len(loss_names) != num_losses:
        raise ValueError(f"loss_names must be {num_losses}, got {len(loss_names)}")
    columns = 1 + 2 * num_losses
    figure = new_figure(2.4 * columns, 2.2 * batch + 0.6)
    axes = figure.subplots(batch, columns, squeeze=False)
    for row, image in zip(axes, _array(images), strict=True):
        row[0].imshow(np.moveaxis(image, 0, -1).squeeze(), cmap="gray")
    axes[0, 0].set_title("image", fontsize=10)
    for j, name in enumerate(loss_names):
        known = None if mask is None else _array(mask[:, j]) != 0
        _draw_column(figure, axes[:, 1 + j], _array(losses[:, j]), known, "viridis", f"{name} loss")
        scaled = _array(weights[:, j]) * height * width
        _draw_column(figure, axes[:, 1 + num_losses + j], scaled, known, "magma", f"weight of {name}")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.supxlabel("Grey: unknown, masked. A weight of 1 is that of a plain mean over all pixels.", fontsize=9)
    figure.savefig(path)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


def _draw_column(
    figure: Any, column: np.ndarray, values: np.ndarray, known: np.ndarray | None, colours: str, title: str
) -> None:
    """Draws `values` (batch, H, W), a picture a row, on one scale of colours. `known` (batch, H, W): what to show."""
    shown = np.ma.masked_invalid(values if known is None else np.ma.masked_array(values, ~known))
    low, high = (0.0, 1.0) if shown.count() == 0 else (shown.min(), shown.max())
    if low == high:  # a scale needs some length
        low, high = low - 0.5, high + 0.5
    for axis, picture in zip(column, shown, strict=True):
        drawn = axis.imshow(picture, cmap=colours, vmin=low, vmax=high)
        axis.set_facecolor("0.8")
    figure.colorbar(drawn, ax=list(column), shrink=0.8)
    column[0].set_title(title, fontsize=10)


# ----------------------------------------------------------------------------------------------------------- the report

_DASHES = {"learned": "-", "frozen": "--", "fixed": ":"}
_FREE_DASH = (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5))  # marks combiners that are not monotone
_LOSS_COLOURS = (BLACK, BLUE, RED, GREEN)
_MAX_NAMED_LOSSES = 12  # more names would not stand beside each other
_COLUMNS = 2  # panels side by side: more would make their type small on a page
_TITLE_HEIGHT, _PANEL_HEIGHT = 0.6, 3.6  # inches
_LINE_HEIGHT = 0.07  # of a line of names, as a fraction of the axes' height
NOTE = (
    "Scores: ticks are seeds; circles, bars and figures are mean ± standard error, hollow where a combiner is not "
    "learned.\nCourses: mean ± one standard deviation over seeds. Residuals: median and quartiles."
)


def draw_sections(all_sections: Sequence[Section]) -> Any:
    """A matplotlib Figure of all sections, one below the other.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    heights = [
        _TITLE_HEIGHT + _scores_height(section) + _PANEL_HEIGHT * _panel_rows(section) for section in all_sections
    ]
    figure = new_figure(11.5, sum(heights) + 0.5)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, section in zip(parts, all_sections, strict=True):
        _draw_section(part, section)
    figure.supxlabel(NOTE, fontsize=9.5, color=GREY)
    return figure


def _scores_height(section: Section) -> float:
    """Height of the panel of scores, in inches."""
    return 1.2 + 0.35 * len(methods(section))


def _panel_rows(section: Section) -> int:
    """Rows of panels below the scores: held-out scores and cost; and weights of each learned method, and residuals."""
    panels = len(_weighing(section)) + any(method.learned for method in methods(section))
    return 1 + -(-panels // _COLUMNS)


def _weighing(section: Section) -> list[Method]:
    """Learned methods whose outer steps move the weights of the losses: those of labels may leave them alone."""
    moved = {run.method for run in section.runs if len({record.loss_weights for record in run.records}) > 1}
    return [method for method in methods(section) if method.learned and (method in moved or not method.labels)]


def _draw_section(part: Any, section: Section) -> None:
    part.suptitle(section.title, fontsize=13, fontweight="bold")
    panel_rows = _panel_rows(section)
    above, below = part.subfigures(2, 1, height_ratios=(_scores_height(section), _PANEL_HEIGHT * panel_rows))
    curves, cost, *others = below.subplots(panel_rows, _COLUMNS, squeeze=False).flat
    made = rows(section)
    _draw_scores(above.subplots(), section, made)
    _draw_held_out(curves, section, made)
    _draw_cost(cost, made)
    weighing = _weighing(section)
    for method in weighing:
        _draw_shares(others.pop(0), section, method)
    if learned := [row.method for row in made if row.method.learned]:
        _draw_residuals(others.pop(0), section, learned)
    for axes in others:
        axes.set_axis_off()


def _draw_scores(axes: Any, section: Section, made: Sequence[Row]) -> None:
    """Draws a line a method: its seeds, mean and standard error, which stand beside it too."""
    for y, row in enumerate(made):
        colour, filled = _COLOURS[row.method.family], row.method.learned or not row.method.holds_out
        style = {"color": colour, "markersize": 7}
        axes.plot(list(row.scores.values()), [y + 0.22] * len(row.scores), "|", alpha=0.5, **style)
        face = colour if filled else "white"
        axes.errorbar(
            row.mean.mean, y, xerr=row.mean.sem or 0, fmt="o", markerfacecolor=face, capsize=4, linewidth=2, **style
        )
        figure, weight = str(row.mean).replace("+-", "±"), "bold" if row.best else "normal"
        axes.annotate(figure, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontweight=weight)
    axes.set_yticks(range(len(made)), [_short(row.method) for row in made])
    axes.set_ylim(len(made) - 0.4, -0.6)
    axes.set_xlabel(f"test score: {section.experiment.score_name}")
    tidy(axes)


def _draw_held_out(axes: Any, section: Section, made: Sequence[Row]) -> None:
    """Draws the validation score over the outer steps, of each method all of whose runs recorded it."""
    ends, later = [], []
    for row in made:
        courses = [[r.validation_score for r in run.records] for run in section.runs if run.method == row.method]
        known = [[score for score in course if score is not None] for course in courses]
        if known == courses:
            colour = _COLOURS[row.method.family]
            dash = _DASHES[row.method.phi] if row.method.monotone else _FREE_DASH
            ends.append((*draw_course(axes, known, colour, "_", dash), _short(row.method), colour))
            later += [min(course[len(course) // 3 :]) for course in known]
    if later:  # scores before anything was learned would leave no height for the rest
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=max(low, min(later) - 0.1 * (high - min(later))))
    _label_steps(axes)
    title = "Held-out score (validation part)" if ends else "Held-out score: not recorded in these runs"
    axes.set_title(title, fontsize=11, loc="left")
    _label_ends(axes, ends)
    tidy(axes)


def _draw_shares(axes: Any, section: Section, method: Method) -> None:
    """Draws each loss's share of the total of the weights over the outer steps, for one learned combiner."""
    runs = [run for run in section.runs if run.method == method]
    names, ends = section.experiment.loss_names, []
    for j, (name, colour) in enumerate(zip(names, _loss_colours(len(names)), strict=True)):
        end = draw_course(axes, [[_shares(record)[j] for record in run.records] for run in runs], colour, "_")
        if len(names) <= _MAX_NAMED_LOSSES or j in (0, 1, len(names) - 1):
            ends.append((*end, name, colour))
    if method.monotone:
        axes.set_ylim(bottom=0)
    _label_steps(axes)
    axes.set_title(f"Shares of the loss weights, %: {method.label}", fontsize=11, loc="left")
    _label_ends(axes, ends)
    tidy(axes)


def _shares(record: OuterRecord) -> list[float]:
    """Weights in percent of the sum of those that are not negative."""
    total = sum(max(weight, 0.0) for weight in record.loss_weights)
    return [100 * weight / total if total else 0.0 for weight in record.loss_weights]


def _loss_colours(count: int) -> Sequence[Any]:
    """Black for the main loss; distinct colours for few losses, a sequence from dark to light for many."""
    if count <= len(_LOSS_COLOURS):
        return _LOSS_COLOURS[:count]
    colour_map = import_extra("matplotlib", "matplotlib").colormaps["viridis"]  # without its end, too light to read
    return [BLACK, *(colour_map(0.7 * j / (count - 2)) for j in range(count - 1))]


def _draw_residuals(axes: Any, section: Section, learned: Sequence[Method]) -> None:
    """Draws the relative residual of the linear solve at each outer step: how far each hypergradient can be trusted."""
    ends = []
    for method in learned:
        residual = _residuals([run for run in section.runs if run.method == method])
        low, middle, high = np.quantile(residual, (0.25, 0.5, 0.75), axis=0, method="nearest")
        steps, colour = range(1, len(middle) + 1), _COLOURS[method.family]
        axes.plot(steps, middle, linestyle="-" if method.monotone else _FREE_DASH, color=colour, linewidth=1.8)
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        ends.append((len(middle), middle[-1], _short(method), colour))
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":")  # a solution of zero has this residual
    _log_scale(axes)
    _label_steps(axes)
    axes.set_title("Residual of the solve (0: exact, 1: no better than none)", fontsize=11, loc="left")
    _label_ends(axes, ends)
    tidy(axes)


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Writes names beside the ends of lines, (x, y, name, colour) each, as near to them as they do not overlap. Call it
    when everything else is drawn."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    ordered = sorted((end for end in ends if np.isfinite(end[1])), key=lambda end: end[1])
    # A residual of 0 lies infinitely far below the axes: lines are followed to their edges only.
    points = [np.clip(to_axes.transform((x, y)), 0, 1) for x, y, *_ in ordered]
    places = _spread([height for _, height in points], _LINE_HEIGHT, 1 - _LINE_HEIGHT / 2)
    for (*_, name, colour), point, place in zip(ordered, points, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 1, "relpos": (0, 0.5)}
        where = {"xytext": (1.04, place), "xycoords": "axes fraction", "va": "center", "annotation_clip": False}
        axes.annotate(name, point, color=colour, fontsize=9.5, arrowprops=line, **where)


def _spread(places: Sequence[float], gap: float, top: float) -> list[float]:
    """The places below `top`, a gap apart, that are nearest in the least squares to those given in ascending order."""
    groups: list[list[float]] = []  # of places that touch: each keeps the mean of what its members want
    for i, place in enumerate(places):
        group = [max(0.0, min(place - i * gap, top - (len(places) - 1) * gap))]
        while groups and fmean(groups[-1]) >= fmean(group):
            group = groups.pop() + group
        groups.append(group)
    return [mean + i * gap for i, mean in enumerate(fmean(group) for group in groups for _ in group)]


def _label_steps(axes: Any) -> None:
    axes.set_xlabel("outer step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _log_scale(axes: Any) -> None:
    """Makes the y axis logarithmic, with plain numbers at its ticks. Call it when everything is drawn."""
    axes.set_yscale("log")
    ticker = import_extra("matplotlib.ticker", "matplotlib")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=9))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _residuals(runs: Sequence[Run]) -> np.ndarray:
    """Residuals (runs, outer steps), cut to the shortest run and without its cooldown."""
    known = [[record.residual for record in run.records if record.outer_loss is not None] for run in runs]
    steps = min(map(len, known))
    return np.array([[np.inf if residual is None else residual for residual in own[:steps]] for own in known])


def _draw_cost(axes: Any, made: Sequence[Row]) -> None:
    """Draws what inner and outer steps of a run take, as a ratio to the unit's; writes its Hessian-vector products."""
    unit = reference(made)
    for y, row in enumerate(made):
        inner, outer = row.inner_seconds / unit.seconds, row.outer_seconds / unit.seconds
        axes.barh(y, inner, color=GREY, label="inner steps" if y == 0 else "_")
        axes.barh(y, outer, left=inner, color=ORANGE, label="outer steps" if y == 0 else "_")
        text = f"{inner + outer:.1f}" + (f" ({row.matvecs:.0f} products)" if row.method.learned else "")
        axes.annotate(text, (inner + outer, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9.5)
    axes.set_yticks(range(len(made)), [_short(row.method) for row in made])
    axes.set_ylim(len(made) - 0.4, -0.6)
    axes.set_xlim(right=1.7 * max(row.seconds for row in made) / unit.seconds)
    axes.set_title(f"Time of a run, {_short(unit.method)} = 1 ({unit.seconds:.2g} s)", fontsize=11, loc="left")
    axes.legend(fontsize=9.5, frameon=False, loc="upper right")
    tidy(axes)


def _short(method: Method) -> str:
    """Label without its remark in brackets."""
    return method.label.partition(" (")[0]
