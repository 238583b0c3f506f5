"""Runs are recorded: what is in their folders, and what is said of those that cannot be made."""

import errno
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from auxfast.nn import LinearCombiner
from auxfast.solvers import Dense
from auxfast.train import Component, RunError, parse_method, read_config, read_run, record_run, tensorboard
from auxfast.train.recording import check_plans, restore_run
from train.problems import Noisy, NoisyOptions, noisy_plan, without_seconds


def run(out, method="linear", seed=0, *, on_outer_step=None, resume=False, **changes):
    return record_run(noisy_plan(out, method, seed, **changes), resume=resume, on_outer_step=on_outer_step)


def restored(made, plan):
    return restore_run(made, plan.config, plan.make_task)


def test_a_folder_says_everything_of_its_run(tmp_path):
    seen = []
    plan = noisy_plan(tmp_path, "linear", 3, "more features", NoisyOptions(features=6), outer_steps=5)
    made = record_run(plan, on_outer_step=seen.append)
    assert made.path == plan.path == tmp_path / "noisy-regression" / "more-features" / "linear" / "seed-3"
    files = {path.name for path in made.path.iterdir()} - {"tensorboard"}
    assert files == {"checkpoint.pt", "config.json", "environment.json", "metrics.jsonl", "result.json"}
    assert json.loads((made.path / "config.json").read_text())["config"]["train"]["outer_steps"] == 5
    assert made == read_run(made.path)
    assert (made.experiment, made.setting, made.seed) == ("noisy regression", "more features", 3)
    assert made.method == parse_method("linear")
    assert read_config(noisy_plan(tmp_path).config, made) == plan.config
    assert list(made.records) == seen
    assert len(seen) == made.result.outer_steps == 5
    assert made.result.inner_seconds == pytest.approx(sum(record.inner_seconds for record in seen))
    assert made.result.outer_seconds == pytest.approx(sum(record.outer_seconds for record in seen))
    assert made.result.seconds > made.result.inner_seconds + made.result.outer_seconds
    assert not made.result.stopped_early
    assert made.environment["cpu"]["torch threads"] == 1
    task, combiner = restored(made, plan)
    assert isinstance(task, Noisy)
    assert isinstance(combiner, LinearCombiner)
    assert task.score() == made.result.score
    assert combiner.phi.tolist() != [0, 1, 1]


