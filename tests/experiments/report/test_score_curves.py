"""Experiments in several settings: what they say and draw of them."""

import pytest

from auxfast.experiments.paper import missing_labels, sensitivity
from auxfast.experiments.report.plotting import draw_score_curves
from auxfast.train.methods import parse_method
from experiments.paper.handmade import runs_of, unfinished


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
    return figures


@pytest.mark.parametrize("experiment", [sensitivity.SIZE, sensitivity.DEPTH, missing_labels.EXPERIMENT])
def test_each_experiment_draws_a_line_a_method_with_all_settings(experiment, drawn, tmp_path):
    runs = [
        run
        for i, method in enumerate(experiment.methods)
        for j, setting in enumerate(experiment.settings)
        for run in runs_of(method, [80 + i + j, 82 + i + j], setting)
    ]
    experiment.draw(tmp_path / "a.png", [*runs, *unfinished("nonlinear", next(iter(experiment.settings)))])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    settings = len(experiment.settings)
    level, *_ = axes.lines
    assert level.get_ydata() == pytest.approx([81 + (settings - 1) / 2] * 2)  # of STL, whatever the setting
    lines = [container.lines[0] for container in axes.containers]
    for i, line in enumerate(lines, start=1):
        assert line.get_ydata() == pytest.approx([81 + i + j for j in range(settings)])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [parse_method(name).label for name in experiment.methods]
    assert "over 2 seeds" in drawn[0].get_supxlabel()


def test_settings_and_methods_without_runs_are_left_out(drawn, tmp_path):
    runs = [*runs_of("linear", [1.0], "a"), *runs_of("nonlinear", [3.0, 5.0], "b"), *unfinished("equal", "a")]
    words = {"title": "title", "x_label": "x", "y_label": "y", "note": "note"}
    draw_score_curves(tmp_path / "a.png", runs, ("linear", "equal", "nonlinear"), {"a": 0, "b": 10}, **words)
    linear, nonlinear = (container.lines[0] for container in drawn[0].axes[0].containers)
    assert linear.get_ydata() == pytest.approx([1])
    assert nonlinear.get_xdata() == pytest.approx([10], abs=0.2)
    assert nonlinear.get_ydata() == pytest.approx([4])


def test_findings_of_sizes_say_whether_a_large_set_hurts():
    small, large, stl = [92, 91, 93, 92, 92], [89, 89, 90, 89, 90], [93, 92, 94, 93, 93]
    runs = [*runs_of("nonlinear", small, "1 a class"), *runs_of("nonlinear", large, "5 a class")]
    above_stl, above_frozen, hurts = sensitivity.size_findings([*runs, *runs_of("stl", stl, "5 a class")])
    assert above_stl.holds is False
    assert "1 a class: (not known: 0 seeds, a verdict takes 5); 2 a class" in above_stl.text
    assert "5 a class: -3.6 +- 0.2 (5 seeds)." in above_stl.text
    assert above_frozen.holds is None
    assert hurts.holds is True
    assert "the difference is +2.6 +- 0.2, paired over 5 seeds" in hurts.text


def test_findings_of_depths_say_whether_deep_is_better():
    shallow, deep = [92, 91, 91, 92, 91], [92, 90, 90.5, 92, 90]
    runs = [*runs_of("nonlinear", shallow, "1 layer"), *runs_of("nonlinear", deep, "5 layers")]
    above_frozen, deep = sensitivity.depth_findings(runs)
    assert above_frozen.text.startswith("Nonlinear, learned scores above Nonlinear, frozen in every setting")
    assert deep.holds is False
    assert deep.text.startswith("The learned combiner of 5 layers scores above that of 1 layer: the difference is -0.5")


def test_findings_of_missing_labels_say_whether_few_still_help():
    settings = missing_labels.EXPERIMENT.settings
    runs = [
        *(run for i, setting in enumerate(settings) for run in runs_of("nonlinear", [92 - i, 91.6 - i] * 3, setting)),
        *(run for setting in settings for run in runs_of("stl", [88, 87.5] * 3, setting)),
    ]
    equal, above_stl, above_frozen, full = missing_labels.findings(runs)
    assert equal.holds is above_frozen.holds is None
    assert above_stl.holds is True
    assert "all known: +4.05 +- 0.02 (6 seeds); 50% unknown: +3.05 +- 0.02 (6 seeds)" in above_stl.text
    assert full.holds is True
    assert "the difference is +2.0 +- 0.0" in full.text
