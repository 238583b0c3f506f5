import errno
import os

import pytest
import torch

from auxfast.train import RunError
from auxfast.train.files import load_checkpoint, read_json, save_checkpoint, write_bytes, write_json


def test_what_is_saved_comes_back(tmp_path):
    state = {"tensor": torch.rand(3), "bytes": torch.get_rng_state(), "nested": [{"a": 1.5, "b": None}, (2, "x")]}
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    again = load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(again.pop("tensor"), state.pop("tensor"))
    assert torch.equal(again.pop("bytes"), state.pop("bytes"))
    assert again == state
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match=r"checkpoint\.pt is corrupt"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_what_was_left_by_a_kill_between_write_and_rename_does_no_harm(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    (tmp_path / "checkpoint.pt.partial").write_bytes(b"half")
    assert load_checkpoint(path) == {"step": 1}
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_with_the_disk_full_the_file_before_stays(tmp_path, monkeypatch, call):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RunError, match=rf"cannot write {path}.*: No space left on device"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}


def test_a_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=rf"cannot write {tmp_path / 'file' / 'a.json.partial'}: Not a directory"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 and more"])
def test_a_corrupt_checkpoint_says_what_to_do(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(RunError, match=rf"^{path} is corrupt \([^\n]+\): delete it to start that run again$"):
        load_checkpoint(path)


def test_a_cut_checkpoint_says_what_to_do(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"tensor": torch.rand(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(RunError, match=r"is corrupt .*: delete it to start that run again"):
        load_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(RunError, match=rf"cannot read {tmp_path / 'checkpoint.pt'}: No such file"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_json_comes_back_or_says_why_not(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None]})
    assert read_json(path) == {"a": [1, None]}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": [1, None]}
    write_bytes(path, b"{half")
    with pytest.raises(RunError, match=rf"{path} is corrupt \(.*\): delete {tmp_path} to start that run again"):
        read_json(path)
    with pytest.raises(RunError, match=r"cannot read .*b\.json: No such file"):
        read_json(tmp_path / "b.json")
