"""Run folders: what is in them, and what is said of those that cannot be made or read."""

import errno
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from auxfast.experiments import RunFolder, find_runs, train_run
from auxfast.experiments.paper import EXPERIMENTS
from auxfast.experiments.run_folder import metrics_line
from auxfast.nn import LinearCombiner
from auxfast.train import Component, RunError, parse_method, tensorboard
from train.problems import Noisy, NoisyOptions, noisy_experiment

EXPERIMENT = noisy_experiment()


def run(out: Path, method: str = "linear", seed: int = 0, setting: str = "", experiment=EXPERIMENT, **arguments):
    return train_run(experiment, setting, parse_method(method), seed, out, **arguments)


def without_seconds(records):
    return [record._replace(inner_seconds=0.0, outer_seconds=0.0) for record in records]


def test_a_folder_says_everything_of_its_run(tmp_path):
    seen = []
    made = run(tmp_path, "linear", 3, "more features", overrides={"train.outer_steps": 5}, on_outer_step=seen.append)
    assert made.path == tmp_path / "noisy-regression" / "more-features" / "linear" / "seed-3"
    files = {path.name for path in made.path.iterdir()} - {"tensorboard"}
    assert files == {"checkpoint.pt", "config.json", "environment.json", "metrics.jsonl", "result.json"}
    assert json.loads((made.path / "config.json").read_text())["config"]["train"]["outer_steps"] == 5
    for folder in (made, RunFolder(made.path, EXPERIMENT)):
        assert (folder.experiment, folder.setting, folder.seed) == ("noisy regression", "more features", 3)
        assert folder.method == parse_method("linear")
        assert folder.config.task == NoisyOptions(features=6)
        assert folder.records == seen
        assert len(seen) == folder.result.outer_steps == 5
        assert folder.result.inner_seconds == pytest.approx(sum(record.inner_seconds for record in seen))
        assert folder.result.outer_seconds == pytest.approx(sum(record.outer_seconds for record in seen))
        assert folder.result.seconds > folder.result.inner_seconds + folder.result.outer_seconds
        assert not folder.result.stopped_early
        assert folder.environment["cpu"]["torch threads"] == 1
    task, combiner = made.restore()
    assert isinstance(task, Noisy)
    assert isinstance(combiner, LinearCombiner)
    assert task.score() == made.result.score
    assert combiner.phi.tolist() != [0, 1, 1]


