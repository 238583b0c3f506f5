"""A grid is searched by validation scores, on seeds of its own, before the runs that count."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from train.problems import Noisy, train_config

from auxfast.cli import main
from auxfast.experiments import grid
from auxfast.experiments.base import Axis
from auxfast.experiments.command import plan_runs
from auxfast.experiments.paper import EXPERIMENTS
from auxfast.train import find_runs, parse_method
from auxfast.train.config import RunConfig
from experiments.problems import noisy_experiment

pytest.importorskip("tqdm")


class Contrary(Noisy):
    """A task that is better by its validation score the more features it has, and worse by its test score."""

    def validation_score(self):
        return float(self.inputs.shape[1])

    def score(self):
        return -self.validation_score()


EXPERIMENT = replace(
    noisy_experiment(outer_steps=2, inner_steps=2),
    name="noisy",
    make_task=lambda seed, options, *, hold_out: Contrary(seed, options, hold_out),
    grid=(
        Axis("task.features", (3, 6)),
        Axis("train.outer_optimizer.lr", (0.1, 0.01), ("linear",)),
    ),
)


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "noisy", EXPERIMENT)
    return lambda *more: main(["train", "noisy", "--setting", "", "--out", str(tmp_path / "out"), *more])


def test_each_method_is_trained_with_what_validation_chose(train, tmp_path, capsys):
    assert train("--method", "stl,linear,linear-frozen", "--seeds", "0", "--grid") == 0
    printed, told = capsys.readouterr()
    assert "grid: 6 runs from seed 1000" in printed
    assert "grid: [2/6] stl, task.features = 6: validation score 6" in printed
    assert "score -3" not in told  # the test score of what was not chosen
    assert "grid: stl: task.features = 6 (validation score 6, best of 2)" in printed
    assert "grid: linear: task.features = 6, train.outer_optimizer.lr = 0.1 (validation score 6, best of 4)" in printed
    runs = find_runs([tmp_path / "out"])
    assert {(run.method.name, run.seed, run.config["task"]["features"]) for run in runs} == {
        (method, 0, 6) for method in ("stl", "linear", "linear-frozen")
    }
    assert {run.seed for run in find_runs([tmp_path / "out-grid"])} == {1000}


def test_an_interrupted_search_goes_on_with_resume(train, tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(comparison, run=grid.train_all, **options):
        calls.append(comparison)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(comparison, **options)

    monkeypatch.setattr(grid, "train_all", interrupted)
    assert train("--method", "stl", "--seeds", "0", "--grid", "7") == 130
    before = {run.path: (run.path / "result.json").stat().st_mtime_ns for run in find_runs([tmp_path / "out-grid"])}
    assert len(before) == 1
    assert train("--method", "stl", "--seeds", "0", "--grid", "7") == 1
    assert "holds a run already" in capsys.readouterr().err
    assert train("--method", "stl", "--seeds", "0", "--grid", "7", "--resume") == 0
    after = {run.path: (run.path / "result.json").stat().st_mtime_ns for run in find_runs([tmp_path / "out-grid"])}
    assert len(after) == 2
    assert before.items() <= after.items()


def test_what_was_asked_for_is_not_searched():
    comparison = plan_runs(
        EXPERIMENT, methods=["linear"], settings=[""], seeds=[0], overrides={"task.features": 4}, out=Path("out")
    )
    (candidates,) = grid.plan_search(comparison, [1000]).values()
    assert [candidate.changes for candidate in candidates] == [
        {"train.outer_optimizer.lr": 0.1},
        {"train.outer_optimizer.lr": 0.01},
    ]
    assert {plan.config.task.features for candidate in candidates for plan in candidate.plans} == {4}


def test_the_search_has_a_folder_beside_the_working_directory_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    comparison = plan_runs(EXPERIMENT, methods=["stl"], settings=[""], seeds=[0], out=Path("."))
    ((first, _),) = grid.plan_search(comparison, [1000]).values()
    assert first.plans[0].out == tmp_path.with_name(f"{tmp_path.name}-grid") / "task.features=3"


def test_a_method_that_diverges_with_a_value_is_not_trained_with_it(train, tmp_path, capsys, monkeypatch):
    lrs = (Axis("train.inner_optimizer.lr", (1e30, 0.01)),)
    monkeypatch.setitem(EXPERIMENTS, "noisy", replace(EXPERIMENT, grid=lrs))
    assert train("--method", "stl", "--seeds", "0", "--grid") == 0
    assert "grid: stl: train.inner_optimizer.lr = 0.01 (validation score 4, best of 2)" in capsys.readouterr().out
    only_bad = (Axis("train.inner_optimizer.lr", (1e30, 1e29)),)
    monkeypatch.setitem(EXPERIMENTS, "noisy", replace(EXPERIMENT, grid=only_bad))
    assert main(["train", "noisy", "--setting", "", "--out", str(tmp_path / "b"), "--method", "stl", "--grid"]) == 1
    assert "training diverged with all of the 2 combinations for stl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "grid_seeds", "message"),
    [
        ({"grid": ()}, "1000", "--grid: noisy has no grid"),
        ({}, "0..3", "--grid: got seed 0, which is one of --seeds"),
        ({"grid": (Axis("task.feature", (3, 4)),)}, "1000", "task.feature: no such entry"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_before_training(
    changes, grid_seeds, message, train, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(EXPERIMENTS, "noisy", replace(EXPERIMENT, **changes))
    assert train("--grid", grid_seeds) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_all_numbers_of_inner_steps_train_equally_long():
    config = RunConfig(train_config(outer_steps=100, inner_steps=10, patience=8))
    made = grid.changed(config, {"train.inner_steps": 40}).train
    assert (made.inner_steps, made.outer_steps, made.patience) == (40, 25, 2)


@pytest.mark.parametrize("name", [name for name, experiment in EXPERIMENTS.items() if experiment.grid])
def test_each_value_of_a_shipped_grid_is_one_that_its_experiment_takes(name):
    experiment = EXPERIMENTS[name]
    families = {parse_method(method).family for method in experiment.methods}
    for axis in experiment.grid:
        assert families >= set(axis.families)
        for value in axis.values:
            grid.changed(experiment.config, {axis.key: value})


@pytest.mark.parametrize(
    ("name", "counts"),
    [  # combinations, as appendix B has them
        ("cifar10-labels", {"stl": 1, "maxl-f": 1, "maxl": 18, "auxilearn-labels": 36}),
        ("cub-labels", {"stl": 1, "maxl-f": 1, "maxl": 18, "auxilearn-labels": 72}),
        ("cub-attributes", {"stl": 9, "equal": 9, "dwa": 27, "gradnorm": 27, "gcs": 9, "nonlinear": 36}),
    ],
)
def test_the_paper_s_grids_have_so_many_combinations(name, counts):
    experiment = EXPERIMENTS[name]
    for method, count in counts.items():
        family = parse_method(method).family
        axes = [axis for axis in experiment.grid if not axis.families or family in axis.families]
        assert math.prod(len(axis.values) for axis in axes) == count
