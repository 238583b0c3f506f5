"""How much the choices for the combiner matter: the auxiliary set's size and the network's depth (paper, C.4), on
the digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from auxfast.experiments.base import Finding
from auxfast.experiments.paper import digits
from auxfast.experiments.report.plotting import draw_score_curves
from auxfast.experiments.report.statistics import better_everywhere, compare, scores
from auxfast.train.run import Run

_METHODS = ("stl", "nonlinear-frozen", "nonlinear")
_SHOTS = {f"{shots} a class": shots for shots in range(1, 6)}
_LAYERS = {f"{layers} layer{'s' * (layers > 1)}": layers for layers in range(1, 6)}


def draw_sizes(path: Path, runs: Sequence[Run]) -> None:
    """Scores against the size of the auxiliary set."""
    draw_score_curves(
        path,
        runs,
        _METHODS[1:],
        {setting: 10 * shots for setting, shots in _SHOTS.items()},
        title="How many of the 100 labels should the auxiliary set take?",
        x_label="labelled scans in the auxiliary set (the others are trained on)",
        y_label=SIZE.score_name,
        note="STL has no auxiliary set: it trains on all 100. The frozen combiner holds labels back too,\n"
        "for nothing: where the learned one is above it, learning pays; where both fall, training lacks labels.",
    )


def size_findings(runs: Sequence[Run]) -> list[Finding]:
    """Learning against the main loss alone and the control, at each size; and whether large sets hurt."""
    first, *_, last = _SHOTS
    small, large = (scores(runs, "nonlinear", setting) for setting in (first, last))
    claim = f"With {first} in the auxiliary set the learned combiner scores above that with {last}"
    pairs = [better_everywhere(runs, "nonlinear", baseline, _SHOTS) for baseline in ("stl", "nonlinear-frozen")]
    return [*pairs, compare(claim, small, large)]


def draw_depths(path: Path, runs: Sequence[Run]) -> None:
    """Scores against the depth of the combiner."""
    draw_score_curves(
        path,
        runs,
        _METHODS[1:],
        _LAYERS,
        title="How deep should the nonlinear combiner be?",
        x_label="hidden layers, of ten units each",
        y_label=DEPTH.score_name,
        note="STL has no combiner. The frozen one stays as it was drawn at the start.\n"
        "Where the learned one is above it, learning pays.",
    )


def depth_findings(runs: Sequence[Run]) -> list[Finding]:
    """Learning against the control, at each depth; and whether deep is better than shallow."""
    first, *_, last = _LAYERS
    shallow, deep = (scores(runs, "nonlinear", setting) for setting in (first, last))
    return [
        better_everywhere(runs, "nonlinear", "nonlinear-frozen", _LAYERS),
        compare(f"The learned combiner of {last} scores above that of {first}", deep, shallow),
    ]


# Everything else is as for the digits, whose outer lr and solver were chosen with two and five layers in mind.
SIZE = replace(
    digits.EXPERIMENT,
    name="auxiliary-set-size",
    title="Auxiliary-set size: what it takes, training lacks",
    about=(
        "The digits again: 100 scans have a label, and the auxiliary set takes 10 to 50 of them. A larger one judges "
        "the combiner better, and leaves less to train on."
    ),
    methods=_METHODS,
    settings={setting: {"task.auxiliary_shots": shots} for setting, shots in _SHOTS.items()},
    draw=draw_sizes,
    findings=size_findings,
)
DEPTH = replace(
    digits.EXPERIMENT,
    name="combiner-depth",
    title="Combiner depth: one to five hidden layers",
    about="The digits again, with nonlinear combiners of one to five hidden layers of ten units.",
    methods=_METHODS,
    settings={setting: {"combiner.hidden": (10,) * layers} for setting, layers in _LAYERS.items()},
    draw=draw_depths,
    findings=depth_findings,
)
