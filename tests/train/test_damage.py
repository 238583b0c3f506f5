"""Files of a run folder that were damaged: each is told in a line that names it and the remedy, or does no harm."""

import json
import random
import re
import shutil

import pytest
import torch

from auxfast.train import Component, RunError, find_runs, record_run
from auxfast.train.files import load_checkpoint
from train.problems import noisy_plan
from train.test_resume import _interrupt, _same

CHANGES = {
    "inner_optimizer": Component("Adam", {"lr": 0.01}),
    "inner_scheduler": Component("MultiStepLR", {"milestones": (5, 14)}),
    "patience": 30,
}
FILES = ("checkpoint.pt", "config.json", "environment.json", "metrics.jsonl", "result.json")
JUNK = (b"", b"\0" * 100, b"null\n", b"[]\n", b"3\n", b'"x"\n', b"{}\n", b"[" * 100_000, b"\xff\xfe\n", b"1" * 5000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, with checkpoints after every second of its seven steps."""
    return record_run(noisy_plan(tmp_path_factory.mktemp("whole"), **CHANGES))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The folder of the same run, interrupted after four steps."""
    out = tmp_path_factory.mktemp("cut")
    _interrupt(out, "linear", 4, **CHANGES)
    return noisy_plan(out).path


@pytest.fixture
def copied(tmp_path):
    """Copies a run's folder into the test's own, and returns the copy."""

    def copy(folder):
        path = noisy_plan(tmp_path).path
        shutil.rmtree(tmp_path)
        shutil.copytree(folder, path)
        return path

    return copy


def _resume(path):
    return record_run(noisy_plan(path.parents[2], **CHANGES), resume=True)


def _read(path):
    (run,) = find_runs([path])
    return run


def _told(path, name, use):
    """The message of the error in which using the folder ends."""
    with pytest.raises(RunError) as caught:
        use(path)
    message = str(caught.value)
    assert str(path / name) in message
    assert "\n" not in message
    assert re.search(r"delete (it|/\S+)", message), message
    return message


def _truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _emptied(path):
    path.write_bytes(b"")


def _made_a_folder(path):
    path.unlink()
    path.mkdir()


def _of_something_else(path):
    path.write_bytes(b"hello\n")


@pytest.mark.parametrize("damage", [_truncated, _emptied, _made_a_folder, _of_something_else])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_finished_run_is_named_with_the_remedy(name, damage, whole, copied):
    path = copied(whole.path)
    damage(path / name)
    if name == "checkpoint.pt":
        assert _read(path).result == whole.result  # the result does not need it
    else:
        _told(path, name, _read)
        _told(path, name, _resume)


@pytest.mark.parametrize("name", ["environment.json", "result.json"])
def test_a_damaged_file_that_can_be_made_again_is_all_that_has_to_be_deleted(name, whole, copied):
    path = copied(whole.path)
    _truncated(path / name)
    assert "delete it" in _told(path, name, _resume)
    (path / name).unlink()
    _same(_resume(path), whole)


def test_without_its_environment_a_run_is_read_and_goes_on(whole, cut, copied):
    for folder in (cut, whole.path):
        path = copied(folder)
        (path / "environment.json").unlink()
        assert _read(path).environment == {}
        _same(_resume(path), whole)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_without_its_configuration_or_its_records_a_run_does_not_go_on(name, whole, cut, copied):
    for folder in (cut, whole.path):
        path = copied(folder)
        (path / name).unlink()
        _told(path, name, _resume)
        with pytest.raises(RunError, match="holds a run already"):
            record_run(noisy_plan(path.parents[2], **CHANGES))
    _told(path, name, _read)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncated, "is corrupt (File is not a zip file): delete it"),
        (_emptied, "is corrupt (it is empty): delete it"),
        (_made_a_folder, "Is a directory; delete"),
        (_of_something_else, "is corrupt (File is not a zip file): delete it"),
        (lambda path: torch.save([1, 2], path), "does not fit this run (all of it: got [1, 2], must be a table)"),
        (lambda path: torch.save({"weight": torch.ones(2)}, path), "does not fit this run (there is no 'trainer')"),
        (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), "does not fit this run (there is no"),
    ],
)
def test_a_damaged_checkpoint_can_be_deleted_to_start_again(damage, reason, whole, cut, copied):
    path = copied(cut)
    damage(path / "checkpoint.pt")
    message = _told(path, "checkpoint.pt", _resume)
    assert reason in message
    assert "Invalid argument" not in message
    shutil.rmtree(path / "checkpoint.pt") if (path / "checkpoint.pt").is_dir() else (path / "checkpoint.pt").unlink()
    _same(_resume(path), whole)


