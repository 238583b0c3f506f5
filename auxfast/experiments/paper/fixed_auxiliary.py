"""Is it the combiner that was learned, or the way there? The paper's section C.6, on the digits.

While a combiner is learned, the loss landscape changes under the model, and what the model ends with may depend on that
course as well as on the final phi. So train again with phi as it was in the end, and do not move it: the paper lost 6.7
percentage points by that. As a control, phi stays at its start. All fixed runs share one phi, that of the first seed:
the standard error is over data and first weights, not over what might have been learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from auxfast.experiments.base import Finding
from auxfast.experiments.paper import digits
from auxfast.experiments.report.plotting import BLUE, GREY, ORANGE, RED, draw_course, new_figure, tidy
from auxfast.experiments.report.statistics import better, estimate, finished, scores
from auxfast.train.methods import parse_method
from auxfast.train.run import Run

COLOURS = {"nonlinear": RED, "nonlinear-fixed": BLUE, "nonlinear-frozen": ORANGE}  # keyed by method


def findings(runs: Sequence[Run]) -> list[Finding]:
    """The figure of section C.6, and the two controls."""
    pairs = (
        ("nonlinear", "nonlinear-fixed"),
        ("nonlinear", "nonlinear-frozen"),
        ("nonlinear-fixed", "nonlinear-frozen"),
    )
    return [better(runs, method, baseline) for method, baseline in pairs]


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Scores of the three, seed by seed; and the main loss's share of the weights in their course; to a PNG, if any of
    them has a run."""
    if not any(scores(runs, name) for name in COLOURS):
        return
    figure = new_figure(12, 5)
    figure.suptitle("A combiner that is learned, one that was learned before, and one at its start", fontweight="bold")
    left, right = figure.subplots(1, 2)
    by_method = {name: scores(runs, name) for name in COLOURS}
    complete = [seed for seed in by_method["nonlinear"] if all(seed in own for own in by_method.values())]
    for seed in complete:
        left.plot([own[seed] for own in by_method.values()], color=GREY, linewidth=0.8, alpha=0.5)
    for x, (name, colour) in enumerate(COLOURS.items()):
        own = list(by_method[name].values())
        left.plot([x] * len(own), own, ".", color=colour, alpha=0.6)
        if own:
            mean, sem, _ = estimate(own)
            left.errorbar(x, mean, yerr=sem or 0.0, fmt="o", color=colour, capsize=5, markersize=9, linewidth=2)
        shares = [[r.loss_weights[0] / sum(r.loss_weights) for r in run.records] for run in finished(runs, name)]
        if shares:
            courses = [[100 * share for share in course] for course in shares]
            draw_course(right, courses, colour, parse_method(name).label)
    left.set_xticks(range(len(COLOURS)), [parse_method(name).label.replace(", ", ",\n") for name in COLOURS])
    left.set_xlim(-0.4, len(COLOURS) - 0.6)
    left.set_ylabel(f"test score: {digits.EXPERIMENT.score_name}")
    left.set_title(f"Scores of {len(complete)} seeds", fontsize=11)
    right.set_xlabel("outer step")
    right.set_ylabel("main loss's share of all weights, %")
    right.set_title("How much the training loss listens to the main loss", fontsize=11)
    right.set_ylim(bottom=0)
    right.legend(fontsize=9.5, framealpha=1, edgecolor="none", loc="lower right")
    for ax in (left, right):
        tidy(ax)
    figure.supxlabel(
        "Left: dots are seeds, a grey line joins those of a seed; circles are means ± standard error. Right: mean over "
        "seeds ± one standard deviation.",
        fontsize=9.5,
        color=GREY,
    )
    figure.savefig(path)


# Everything is as in `digits`, where it was chosen for the learned combiner.
EXPERIMENT = replace(
    digits.EXPERIMENT,
    name="fixed-auxiliary",
    title="Fixed auxiliary: a combiner in the making against one that was learned before (paper, section C.6)",
    about=(
        f"{digits.EXPERIMENT.about} A nonlinear combiner is learned from the first seed; then models are trained with "
        "the combiner that it ended with, which stays as it is. If the learned combiner were all that matters, these "
        "should be as good as models whose combiner is learned along with them."
    ),
    methods=tuple(COLOURS),
    draw=draw,
    findings=findings,
)
