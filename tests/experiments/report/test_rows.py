"""Tables and findings, of runs made by hand."""

import csv
import re
from dataclasses import replace

import pytest

from auxfast.experiments.base import Axis, Finding
from auxfast.experiments.report.export import write_csv
from auxfast.experiments.report.page import write_report
from auxfast.experiments.report.rows import cautions, differing_entries, methods, results_of, rows
from auxfast.experiments.report.text import describe
from auxfast.train import RunError
from auxfast.train.serialization import override
from experiments.problems import noisy_experiment
from experiments.report.handmade import record, run_of, runs_of


@pytest.fixture
def experiment():
    return noisy_experiment()


def _section(experiment, runs):
    (section,) = results_of(experiment, runs).sections
    return section


def test_runs_are_grouped_by_setting_and_unfinished_ones_left_out(experiment):
    runs = [
        *runs_of(experiment, {"stl": [1.0, 2.0]}, setting="more features"),
        *runs_of(experiment, {"linear": [3.0, None], "stl": [1.0]}),
    ]
    found = results_of(experiment, runs)
    plain, more = found.sections
    assert [(plain.setting, len(plain.runs)), (more.setting, len(more.runs))] == [("", 2), ("more features", 2)]
    assert plain.title == "Noisy"
    assert more.title == "Noisy; more features"
    assert [method.name for method in methods(plain)] == ["stl", "linear"]  # the experiment's order
    assert (len(found.runs), found.unfinished) == (4, 1)


def test_methods_beyond_the_experiment_s_follow_by_families_and_each_control_before_its_learned_one(experiment):
    named = ("nonlinear-free", "nonlinear", "nonlinear-fixed", "nonlinear-frozen", "equal", "stl")
    found = methods(_section(experiment, runs_of(experiment, {name: [1.0] for name in named})))
    order = ["stl", "equal", "nonlinear-frozen", "nonlinear", "nonlinear-fixed", "nonlinear-free"]
    assert [method.name for method in found] == order


def test_what_cannot_be_reported_is_refused(experiment, tmp_path):
    with pytest.raises(RunError, match="no run is finished"):
        write_report([results_of(experiment, runs_of(experiment, {"stl": [None]}))], tmp_path / "page.html")
    with pytest.raises(RunError, match=r"runs/stl/seed-0 and runs/stl/seed-0 are the same run"):
        results_of(experiment, runs_of(experiment, {"stl": [1.0]}) * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "fewer"}, "noisy regression has no setting 'fewer'"),
        ({"config": {"task": {"shots": 3}}}, "task.shots: no such entry"),
    ],
)
def test_a_run_that_does_not_fit_its_experiment_any_more_is_named(experiment, changes, message):
    run = replace(run_of(experiment, "stl", 0, 1.0), **changes)
    with pytest.raises(RunError, match=f"stl/seed-0/config.json does not describe a run of this version: {message}"):
        results_of(experiment, [run])


def test_rows_by_hand(experiment):
    scores = {"stl": [10.0, 20.0, 15.0, 15.0, 15.0], "linear": [13.9, 24.1, 19.0, 19.0, 19.0]}
    section = _section(experiment, runs_of(experiment, scores, outer_seconds=3.0))
    stl, linear = rows(section)
    assert stl.mean == pytest.approx((15, 2.5**0.5, 5))  # variance 50 / 4, over 5
    assert linear.mean.mean == pytest.approx(19)
    assert stl.differences == {}
    # 3.9, 4.1 and three times 4: mean 4, variance 0.02 / 4, SEM sqrt(0.005 / 5)
    assert linear.differences == {"stl": pytest.approx((4, 0.001**0.5, 5))}
    assert (stl.best, linear.best) == (False, True)
    assert (linear.inner_seconds, linear.outer_share, linear.matvecs, stl.matvecs) == (1.0, 0.75, 6, 0)


def test_the_best_is_marked_only_beyond_noise_and_from_five_seeds(experiment):
    scores = {"stl": [10.0, 20.0] * 3, "equal": [9.0] * 6, "linear": [13.0, 18.0] * 3}  # linear - stl: 3 and -2
    assert not any(row.best for row in rows(_section(experiment, runs_of(experiment, scores))))
    clear = {"stl": [10.0, 10.1, 10.0, 10.1, 10.0], "linear": [20.0] * 5}
    assert [row.best for row in rows(_section(experiment, runs_of(experiment, clear)))] == [False, True]
    few = {method: own[:4] for method, own in clear.items()}
    assert not any(row.best for row in rows(_section(experiment, runs_of(experiment, few))))
    alone = _section(experiment, runs_of(experiment, {"stl": [10.0, 20.0]}))
    assert not rows(alone)[0].best


