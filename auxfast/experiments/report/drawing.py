"""What the experiments' own pictures share: colours, axes without clutter, and lines over the outer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from auxfast.experiments.data.extras import import_extra

# Okabe and Ito's palette: told apart by readers with any kind of colour vision.
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


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches, which no window system has to know of.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    module = import_extra("matplotlib.figure", "matplotlib")
    return module.Figure(figsize=(width, height), dpi=110, layout="constrained")


def tidy(axes: Any) -> None:
    """No frame where there is no axis, and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def draw_course(axes: Any, courses: Sequence[Sequence[float]], colour: str, label: str, dash: str = "-") -> None:
    """A line over the outer steps: the mean of the runs' `courses`, and their standard deviation as a band.

    Args:
        courses: (runs, outer steps); cut to the shortest, should runs have stopped early.
    """
    steps = min(map(len, courses))
    values = np.array([course[:steps] for course in courses])
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    axes.plot(range(1, steps + 1), mean, dash, color=colour, linewidth=1.8, label=label)
    axes.fill_between(range(1, steps + 1), mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
