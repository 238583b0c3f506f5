"""The suite of benchmarks/learning runs, goes on where it was stopped, and says what was won and lost."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from pages import ROOT

from auxfast.experiments.base import run_config
from auxfast.train.methods import parse_method

pytest.importorskip("sklearn")
# Labels are few on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:the auxiliary set takes:UserWarning")


@pytest.fixture
def suite(monkeypatch):
    """The suite's modules."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.learning import table, tasks

    return SimpleNamespace(table=table, tasks=tasks)


def _run_suite(*arguments):
    command = [sys.executable, "-m", "benchmarks.learning", "--processes", "1", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def _parts(task):
    unlabelled = getattr(task, "unlabelled", torch.tensor([], dtype=torch.int64))
    return task.training, unlabelled, task.auxiliary, task.validation, task.test


def test_tasks_depend_on_their_seed_alone_and_have_disjoint_parts(suite):
    for experiment in suite.tasks.TASKS.values():
        for setting in experiment.settings:
            options = run_config(experiment, setting).task
            first, again = (experiment.make_task(3, options, hold_out=True) for _ in range(2))
            spent = experiment.make_task(3, options, hold_out=False)
            together = torch.cat(_parts(first))
            assert len(together.unique()) == len(together)
            assert torch.equal(spent.training, torch.cat([first.training, first.auxiliary]))
            tensors = [field.name for field in fields(first) if isinstance(getattr(first, field.name), torch.Tensor)]
            assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in tensors)
            losses, mask = first.training_batch(torch.Generator().manual_seed(0))
            assert losses.shape[1] == len(first.loss_names) == len(experiment.loss_names)
            assert mask is None or mask.shape == losses.shape
            assert first.main == 0


def test_all_tasks_have_one_outer_loop(suite):
    configs = [experiment.config for experiment in suite.tasks.TASKS.values()]
    inner = {"outer_steps", "inner_steps", "inner_optimizer", "weight_decay"}
    for field in fields(configs[0].train):
        values = [repr(getattr(config.train, field.name)) for config in configs]
        assert field.name in inner or len(set(values)) == 1
    for config in configs:
        assert config.weighting["equal"]["auxiliary_weight"] == config.combiner.initial_weight


def _run(method, seed, score, *weights):
    records = [SimpleNamespace(loss_weights=w, outer_loss=1.0 - 0.1 * step) for step, w in enumerate(weights)]
    result = None if score is None else SimpleNamespace(score=score)
    method = parse_method(method)
    return SimpleNamespace(
        experiment="wine", setting="", method=method, seed=seed, score=score, result=result, records=records
    )


def test_the_table_pairs_seeds_and_counts_what_was_lost(suite):
    even = (1.0, 1.0, 1.0, 1.0)
    lost, dead = (20.0, 20.0, 0.0, 0.0), (2.0, 0.01, 0.0, 0.0)
    runs = [
        *(_run("nonlinear", seed, 80.0, even, (2.0, 1.0, 0.5, 0.5)) for seed in (0, 2, 4)),
        *(_run("nonlinear", seed, 71.0, even, dead) for seed in (1, 3, 5)),
        _run("nonlinear", 6, None, even, lost),
        *(_run("nonlinear-frozen", seed, score, even, even) for seed, score in enumerate([70.0, 60.9] * 3 + [99.0])),
        *(_run("equal", seed, score, even) for seed, score in enumerate([81.0, 60.0] * 3 + [99.0])),
    ]
    (row,) = suite.table.make_rows(runs)
    assert (row.crashed, row.dead, row.exploded) == ([6], [1, 3, 5], [6])
    assert row.over["frozen"].mean == pytest.approx(10.05)
    assert row.over["frozen"].seeds == 6
    assert (row.sign("frozen"), row.sign("equal")) == (1, 0)
    assert row.over["stl"] is None
    assert row.shares["main"] == pytest.approx((0.5 + 2 / 2.01) / 2)
    assert row.outer_loss == pytest.approx((1.0, 0.9))
    text = suite.table.as_markdown([row])
    assert "**+10.05 +- 0.02**" in text
    assert "below its frozen start in 0 of 1; below Equal in 0 of 1; lost: 1 crashed, 3 dead, 1 exploded." in text


@pytest.mark.slow
def test_the_suite_reads_what_it_has_trained_and_writes_table_and_figures(tmp_path):
    arguments = ("--tasks", "wine", "--methods", "linear-frozen", "linear", "--seeds", 2)
    folders = ("--out", tmp_path / "runs", "--results", tmp_path)
    first = _run_suite(*arguments, *folders)
    results = sorted((tmp_path / "runs").rglob("result.json"))
    times = [path.stat().st_mtime_ns for path in results]
    assert len(results) == 4
    assert _run_suite(*arguments, *folders) == first
    assert [path.stat().st_mtime_ns for path in results] == times
    (figures,) = tmp_path.glob("learning-*.json")
    (row,) = json.loads(figures.read_text())["rows"]
    assert list(row["scores"]["linear"]) == ["0", "1"]
    assert figures.with_suffix(".md").read_text() in first


@pytest.mark.slow
def test_the_smoke_run_goes_through_every_method():
    text = _run_suite("--smoke", "--tasks", "cnn", "breast-cancer")
    assert all(f"| {task} * " in text for task in ("cnn", "breast-cancer"))
    assert text.count(" none |") == 6