def test_differences_are_over_the_seeds_that_both_have(experiment):
    runs = runs_of(experiment, {"stl": [10.0, 20.0, 90.0]}) + [
        run_of(experiment, "linear", seed, 30.0) for seed in (1, 7)
    ]
    assert rows(_section(experiment, runs))[1].differences["stl"] == (10, None, 1)


def test_differences_to_the_own_frozen_start_are_a_combiners(experiment):
    scores = {"linear-frozen": [1.0], "linear": [2.0], "nonlinear-frozen": [9.0], "linear-fixed": [3.0]}
    of_frozen = {row.method.name: row.differences for row in rows(_section(experiment, runs_of(experiment, scores)))}
    assert of_frozen == {
        "linear": {"frozen": (1, None, 1)},
        "linear-fixed": {"frozen": (2, None, 1)},
        "linear-frozen": {},
        "nonlinear-frozen": {},
    }


def test_the_table_by_hand(experiment):
    scores = {"stl": [10.0, 20.0, 15.0, 15.0, 15.0], "linear": [13.5, 24.5, 19.0, 19.0, 19.0]}
    runs = [
        *runs_of(experiment, {"stl": scores["stl"]}),
        *runs_of(experiment, {"linear": scores["linear"]}, outer_seconds=3.0),
    ]
    assert describe(results_of(experiment, runs)).splitlines() == [
        "Noisy",
        "Linear, learned: +4.0 over STL.",
        "",
        "method                      score    minus stl  time / stl  seeds",
        "-----------------------------------------------------------------",
        "STL (main loss only)  15.0 +- 1.6                      1.0      5",
        "Linear, learned       19.0 +- 1.7  +4.0 +- 0.2         4.0      5  *",
        "mean +- SEM over seeds; differences are paired; * better than every other beyond noise (paired t test, 5%)",
        "outer steps' share of the training time: linear 75%",
    ]


