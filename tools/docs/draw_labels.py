"""Draws docs/pictures/labels.svg: the auxiliary labels that a teacher has learned to give even and odd digits.

    python tools/docs/draw_labels.py [FILE]

It needs matplotlib and scikit-learn, trains for about a second, and writes the same file each time on the same machine.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib as mpl

from auxfast.experiments.base import train_run
from auxfast.experiments.paper.digits_labels import EXPERIMENT, draw
from auxfast.train import parse_method

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "pictures" / "labels.svg"


def main(path: Path) -> None:
    """Trains the first seed of `digits-labels` and draws its labels."""
    mpl.rcParams.update({"svg.hashsalt": "auxfast", "svg.fonttype": "none"})
    with tempfile.TemporaryDirectory() as folder:
        setting = next(iter(EXPERIMENT.settings))
        draw(path, [train_run(EXPERIMENT, setting, parse_method("auxilearn-labels"), 0, Path(folder))])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
