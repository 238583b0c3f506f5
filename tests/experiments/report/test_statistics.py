import math
from types import SimpleNamespace

import pytest

from auxfast.experiments.report.statistics import (
    better,
    better_everywhere,
    compare,
    estimate,
    paired_difference,
    scores,
)
from auxfast.train.methods import parse_method


def _run(method, seed, score, setting=""):
    result = None if score is None else SimpleNamespace(score=score)
    return SimpleNamespace(method=parse_method(method), seed=seed, setting=setting, result=result)


def test_mean_and_standard_error_by_hand():
    # 2, 4, 9: mean 5; squared deviations 9 + 1 + 16 = 26; variance 26 / 2 = 13; SEM sqrt(13 / 3)
    mean, sem, _ = estimate([2.0, 4.0, 9.0])
    assert mean == 5
    assert sem == pytest.approx(math.sqrt(13 / 3))


def test_the_difference_is_paired_by_seed():
    # differences 1, 2, 3: mean 2, variance 1, SEM sqrt(1 / 3), though both scores spread by tens
    mean, sem, _ = paired_difference({0: 11.0, 1: 52.0, 2: 93.0}, {0: 10.0, 1: 50.0, 2: 90.0})
    assert mean == 2
    assert sem == pytest.approx(math.sqrt(1 / 3))


def test_one_seed_has_no_standard_error():
    only = estimate([3.0])
    assert only == (3.0, None, 1)
    assert str(only) == "3"
    assert only.beyond_noise() is only.above_noise() is None


def test_only_seeds_that_both_have_are_paired():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 0.5, 7: 9.0}) == (1.5, None, 1)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("differences", "beyond"),
    [
        ([1.0, 1.2, 0.8, 1.1, 0.9], True),
        ([1.0, -1.0, 0.3, 0.5, 0.2], False),
        ([-2.0, -2.1, -2.0, -2.1, -2.0], True),
        ([2.0, 2.1, 2.0, 2.1], None),
    ],
)
def test_from_five_seeds_it_is_known_what_is_beyond_noise(differences, beyond):
    assert estimate(differences).beyond_noise() is beyond


def test_scores_are_of_finished_runs_of_one_method_in_one_setting_by_seed():
    runs = [_run("stl", 10, 3.0), _run("stl", 2, 1.0), _run("stl", 3, None), _run("stl", 4, 9.0, "other")]
    assert list(scores([*runs, _run("linear", 5, 8.0)], "stl").items()) == [(2, 1.0), (10, 3.0)]
    assert scores(runs, "stl", "other") == {4: 9.0}
    assert scores(runs, "linear-frozen") == {}


def test_only_seeds_that_both_have_are_compared():
    own = {seed: 5.0 + 0.1 * (seed % 2) for seed in range(6)}
    found = compare("A is above B", {**own, 7: 100.0}, {**dict.fromkeys(range(6), 3.0), 8: 1.0})
    assert found.text == "A is above B: the difference is +2.05 +- 0.02, paired over 6 seeds."
    assert found.holds is True


def test_too_few_seeds_for_a_verdict_are_told():
    few = compare("A is above B", {0: 5.0, 1: 6.1}, {1: 4.0, 0: 3.0})
    assert few == ("A is above B: the difference is +2.05 +- 0.05; not known: 2 seeds, a verdict takes 5.", None)
    assert compare("A is above B", {0: 5.0}, {1: 4.0}).text == "A is above B: not known: 0 seeds, a verdict takes 5."


@pytest.mark.parametrize(
    ("own", "holds"),
    [
        ([1.0, 1.1] * 3, False),
        ([2.0, 4.0, -4.0] * 2, False),
        ([5.0, 5.1] * 3, True),
        ([5.0, 5.1], None),
        ([5.0], None),
        ([], None),
    ],
)
def test_a_claim_holds_if_the_difference_is_positive_and_beyond_noise(own, holds):
    assert compare("claim", dict(enumerate(own)), dict.fromkeys(range(6), 2.0)).holds is holds


def test_methods_are_named_as_in_tables_and_the_setting_is_said():
    runs = [_run(name, seed, score, "few") for seed in (0, 1) for name, score in (("linear", 2.0 + seed), ("stl", 1.0))]
    found = better(runs, "linear", "stl", "few")
    assert found.text.startswith(
        "few: Linear, learned scores above STL (main loss only): the difference is +1.5 +- 0.5"
    )
    assert better(runs, "linear", "stl").holds is None


@pytest.mark.parametrize(
    ("of_b", "holds"), [([2.0, 2.1] * 3, True), ([0.9, 1.2] * 3, False), ([None, 2.0] * 3, None), ([None] * 6, None)]
)
def test_better_everywhere_is_better_in_each_setting(of_b, holds):
    runs = [_run("stl", seed, 1.0, setting) for seed in range(6) for setting in "ab"]
    runs += [_run("linear", seed, 3.0 + 0.1 * (seed % 2), "a") for seed in range(6)]
    runs += [_run("linear", seed, score, "b") for seed, score in enumerate(of_b)]
    found = better_everywhere(runs, "linear", "stl", ["a", "b"])
    assert found.holds is holds
    assert "in every setting; the paired differences are a: +2.05 +- 0.02 (6 seeds); b: " in found.text


def test_one_setting_that_fails_is_enough_for_a_claim_not_to_hold():
    runs = [_run(name, seed, 1.0, "a") for seed in range(5) for name in ("stl", "linear")]
    assert better_everywhere(runs, "linear", "stl", ["a", "b"]).holds is False
