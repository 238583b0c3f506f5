"""Tables and findings, of runs made by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from auxfast.experiments.base import Finding
from auxfast.experiments.report.page import write_report
from auxfast.experiments.report.rows import describe, differing_entries, methods, results_of, rows
from auxfast.train import Run, RunError, parse_method
from auxfast.train.serialization import to_table
from experiments.problems import noisy_experiment


@pytest.fixture
def experiment():
    return noisy_experiment()


def _run(experiment, method, seed, score, *, setting="", outer_seconds=0.0, config=None):
    result = SimpleNamespace(score=score, inner_seconds=1.0, outer_seconds=outer_seconds, seconds=1.5)
    return Run(
        path=Path(f"runs/{method}/seed-{seed}"),
        experiment=experiment.name,
        setting=setting,
        method=parse_method(method),
        seed=seed,
        config=to_table(config or experiment.config),
        records=[SimpleNamespace(matvecs=3 if parse_method(method).learned else None)] * 2,
        result=None if score is None else result,
        environment={},
    )


def _runs(experiment, scores, **others):
    return [_run(experiment, m, seed, score, **others) for m, own in scores.items() for seed, score in enumerate(own)]


def _section(experiment, runs):
    (section,) = results_of(experiment, runs).sections
    return section


def test_runs_are_grouped_by_setting_and_unfinished_ones_left_out(experiment):
    runs = [
        *_runs(experiment, {"stl": [1.0, 2.0]}, setting="more features"),
        *_runs(experiment, {"linear": [3.0, None], "stl": [1.0]}),
    ]
    found = results_of(experiment, runs)
    plain, more = found.sections
    assert [(plain.setting, len(plain.runs)), (more.setting, len(more.runs))] == [("", 2), ("more features", 2)]
    assert plain.title == "Noisy"
    assert more.title == "Noisy; more features"
    assert [method.name for method in methods(plain)] == ["stl", "linear"]  # the experiment's order
    assert (len(found.runs), found.unfinished) == (4, 1)


def test_what_cannot_be_reported_is_refused(experiment, tmp_path):
    with pytest.raises(RunError, match="no run is finished"):
        write_report([results_of(experiment, _runs(experiment, {"stl": [None]}))], tmp_path / "page.html")
    with pytest.raises(RunError, match=r"runs/stl/seed-0 and runs/stl/seed-0 are the same run"):
        results_of(experiment, _runs(experiment, {"stl": [1.0]}) * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "fewer"}, "noisy regression has no setting 'fewer'"),
        ({"config": {"task": {"shots": 3}}}, "task.shots: no such entry"),
    ],
)
def test_a_run_that_does_not_fit_its_experiment_any_more_is_named(experiment, changes, message):
    run = replace(_run(experiment, "stl", 0, 1.0), **changes)
    with pytest.raises(RunError, match=f"stl/seed-0/config.json does not describe a run of this version: {message}"):
        results_of(experiment, [run])


def test_rows_by_hand(experiment):
    section = _section(experiment, _runs(experiment, {"stl": [10.0, 20.0], "linear": [13.9, 24.1]}, outer_seconds=3.0))
    stl, linear = rows(section)
    assert stl.mean == pytest.approx((15, 5, 2))
    assert linear.mean == pytest.approx((19, 5.1, 2))
    assert stl.differences == {}
    assert linear.differences == {"stl": pytest.approx((4, 0.1, 2))}  # 3.9 and 4.1: mean 4, SEM sqrt(0.02 / 2)
    assert (stl.best, linear.best) == (False, True)  # 4 > 12.7 * 0.1
    assert (linear.inner_seconds, linear.outer_share, linear.matvecs, stl.matvecs) == (1.0, 0.75, 6, 0)


def test_the_best_is_marked_only_beyond_noise(experiment):
    scores = {"stl": [10.0, 20.0], "equal": [9.0, 9.0], "linear": [13.0, 18.0]}
    assert not any(row.best for row in rows(_section(experiment, _runs(experiment, scores))))  # linear - stl: 3 and -2
    alone = _section(experiment, _runs(experiment, {"stl": [10.0, 20.0]}))
    assert not rows(alone)[0].best


def test_differences_are_over_the_seeds_that_both_have(experiment):
    runs = _runs(experiment, {"stl": [10.0, 20.0, 90.0]}) + [_run(experiment, "linear", seed, 30.0) for seed in (1, 7)]
    assert rows(_section(experiment, runs))[1].differences["stl"] == (10, None, 1)


def test_the_table_by_hand(experiment):
    runs = _runs(experiment, {"stl": [10.0, 20.0], "linear": [13.9, 24.1]}, outer_seconds=3.0)
    assert describe(results_of(experiment, runs)).splitlines() == [
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
    assert differing_entries(_section(experiment, runs)) == {"train.inner_steps": [3, 99]}
    assert "CAUTION: not all runs have the same train.inner_steps: 3, 99" in describe(results_of(experiment, runs))


def test_a_configuration_that_is_not_the_experiments_is_told(experiment):
    shorter = replace(experiment.config, train=replace(experiment.config.train, outer_steps=3))
    changed = describe(results_of(experiment, [_run(experiment, "stl", 0, 1.0, config=shorter)]))
    assert "CAUTION: train.outer_steps is 3 here, and 7 in the experiment" in changed
    assert "CAUTION" not in describe(results_of(experiment, [_run(experiment, "stl", 0, 1.0)]))


def test_a_run_that_is_older_than_an_entry_has_the_experiments_value(experiment):
    older = _run(experiment, "stl", 0, 1.0)
    del older.config["train"]["threads"], older.config["task"]["features"]
    found = results_of(experiment, [older, _run(experiment, "stl", 1, 1.0)])
    assert "CAUTION" not in describe(found)
    assert found.runs[0].config["task"]["features"] == 4


def test_findings_see_the_finished_runs(experiment):
    def count(runs):
        return [Finding(f"{len(runs)} runs", None), Finding("a", True), Finding("b", False)]

    runs = _runs(experiment, {"stl": [1.0, None]})
    counted = results_of(replace(experiment, findings=count), runs)
    assert counted.findings[0] == ("1 runs", None)
    assert results_of(experiment, runs).findings == []
    assert describe(counted).splitlines()[-3:] == ["not known:     1 runs", "holds:         a", "NOT SHOWN:     b"]


def test_unfinished_runs_are_told_with_their_seeds_and_how_to_finish_them(experiment):
    runs = [
        *_runs(experiment, {"linear": [3.0, None, None], "stl": [1.0]}),
        *_runs(experiment, {"stl": [None]}, setting="more features"),
    ]
    assert describe(results_of(experiment, runs)).endswith(
        "\n\nleft out: 3 unfinished runs of noisy regression (linear: seeds 1, 2; more features, stl: seed 0); the "
        "same `auxfast train` with --resume goes on from there"
    )
    assert "unfinished" not in describe(results_of(experiment, runs[:1]))
