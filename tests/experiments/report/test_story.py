"""The first sentences of a report, of runs made by hand."""

from dataclasses import replace

from auxfast.experiments.report.rows import results_of
from auxfast.experiments.report.story import overall, sentences
from experiments.problems import noisy_experiment
from experiments.report.handmade import runs_of

NOISE = (0.0, 0.1, -0.1, 0.2, -0.2)


def _sections(*scores, seeds=5):
    """One section a dictionary of mean scores by method; each seed has its own noise."""
    for i, means in enumerate(scores):
        experiment = replace(noisy_experiment(), name=("one", "two", "three")[i])
        by_method = {
            method: [mean + (1 + 2 * j) * noise for noise in NOISE[:seeds]]
            for j, (method, mean) in enumerate(means.items())
        }
        (section,) = results_of(experiment, runs_of(experiment, by_method)).sections
        yield section


def test_each_learned_method_is_told_against_its_baselines():
    (section,) = _sections({"stl": 10, "equal": 20, "linear-frozen": 24.01, "linear": 24})
    assert sentences(section) == ["Linear, learned: +14.0 over STL, +4.0 over Equal, no better than its frozen start."]


def test_what_is_worse_is_told_and_what_says_the_same_is_told_once():
    (section,) = _sections({"stl": 24, "equal": 24, "linear": 24, "conv": 20})
    linear, conv = sentences(section)
    assert linear == "Linear, learned: no better than STL and Equal."
    assert conv == "Convolutional, learned: worse than STL and Equal (-4.0)."


def test_below_five_seeds_nothing_is_known():
    (section,) = _sections({"stl": 10, "equal": 20, "linear": 30}, seeds=4)
    assert sentences(section) == ["Linear, learned: against STL and Equal not known: 4 seeds, a verdict takes 5."]


def test_without_a_learned_method_the_others_are_told():
    (section,) = _sections({"stl": 10, "equal": 20})
    assert sentences(section)[1] == "Equal (one common weight): +10.0 over STL."
    (alone,) = _sections({"stl": 10})
    assert sentences(alone) == []


def test_several_sections_are_told_together():
    sections = list(
        _sections({"stl": 1, "equal": 5, "linear": 9}, {"stl": 1, "equal": 9, "linear": 9}, {"stl": 5, "linear": 3})
    )
    assert overall(sections) == [
        "Linear, learned: against STL +8.0 on one and two, worse (-2.0) on three; "
        "against Equal +4.0 on one, no better on two."
    ]
    assert overall(sections[:1]) == []
