"""Tables and findings, of runs made by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from train.problems import noisy_experiment

from auxfast.experiments.base import Finding
from auxfast.experiments.paper import EXPERIMENTS
from auxfast.experiments.report.rows import (
    describe,
    describe_findings,
    differing_entries,
    findings,
    methods,
    rows,
    sections,
)
from auxfast.train.files import RunError
from auxfast.train.methods import parse_method


@pytest.fixture(autouse=True)
def experiment(monkeypatch):
    made = noisy_experiment()
    monkeypatch.setitem(EXPERIMENTS, made.name, made)
    return made


def _run(experiment, method, seed, score, *, setting="", outer_seconds=0.0, config=None):
    result = SimpleNamespace(score=score, inner_seconds=1.0, outer_seconds=outer_seconds, seconds=1.5)
    records = [SimpleNamespace(matvecs=3 if parse_method(method).learned else None)] * 2
    return SimpleNamespace(
        experiment=experiment.name,
        setting=setting,
        method=parse_method(method),
        seed=seed,
        result=None if score is None else result,
        records=records,
        config=config or experiment.config,
        path=f"runs/{method}/seed-{seed}",
    )


def _runs(experiment, scores, **others):
    return [_run(experiment, m, seed, score, **others) for m, own in scores.items() for seed, score in enumerate(own)]


def test_runs_are_grouped_by_setting_and_unfinished_ones_left_out(experiment):
    runs = [
        *_runs(experiment, {"stl": [1.0, 2.0]}, setting="more features"),
        *_runs(experiment, {"linear": [3.0, None], "stl": [1.0]}),
    ]
    plain, more = sections(runs)
    assert [(plain.setting, len(plain.runs)), (more.setting, len(more.runs))] == [("", 2), ("more features", 2)]
    assert plain.title == "Noisy"
    assert more.title == "Noisy; more features"
    assert [method.name for method in methods(plain)] == ["stl", "linear"]  # the experiment's order


def test_what_cannot_be_reported_is_refused(experiment):
    with pytest.raises(RunError, match="no run is finished"):
        sections(_runs(experiment, {"stl": [None]}))
    with pytest.raises(RunError, match=r"runs/stl/seed-0 and runs/stl/seed-0 are the same run"):
        sections(_runs(experiment, {"stl": [1.0]}) * 2)


def test_rows_by_hand(experiment):
    (section,) = sections(_runs(experiment, {"stl": [10.0, 20.0], "linear": [13.9, 24.1]}, outer_seconds=3.0))
    stl, linear = rows(section)
    assert stl.mean == pytest.approx((15, 5, 2))
    assert linear.mean == pytest.approx((19, 5.1, 2))
    assert stl.differences == {}
    assert linear.differences == {"stl": pytest.approx((4, 0.1, 2))}  # 3.9 and 4.1: mean 4, SEM sqrt(0.02 / 2)
    assert (stl.best, linear.best) == (False, True)  # 4 > 12.7 * 0.1
    assert (linear.inner_seconds, linear.outer_share, linear.matvecs, stl.matvecs) == (1.0, 0.75, 6, 0)


def test_the_best_is_marked_only_beyond_noise(experiment):
    (section,) = sections(_runs(experiment, {"stl": [10.0, 20.0], "equal": [9.0, 9.0], "linear": [13.0, 18.0]}))
    assert not any(row.best for row in rows(section))  # linear - stl: 3 and -2
    (alone,) = sections(_runs(experiment, {"stl": [10.0, 20.0]}))
    assert not rows(alone)[0].best


def test_differences_are_over_the_seeds_that_both_have(experiment):
    runs = _runs(experiment, {"stl": [10.0, 20.0, 90.0]}) + [_run(experiment, "linear", seed, 30.0) for seed in (1, 7)]
    (section,) = sections(runs)
    assert rows(section)[1].differences["stl"] == (10, None, 1)


def test_the_table_by_hand(experiment):
    runs = _runs(experiment, {"stl": [10.0, 20.0], "linear": [13.9, 24.1]}, outer_seconds=3.0)
    assert describe(sections(runs)[0]).splitlines() == [
        "Noisy",
        "method                      score    minus stl  seeds",
        "-----------------------------------------------------",
        "STL (main loss only)  15.0 +- 5.0                   2",
        "Linear, learned       19.0 +- 5.1  +4.0 +- 0.1      2  *",
        "mean +- SEM over seeds; differences are paired; * better than every other beyond noise (paired t test, 5%)",
        "outer steps' share of the training time: linear 75%",
    ]


def test_runs_of_different_configurations_are_told(experiment):
    other = replace(experiment.config, train=replace(experiment.config.train, inner_steps=99))
    runs = [_run(experiment, "stl", 0, 1.0), _run(experiment, "stl", 1, 1.0, config=other)]
    (section,) = sections(runs)
    assert differing_entries(section) == {"train.inner_steps": [3, 99]}
    assert "CAUTION: not all runs have the same train.inner_steps: 3, 99" in describe(section)


def test_a_configuration_that_is_not_the_experiments_is_told(experiment):
    shorter = replace(experiment.config, train=replace(experiment.config.train, outer_steps=3))
    (section,) = sections([_run(experiment, "stl", 0, 1.0, config=shorter)])
    assert "CAUTION: train.outer_steps is 3 here, and 7 in the experiment" in describe(section)
    assert "CAUTION" not in describe(sections([_run(experiment, "stl", 0, 1.0)])[0])


def test_findings_see_the_finished_runs_of_their_experiment(experiment):
    def count(runs):
        return [Finding(f"{len(runs)} runs", None)]

    runs = _runs(experiment, {"stl": [1.0, None]})
    assert findings(replace(experiment, findings=count), runs) == [("1 runs", None)]
    assert findings(experiment, runs) == []
    lines = describe_findings([Finding("a", True), Finding("b", False), Finding("c", None)]).splitlines()
    assert lines == ["holds:         a", "NOT SHOWN:     b", "not known:     c"]
