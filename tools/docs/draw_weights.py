"""Draws docs/pictures/weights.svg: the course of the three learned weights in examples/auxiliary_losses.py.

    python tools/docs/draw_weights.py [FILE]

It needs matplotlib, trains for about two seconds, and writes the same file each time on the same machine.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "auxiliary_losses.py"
PICTURE = ROOT / "docs" / "pictures" / "weights.svg"
LINES = (("main loss, noisy labels", "#222222"), ("helpful auxiliary", "#2a6fbb"), ("harmful auxiliary", "#c0392b"))


def draw(history: Sequence[Sequence[float]], path: Path) -> None:
    """Writes the picture. history: the weights of the three losses after each outer step."""
    plt.rcParams.update({"svg.hashsalt": "auxfast", "svg.fonttype": "none"})
    figure, ax = plt.subplots(figsize=(7.2, 2.9), layout="constrained")
    steps = range(1, len(history) + 1)
    for j, (name, colour) in enumerate(LINES):
        course = [weights[j] for weights in history]
        ax.plot(steps, course, color=colour, linewidth=2)
        ax.annotate(name, (steps[-1], course[-1]), (6, 0), textcoords="offset points", color=colour, va="center")
    ax.set_xlim(1, len(history) * 1.36)
    ax.set_xticks(range(0, len(history) + 1, 20))
    ax.set_ylim(-0.15, None)
    ax.set_xlabel("outer step")
    ax.set_ylabel("learned weight")
    ax.set_title("Weights of three losses, learned on 20 held-out samples", fontsize=11, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines["bottom"].set_bounds(1, len(history))
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main(path: Path) -> None:
    """Runs the example and draws what it returns."""
    _, history = runpy.run_path(str(EXAMPLE))["train"]("learned weights")
    draw(history, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