def test_further_scores_have_columns_of_their_own_in_table_and_file(experiment, tmp_path):
    runs = [
        run_of(experiment, "linear", 0, 70.0, further_scores={"top-3 accuracy, %": 88.0}),
        run_of(experiment, "linear", 1, 72.0, further_scores={"top-3 accuracy, %": 89.0}),
        run_of(experiment, "stl", 0, 60.0),  # of a version that knew none
    ]
    results = results_of(experiment, runs)
    text = describe(results)
    assert re.search(r"score +minus stl +top-3 accuracy, % +time / stl", text)
    assert re.search(r"Linear, learned +71\.0 \+- 1\.0 +\+10 +88\.5 \+- 0\.5", text)
    write_csv([results], tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert [row["further_scores.top-3 accuracy, %"] for row in csv.DictReader(file)] == ["88.0", "89.0", ""]


def test_time_is_a_ratio_to_equal(experiment):
    runs = [
        *runs_of(experiment, {"stl": [1.0], "equal": [1.0]}),
        *runs_of(experiment, {"linear": [1.0]}, outer_seconds=1.5),
    ]
    lines = describe(results_of(experiment, runs)).splitlines()
    titles, _, *cells = lines[3 : 3 + 5]
    assert titles.endswith("time / equal  seeds")
    assert [line.split()[-2] for line in cells] == ["1.0", "2.5", "1.0"]  # the experiment's methods come first


def test_what_validation_took_is_told(experiment):
    runs = runs_of(experiment, {"stl": [1.0]})
    runs[0].records[:] = [record(False, 0.0, validation_seconds=0.05)] * 2
    assert "validation scores took 10.0% on top of the training time" in describe(results_of(experiment, runs))


def test_runs_of_different_configurations_are_told(experiment):
    other = replace(experiment.config, train=replace(experiment.config.train, inner_steps=99))
    runs = [run_of(experiment, "stl", 0, 1.0), run_of(experiment, "stl", 1, 1.0, config=other)]
    assert differing_entries(_section(experiment, runs)) == {"train.inner_steps": [3, 99]}
    assert "CAUTION: not all runs have the same train.inner_steps: 3, 99" in describe(results_of(experiment, runs))


def test_what_a_search_has_chosen_for_each_method_is_said_and_is_no_caution(experiment):
    experiment = replace(experiment, grid=[Axis("train.inner_steps", (3, 6))])
    of_linear = override(experiment.config, {"train.inner_steps": 6, "train.outer_steps": 50})
    runs = [
        *runs_of(experiment, {"stl": [1.0], "equal": [1.0]}),
        *runs_of(experiment, {"linear-frozen": [1.0], "linear": [1.0]}, config=of_linear),
    ]
    told = describe(results_of(experiment, runs))
    steps, base = experiment.config.train.inner_steps, "is each method's own, as a search chooses it: stl"
    assert f"train.inner_steps {base} {steps}, equal {steps}, linear 6" in told
    assert f"train.outer_steps {base}" in told
    assert "CAUTION" not in told
    runs.append(run_of(experiment, "linear", 1, 1.0))  # two values for one method are no choice
    assert "CAUTION: not all runs have the same train.inner_steps" in describe(results_of(experiment, runs))


def test_a_configuration_that_is_not_the_experiments_is_told(experiment):
    shorter = replace(experiment.config, train=replace(experiment.config.train, outer_steps=3))
    changed = describe(results_of(experiment, [run_of(experiment, "stl", 0, 1.0, config=shorter)]))
    assert "CAUTION: train.outer_steps is 3 here, and 7 in the experiment" in changed
    assert "CAUTION" not in describe(results_of(experiment, [run_of(experiment, "stl", 0, 1.0)]))


def test_a_run_that_is_older_than_an_entry_has_the_experiments_value(experiment):
    older = run_of(experiment, "stl", 0, 1.0)
    del older.config["train"]["threads"], older.config["task"]["features"]
    found = results_of(experiment, [older, run_of(experiment, "stl", 1, 1.0)])
    assert "CAUTION" not in describe(found)
    assert found.runs[0].config["task"]["features"] == 4


def test_findings_see_the_finishedruns_of(experiment):
    def count(runs):
        return [Finding(f"{len(runs)} runs", None), Finding("a", True), Finding("b", False)]

    runs = runs_of(experiment, {"stl": [1.0, None]})
    few = results_of(replace(experiment, findings=count), runs)
    assert few.findings[0] == ("1 runs", None)
    assert few.findings[1] == ("a (not known: 1 seed, a verdict takes 5)", None)
    assert results_of(experiment, runs).findings == []
    enough = results_of(replace(experiment, findings=count), runs_of(experiment, {"stl": [1.0] * 5}))
    assert describe(enough).splitlines()[-3:] == ["not known:     5 runs", "holds:         a", "NOT SHOWN:     b"]


def test_unfinished_runs_are_told_with_their_seeds_and_how_to_finish_them(experiment):
    runs = [
        *runs_of(experiment, {"linear": [3.0, None, None], "stl": [1.0]}),
        *runs_of(experiment, {"stl": [None]}, setting="more features"),
    ]
    assert describe(results_of(experiment, runs)).endswith(
        "\n\nleft out: 3 unfinished runs of noisy regression (linear: seeds 1, 2; more features, stl: seed 0); the "
        "same `auxfast train` with --resume goes on from there"
    )
    assert "unfinished" not in describe(results_of(experiment, runs[:1]))


def test_runs_of_other_losses_are_no_results_of_one_experiment(experiment):
    first, second = runs_of(experiment, {"stl": [1.0, 2.0]})
    pair = [replace(first, losses=("main", "help")), replace(second, losses=("main", "harm"))]
    with pytest.raises(RunError, match=r"other losses \(main, help, and main, harm\): report them apart"):
        results_of(experiment, pair)


def test_runs_of_experiments_in_several_places_are_told(experiment):
    first, second = runs_of(experiment, {"stl": [1.0, 2.0]})
    first = replace(first, origin="a.py:MINE")
    told = "in several places, which may not be the same: a.py:MINE, b.py:MINE"
    for other, seen in ((replace(second, origin="b.py:MINE"), True), (second, False)):
        assert any(told in text for text in cautions(_section(experiment, [first, other]))) is seen