def test_one_wrong_bit_in_a_checkpoint_s_tensors_is_found(cut, copied):
    path = copied(cut) / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    weight = load_checkpoint(path)["trainer"]["model"]["0.weight"].numpy().tobytes()
    content[content.index(weight) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"is corrupt \(wrong checksum of .*\): delete it to start that run again"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("seconds", "x", "seconds: got 'x', must be a finite number"),
        ("trainer.step", "x", "trainer.step: got 'x', must be a finite number"),
        ("trainer.step", 4.0, "slice indices must be integers"),
        ("trainer.step", -1, "records for a state after -1 outer steps"),
        ("trainer.inner.param_groups.0.lr", "x", "trainer.inner.param_groups.0.lr: got 'x', must be a finite number"),
        ("trainer.inner.param_groups.0.lr", float("nan"), "param_groups.0.lr: got nan, must be a finite number"),
        ("trainer.inner.param_groups.0.betas", 0.9, "param_groups.0.betas: got 0.9, must be a list of 2"),
        ("trainer.inner.param_groups.0.amsgrad", 1, "param_groups.0.amsgrad: got 1, must be true or false"),
        ("trainer.inner.state.0.exp_avg", "x", "trainer.inner.state.0.exp_avg: got 'x', must be a number or a tensor"),
        ("trainer.scheduler.last_epoch", "x", "trainer.scheduler.last_epoch: got 'x', must be a finite number"),
        ("trainer.best.score", "x", "trainer.best.score: got 'x', must be a number or a tensor"),
        ("trainer.model.0.weight", "x", r"trainer.model.0.weight: got 'x', must be a tensor of shape \(8, 4\)"),
        ("trainer.model.0.weight", torch.ones(2), r"0.weight: got a tensor of shape \(2,\), must be a tensor of shape"),
        ("trainer.random", torch.zeros(3), r"trainer.random: got a tensor of shape \(3,\), must be a tensor"),
        ("trainer", [], r"trainer: got \[\], must be a table"),
    ],
)
def test_an_entry_of_a_checkpoint_that_cannot_be_is_named(entry, value, message, cut, copied):
    path = copied(cut)
    state = load_checkpoint(path / "checkpoint.pt")
    table, keys = state, entry.removeprefix("trainer.model.").split(".") if ".model." not in entry else [entry[14:]]
    if ".model." in entry:
        table = state["trainer"]["model"]
    for key in keys[:-1]:
        table = table[int(key) if key.isdecimal() else key]
    table[keys[-1]] = value
    torch.save(state, path / "checkpoint.pt")
    assert re.search(message, _told(path, "checkpoint.pt", _resume))


@pytest.mark.parametrize(
    ("name", "entry", "value", "message"),
    [
        ("metrics.jsonl", "training_loss", "0.5", "line 1, is corrupt (training_loss: got '0.5', must be a number)"),
        ("metrics.jsonl", "step", None, "step: got None, must be an integer"),
        ("metrics.jsonl", "residual", [1], 'residual: got [1], must be a number or "none"'),
        ("metrics.jsonl", "loss_weights", ["x", 1, 2], "loss_weights: got 'x', must be a number"),
        ("metrics.jsonl", "phi", {}, "phi: got {}, must be a list"),
        ("metrics.jsonl", "phi", [1.0], "line 2, is corrupt (phi: got 3 entries, and line 1 has 1)"),
        ("metrics.jsonl", "step", True, "step: got True, must be an integer"),
        ("metrics.jsonl", "step", 3, "step: got 3, must be 0"),
        ("metrics.jsonl", "more", 3, "more: no such entry"),
        ("result.json", "score", "0.5", "score: got '0.5', must be a number"),
        ("result.json", "outer_steps", None, "outer_steps: got None, must be an integer"),
        ("result.json", "stopped_early", 1, "stopped_early: got 1, must be true or false"),
        ("result.json", "further_scores", [88.5], "further_scores: got [88.5], must be a table"),
        ("result.json", "further_scores", {"top 3": "x"}, "further_scores.top 3: got 'x', must be a number"),
        ("config.json", "seed", "0", "seed: got '0', must be an integer"),
        ("config.json", "seed", False, "seed: got False, must be an integer"),
        ("config.json", "seed", 0.0, "seed: got 0.0, must be an integer"),
        ("config.json", "seed", None, "seed: got None, must be an integer"),
        ("config.json", "config", [], "config: got [], must be a table"),
        ("config.json", "method", "best", "method: got 'best', must be one of stl"),
    ],
)
def test_an_entry_of_the_wrong_type_is_named(name, entry, value, message, whole, copied):
    path = copied(whole.path)
    lines = (path / name).read_text().split("\n") if name.endswith("l") else [(path / name).read_text()]
    lines[0] = json.dumps({**json.loads(lines[0]), entry: value})
    (path / name).write_text("\n".join(lines))
    for use in (_read, _resume):
        assert message in _told(path, name, use)


def test_whatever_the_files_hold_the_run_is_right_or_refused_in_a_line(whole, cut, copied):
    """Damages at random, from a fixed seed."""
    draw = random.Random(16)
    for _ in range(60):
        path = copied(draw.choice([whole.path, cut]))
        name = draw.choice([name for name in FILES if (path / name).exists()])
        content = bytearray((path / name).read_bytes())
        kind = draw.choice(["cut", "junk", "append", "bit" if name == "checkpoint.pt" else "delete", "delete"])
        if kind == "delete":
            (path / name).unlink()
        elif kind == "bit":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            (path / name).write_bytes(content)
        else:
            start = content[: draw.randrange(len(content))] if kind == "cut" else content * (kind == "append")
            (path / name).write_bytes(start + (b"" if kind == "cut" else draw.choice(JUNK)))
        for use in (_read, _resume):
            message, run = _outcome(path, use)
            assert message is None or (str(path) in message and "\n" not in message), (name, kind)
            if run is not None and run.result is not None:
                assert (run.result.score, len(run.records)) == (whole.result.score, 7), (name, kind)


def _outcome(path, use):
    """The message of the error in which using the folder ends, or the run."""
    try:
        return None, use(path)
    except RunError as error:
        return str(error), None