def test_a_run_depends_on_its_seed_and_nothing_else(tmp_path):
    first = run(tmp_path / "a", "nonlinear")
    torch.manual_seed(1234)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again = run(tmp_path / "b", "nonlinear")
    other = run(tmp_path / "b", "nonlinear", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert without_seconds(again.records) == without_seconds(first.records)
    assert again.result.score == first.result.score
    assert without_seconds(other.records) != without_seconds(first.records)


def test_the_number_of_threads_is_the_configuration_s_and_comes_back(tmp_path):
    torch.set_num_threads(2)
    seen = []
    run(tmp_path, on_outer_step=lambda _: seen.append(torch.get_num_threads()), overrides={"train.outer_steps": 1})
    assert seen == [1]
    assert torch.get_num_threads() == 2


def test_weightings_train_on_the_auxiliary_set_too(tmp_path):
    held = {method: run(tmp_path, method).restore()[0].training.numel() for method in ("linear-frozen", "stl")}
    assert held == {"linear-frozen": 40, "stl": 60}


def test_frozen_combiners_stay_and_fixed_ones_are_the_learned(tmp_path):
    learned, _ = (run(tmp_path, "linear", seed) for seed in (2, 11))
    frozen, fixed = run(tmp_path, "linear-frozen", 5), run(tmp_path, "linear-fixed", 5)
    assert {record.phi for record in frozen.records} == {(0.0, 1.0, 1.0)}
    assert {record.phi for record in fixed.records} == {tuple(learned.restore()[1].phi.tolist())}


def test_a_fixed_combiner_needs_a_learned_one(tmp_path):
    with pytest.raises(RunError, match=rf"linear-fixed takes phi from linear, of which {tmp_path} has no finished run"):
        run(tmp_path, "linear-fixed")
    assert not any(tmp_path.iterdir())


def test_early_stopping(tmp_path):
    stopped = run(tmp_path, overrides={"train.patience": 2, "train.outer_steps": 60})
    scores = [record.validation_score for record in stopped.records]
    assert stopped.result.stopped_early
    assert stopped.result.outer_steps == len(scores) == scores.index(max(scores)) + 3
    assert stopped.result.validation_score == max(scores)
    assert stopped.restore()[0].validation_score() == max(scores)


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    made = run(tmp_path)
    record = made.records[0]._replace(residual=math.inf, loss_weights=(math.nan, 1.0, 2.0))
    (made.path / "metrics.jsonl").write_bytes(metrics_line(record))
    (read,) = RunFolder(made.path, EXPERIMENT).records
    assert read.residual is None
    assert math.isnan(read.loss_weights[0])
    assert read.loss_weights[1:] == (1.0, 2.0)


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


def test_scalars_for_tensorboard_if_that_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    assert not (run(tmp_path / "without").path / "tensorboard").exists()
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    made = run(tmp_path / "with")
    (writer,) = Writer.made
    assert (writer.path, writer.purge_step) == (made.path / "tensorboard", 0)
    assert ("training_loss", made.records[3].training_loss, 3) in writer.scalars
    assert ("loss_weights/first", made.records[6].loss_weights[1], 6) in writer.scalars
    assert "validation_score" not in {name for name, _, _ in writer.scalars}


def test_runs_are_found_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, EXPERIMENT.name, EXPERIMENT)
    for seed in (10, 2):
        run(tmp_path, "stl", seed)
    run(tmp_path, "equal", 2)
    found = find_runs([tmp_path, tmp_path / "noisy-regression" / "stl"])
    assert [(folder.method.name, folder.seed) for folder in found] == [("equal", 2), ("stl", 2), ("stl", 10)]
    with pytest.raises(RunError, match=f"there is no {tmp_path / 'x'}"):
        find_runs([tmp_path / "x"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=f"no runs in {tmp_path / 'empty'}"):
        find_runs([tmp_path / "empty"])


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_another_run_is_not_overwritten(tmp_path):
    made = run(tmp_path)
    with pytest.raises(
        RunError, match=rf"{made.path} holds a run already: --resume goes on with it; or choose another"
    ):
        run(tmp_path)
    assert RunFolder(made.path, EXPERIMENT).result == made.result


def test_settings_and_entries_that_there_are_not(tmp_path):
    with pytest.raises(ValueError, match="setting: got 'x' for noisy regression, must be one of 'more features'"):
        run(tmp_path, setting="x")
    with pytest.raises(ValueError, match=r"task\.shots: no such entry, must be one of dropout, features"):
        run(tmp_path, overrides={"task.shots": 3})
    assert not any(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_keeps_what_was_saved(tmp_path):
    experiment = noisy_experiment(inner_optimizer=Component("SGD", {"lr": 0.01}), outer_steps=30)
    steps = []

    def explode(record):
        steps.append(record.step)
        if record.step == 4:
            with torch.no_grad():
                task.model[0].weight.fill_(math.inf)

    task = Noisy(0, NoisyOptions(), hold_out=True)
    experiment = replace(experiment, make_task=lambda *_, **__: task)
    with pytest.raises(
        RunError, match=r"^noisy regression, stl, seed 0: the training loss is nan at outer step 5: try"
    ):
        run(tmp_path, "stl", experiment=experiment, on_outer_step=explode)
    folder = RunFolder(tmp_path / "noisy-regression" / "stl" / "seed-0", experiment)
    assert len(folder.records) == 5
    assert folder.result is None
    assert (folder.path / "checkpoint.pt").exists()


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "cannot read .*config.json: No such file"),
        ("config.json", b"{", "config.json is corrupt"),
        ("config.json", b"{}", "config.json does not describe a run of this version"),
        ("environment.json", b"", "environment.json is corrupt"),
        ("metrics.jsonl", b'{"step": 0}\n', "metrics.jsonl, line 1, is corrupt"),
        ("result.json", b'{"score": 1}', "result.json is corrupt"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    path = run(tmp_path, "stl").path
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(RunError, match=message):
        RunFolder(path, EXPERIMENT)


def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=r"train\.device: this machine has no 'cuda:63'"):
        run(tmp_path, overrides={"train.device": "cuda:63"})


# --------------------------------------------------------------------------------------- what training cannot survive


def test_a_run_whose_parameters_are_not_finite_saves_nothing_of_them(tmp_path):
    far = {"train.outer_steps": 1, "train.inner_steps": 1, "train.inner_optimizer.lr": 1e38}
    with pytest.raises(RunError, match="the parameters are not finite, with 1 outer steps done: try a smaller lr"):
        run(tmp_path, "stl", overrides=far)
    assert not list(tmp_path.rglob("result.json"))
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_what_cannot_be_trained_says_so_and_is_not_in_the_way_of_what_can(tmp_path):
    with pytest.raises(RunError, match=r"noisy regression, conv, seed 0 cannot be trained: ValueError: losses must be"):
        run(tmp_path, "conv")
    with pytest.raises(RunError, match="cannot be trained: ValueError: Muon"):
        run(tmp_path, "stl", overrides={"train.inner_optimizer": {"name": "Muon"}})
    assert run(tmp_path, "stl").result is not None


def test_a_fixed_phi_comes_from_a_run_of_the_same_configuration_and_says_which(tmp_path):
    run(tmp_path, "linear", 3)
    fixed = run(tmp_path, "linear-fixed", 4)
    assert json.loads((fixed.path / "config.json").read_text())["phi from"] == "seed-3"
    run(tmp_path, "linear", 1)
    assert run(tmp_path, "linear-fixed", 4, resume=True).result == fixed.result
    with pytest.raises(RunError, match=r"linear-fixed takes phi from .*seed-1, which has another configuration"):
        run(tmp_path, "linear-fixed", 5, overrides={"train.inner_steps": 2})
