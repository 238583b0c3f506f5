"""The panels of a report, of runs made by hand."""

from io import BytesIO

import pytest

from auxfast.experiments.report.plotting import draw_sections
from auxfast.experiments.report.rows import results_of
from experiments.problems import noisy_experiment
from experiments.report.handmade import record, runs_of

pytest.importorskip("matplotlib")


def _panels(scores, records):
    """The axes of each panel by title, without that of the scores, once it is drawn; all runs have the records, and
    those that do not learn have no outer losses in them."""
    experiment = noisy_experiment()
    runs = runs_of(experiment, scores)
    for run in runs:
        run.records[:] = [made if run.method.learned else made._replace(outer_loss=None) for made in records]
    figure = draw_sections(results_of(experiment, runs).sections)
    figure.savefig(BytesIO())
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_weights_are_drawn_as_shares_of_the_total_of_those_that_are_not_negative():
    records = [record(loss_weights=(2.0, 1.0, 1.0)), record(loss_weights=(3.0, 1.0, -1.0))]
    axes = _panels({"linear-free": [1.0, 2.0]}, records)["Shares of the loss weights, %: Linear, not monotone, learned"]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[50, 75], [25, 25], [25, -25]]


def test_lines_are_labelled_at_their_ends_in_their_order_and_labels_stand_apart():
    records = [record(loss_weights=(1.0, 1.0, 1.0)), record(loss_weights=(1.0, 1.01, 0.99))]
    axes = _panels({"linear": [1.0]}, records)["Shares of the loss weights, %: Linear, learned"]
    labels = sorted(axes.texts, key=lambda text: text.get_position()[1])
    assert [label.get_text() for label in labels] == ["second", "main", "first"]
    heights = [label.get_position()[1] for label in labels]
    assert heights[1] - heights[0] == pytest.approx(0.07)
    assert heights[2] - heights[1] == pytest.approx(0.07)
    assert 0 <= heights[0] < heights[2] <= 1


@pytest.mark.parametrize(("residuals", "labelled"), [((0.1, 0.0), True), ((0.0, 0.0), True), ((0.1, None), False)])
def test_residuals_that_a_logarithm_does_not_have_can_be_drawn(residuals, labelled):
    axes = _panels({"linear": [1.0]}, [record(residual=residual) for residual in residuals])
    (panel,) = (axis for title, axis in axes.items() if title.startswith("Residual"))
    assert [text.get_text() for text in panel.texts] == ["Linear, learned"] * labelled


def test_residuals_are_drawn_until_the_run_cools_down():
    records = [record(residual=0.1), record(residual=0.2), record(outer_loss=None)]
    axes = _panels({"linear": [1.0]}, records)["Residual of the solve (0: exact, 1: no better than none)"]
    assert axes.lines[0].get_ydata().tolist() == [0.1, 0.2]
    assert [text.get_text() for text in axes.texts] == ["Linear, learned"]


def test_held_out_scores_are_drawn_for_each_method():
    records = [record(validation_score=score) for score in (1.0, 3.0, 3.5, 4.0)]
    axes = _panels({"stl": [1.0, 2.0], "linear": [1.0, 2.0]}, records)["Held-out score (validation part)"]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1, 3, 3.5, 4]] * 2
    assert {text.get_text() for text in axes.texts} == {"STL", "Linear, learned"}


def test_cost_is_drawn_as_a_ratio_to_equal():
    experiment = noisy_experiment()
    runs = [*runs_of(experiment, {"equal": [1.0]}), *runs_of(experiment, {"linear": [1.0]}, outer_seconds=1.5)]
    figure = draw_sections(results_of(experiment, runs).sections)
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left") == "Time of a run, Equal = 1 (1 s)")
    assert [text.get_text() for text in axes.texts] == ["2.5 (6 products)", "1.0"]
