"""Partially labelled samples: the digits, when a share of the auxiliary labels is unknown too.

Every scan lacks other labels, so every row of the mask is different. A loss that is masked counts as 0 for every
method, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from auxfast.experiments.base import Finding
from auxfast.experiments.paper import digits
from auxfast.experiments.report.plotting import draw_score_curves
from auxfast.experiments.report.statistics import better_everywhere, compare, scores
from auxfast.train.run import Run

_SHARES = {"all known": 0.0, "50% unknown": 0.5, "90% unknown": 0.9}


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Scores against the share of attributes that are unknown."""
    draw_score_curves(
        path,
        runs,
        EXPERIMENT.methods[1:],
        {setting: 100 * share for setting, share in _SHARES.items()},
        title="What are auxiliary labels worth when most are missing?",
        x_label="auxiliary labels that are unknown, %",
        y_label=EXPERIMENT.score_name,
        note="A loss whose label is unknown is masked, scan by scan. STL uses no auxiliary labels.\n"
        "Combiners keep 10 of the 100 main labels from training, for the auxiliary set; STL and Equal train on all.",
    )


def findings(runs: Sequence[Run]) -> list[Finding]:
    """Findings: do few attributes still help, and do all of them help more?"""
    first, *_, last = _SHARES
    full, few = (scores(runs, "nonlinear", setting) for setting in (first, last))
    return [
        better_everywhere(runs, "equal", "stl", _SHARES),
        better_everywhere(runs, "nonlinear", "stl", _SHARES),
        better_everywhere(runs, "nonlinear", "nonlinear-frozen", _SHARES),
        compare(f"The learned nonlinear combiner scores higher with {first} than with {last}", full, few),
    ]


# Everything else is as for the digits; nothing was chosen for this.
EXPERIMENT = replace(
    digits.EXPERIMENT,
    name="missing-labels",
    title="Missing labels: attributes that nobody has labelled are masked",
    about=(
        "The digits again: 100 of 1100 scans have a main label, and of each scan's eight attributes none, half or nine "
        "tenths are unknown, at random. Unknown losses are masked."
    ),
    methods=("stl", "equal", "linear", "nonlinear-frozen", "nonlinear"),
    settings={setting: {"task.unknown_attributes": share} for setting, share in _SHARES.items()},
    draw=draw,
    findings=findings,
)