def test_a_run_depends_on_its_seed_and_nothing_else(tmp_path):
    first = run(tmp_path / "a", "nonlinear")
    torch.manual_seed(1234)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again = run(tmp_path / "b", "nonlinear")
    other = run(tmp_path / "b", "nonlinear", 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert without_seconds(again.records) == without_seconds(first.records)
    assert again.result.score == first.result.score
    assert without_seconds(other.records) != without_seconds(first.records)


def test_the_number_of_threads_is_the_configuration_s_and_comes_back(tmp_path):
    torch.set_num_threads(2)
    seen = []
    run(tmp_path, on_outer_step=lambda _: seen.append(torch.get_num_threads()), outer_steps=1)
    assert seen == [1]
    assert torch.get_num_threads() == 2


def test_frozen_combiners_stay_and_fixed_ones_are_the_learned(tmp_path):
    learned, _ = (run(tmp_path, "linear", seed) for seed in (2, 11))
    frozen, fixed = run(tmp_path, "linear-frozen", 5), run(tmp_path, "linear-fixed", 5)
    assert {record.phi for record in frozen.records} == {(0.0, 1.0, 1.0)}
    _, combiner = restored(learned, noisy_plan(tmp_path, "linear", 2))
    assert {record.phi for record in fixed.records} == {tuple(combiner.phi.tolist())}


def test_a_fixed_combiner_needs_a_learned_one(tmp_path):
    message = rf"linear-fixed takes phi from linear, of which {tmp_path} has no finished run"
    with pytest.raises(RunError, match=message):
        run(tmp_path, "linear-fixed")
    assert not any(tmp_path.iterdir())
    fixed, learned = noisy_plan(tmp_path, "linear-fixed"), noisy_plan(tmp_path, "linear", 3)
    with pytest.raises(RunError, match=message):
        check_plans([noisy_plan(tmp_path, "linear", setting="another"), fixed])
    check_plans([learned, fixed])
    record_run(learned)
    (learned.path.parent / "seed-of-mine").mkdir()
    (learned.path.parent / "seed-of-mine" / "result.json").touch()
    check_plans([fixed])


def test_a_run_that_stops_early_is_scored_at_its_best(tmp_path):
    stopped = run(tmp_path, patience=2, outer_steps=60)
    scores = [record.validation_score for record in stopped.records]
    assert stopped.result.stopped_early
    assert stopped.result.outer_steps == len(scores) == scores.index(max(scores)) + 3
    assert stopped.result.validation_score == max(scores)
    assert restored(stopped, noisy_plan(tmp_path, patience=2))[0].validation_score() == max(scores)


class Writer:
    """Stands in for TensorBoard's SummaryWriter."""

    made: ClassVar[list["Writer"]] = []

    def __init__(self, path, purge_step):
        self.path, self.purge_step, self.scalars = path, purge_step, []
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass


def test_scalars_are_written_for_tensorboard_if_that_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    assert not (run(tmp_path / "without").path / "tensorboard").exists()
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    made = run(tmp_path / "with")
    (writer,) = Writer.made
    assert (writer.path, writer.purge_step) == (made.path / "tensorboard", 0)
    assert ("training_loss", made.records[3].training_loss, 3) in writer.scalars
    assert ("loss_weights/first", made.records[6].loss_weights[1], 6) in writer.scalars
    assert ("validation_score", made.records[3].validation_score, 3) in writer.scalars
    run(tmp_path / "with", "stl")
    assert "outer_loss" not in {name for name, _, _ in Writer.made[1].scalars}


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_another_run_is_not_overwritten(tmp_path):
    made = run(tmp_path)
    message = rf"{made.path} holds a run already: --resume \(resume=True\) goes on with it; or choose another"
    with pytest.raises(RunError, match=message):
        run(tmp_path)
    with pytest.raises(RunError, match=message):
        check_plans([noisy_plan(tmp_path, "stl"), noisy_plan(tmp_path)])
    check_plans([noisy_plan(tmp_path)], resume=True)
    assert read_run(made.path) == made


def test_a_loss_that_is_not_finite_keeps_what_was_saved(tmp_path):
    steps = []

    def explode(record):
        steps.append(record.step)
        if record.step == 4:
            with torch.no_grad():
                task.model[0].weight.fill_(math.inf)

    task = Noisy(0, NoisyOptions(), hold_out=True)
    plan = noisy_plan(tmp_path, "stl", inner_optimizer=Component("SGD", {"lr": 0.01}), outer_steps=30)
    with pytest.raises(
        RunError, match=r"^noisy regression, stl, seed 0: the training loss is nan at outer step 5: try"
    ):
        record_run(replace(plan, make_task=lambda: task), on_outer_step=explode)
    kept = read_run(tmp_path / "noisy-regression" / "stl" / "seed-0")
    assert len(kept.records) == 5
    assert kept.result is None
    assert (kept.path / "checkpoint.pt").exists()


def test_an_out_that_is_a_file_is_named_before_training(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(RunError, match=rf"cannot write {tmp_path / 'out'}.*: Not a directory"):
        run(tmp_path / "out", on_outer_step=lambda _: pytest.fail("training started"))


@pytest.mark.parametrize("suffix", ["metrics.jsonl", "checkpoint.pt.partial"])
def test_with_the_disk_full_what_was_saved_is_kept(tmp_path, monkeypatch, suffix):
    opened = Path.open

    def full(path, mode="r", *arguments, **more):
        if path.name == suffix and mode != "rb":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, mode, *arguments, **more)

    def fill(record):
        if record.step == 3:  # checkpoints are after every second
            monkeypatch.setattr(Path, "open", full)

    with pytest.raises(
        RunError, match=rf"cannot write .*{suffix}: No space left on device; what was saved before is kept"
    ):
        run(tmp_path, on_outer_step=fill)
    monkeypatch.undo()
    reference = run(tmp_path / "other")
    again = run(tmp_path, resume=True)
    assert without_seconds(again.records) == without_seconds(reference.records)


def test_a_configuration_that_no_table_can_hold_is_refused_before_training(tmp_path):
    @dataclass(frozen=True)
    class OwnSolver(Dense):
        pass

    with pytest.raises(ValueError, match=r"train\.solver\.name: got 'OwnSolver', must be one of"):
        run(tmp_path, solver=OwnSolver(), on_outer_step=lambda _: pytest.fail("training started"))
    assert not any(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=r"train\.device: this machine has no 'cuda:63'"):
        run(tmp_path, device="cuda:63")


# --------------------------------------------------------------------------------------- what training cannot survive


def test_a_run_whose_parameters_are_not_finite_saves_nothing_of_them(tmp_path):
    far = {"outer_steps": 1, "inner_steps": 1, "inner_optimizer": Component("SGD", {"lr": 1e38, "momentum": 0.9})}
    with pytest.raises(RunError, match="the parameters are not finite, with 1 outer steps done: try a smaller lr"):
        run(tmp_path, "stl", **far)
    assert not list(tmp_path.rglob("result.json"))
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_what_cannot_be_trained_says_so_and_is_not_in_the_way_of_what_can(tmp_path):
    with pytest.raises(RunError, match=r"noisy regression, conv, seed 0 cannot be trained: ValueError: losses must be"):
        run(tmp_path, "conv")
    with pytest.raises(RunError, match="cannot be trained: ValueError: Muon"):
        run(tmp_path, "stl", inner_optimizer=Component("Muon"))
    with pytest.raises(RunError, match="cannot be trained: AssertionError: If capturable=True, "):
        run(tmp_path, "stl", inner_optimizer=Component("Adam", {"capturable": True}))
    assert run(tmp_path, "stl").result is not None


def test_a_combiner_of_images_says_that_it_needs_them(tmp_path):
    with pytest.raises(
        RunError,
        match=r"losses must be images, \(batch, num_losses, height, width\), for the combiner conv, and this "
        r"task's are \(16, 3\): choose another one",
    ):
        run(tmp_path, "conv")


def test_a_fixed_phi_comes_from_a_run_of_the_same_configuration_and_says_which(tmp_path):
    run(tmp_path, "linear", 3)
    fixed = run(tmp_path, "linear-fixed", 4)
    assert json.loads((fixed.path / "config.json").read_text())["phi from"] == "seed-3"
    run(tmp_path, "linear", 1)
    assert run(tmp_path, "linear-fixed", 4, resume=True).result == fixed.result
    for name in ("result.json", "checkpoint.pt"):
        (fixed.path / name).unlink()
    again = run(tmp_path, "linear-fixed", 4, resume=True)  # it begins again, with the phi of today's first seed
    assert again.records[0].phi != fixed.records[0].phi
    assert json.loads((fixed.path / "config.json").read_text())["phi from"] == "seed-1"
    with pytest.raises(RunError, match=r"linear-fixed takes phi from .*seed-1, which has another configuration"):
        run(tmp_path, "linear-fixed", 5, inner_steps=2)
