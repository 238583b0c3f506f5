import json
import math

import pytest

from auxfast.train.report import estimate, paired_difference, score_table, write_json


def test_mean_and_standard_error_by_hand():
    # 2, 4, 9: mean 5; squared deviations 9 + 1 + 16 = 26; variance 26 / 2 = 13; SEM sqrt(13 / 3)
    mean, sem = estimate([2.0, 4.0, 9.0])
    assert mean == 5
    assert sem == pytest.approx(math.sqrt(13 / 3))


def test_the_difference_is_paired_by_seed():
    # differences 1, 2, 3: mean 2, variance 1, SEM sqrt(1 / 3), though both scores spread by tens
    mean, sem = paired_difference([11.0, 52.0, 93.0], [10.0, 50.0, 90.0])
    assert mean == 2
    assert sem == pytest.approx(math.sqrt(1 / 3))


def test_one_seed_has_no_standard_error():
    only = estimate([3.0])
    assert only == (3.0, None)
    assert str(only) == "3.0 +- ?"
    assert not only.beyond_noise()


def test_different_numbers_of_seeds_cannot_be_paired():
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("differences", "beyond"), [([1.0, 1.2, 0.8], True), ([1.0, -1.0, 0.3], False), ([-2.0, -2.1], True)]
)
def test_beyond_noise_is_two_standard_errors(differences, beyond):
    assert estimate(differences).beyond_noise() is beyond


def test_the_table_by_hand():
    labels = {"stl": "STL (main loss only)", "new": "New"}
    scores = {"stl": [10.0, 20.0], "new": [12.0, 18.0]}
    assert score_table(labels, scores, ["stl"]).splitlines() == [
        "method                      score  against STL",
        "----------------------------------------------",
        "STL (main loss only)  15.0 +- 5.0             ",
        "New                   15.0 +- 3.0  +0.0 +- 2.0",
    ]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": [1, None]})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    assert list(tmp_path.iterdir()) == [path]
