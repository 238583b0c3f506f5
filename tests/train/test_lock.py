"""One process at a time writes a run folder."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import re
import signal
import socket
import time

import pytest

from auxfast.cli import main
from auxfast.train import RunError, find_runs
from auxfast.train.folder_lock import locked
from train.test_recording import run
from train.test_resume import _same

# Processes of this kind share no state with the test's, and start within milliseconds, so that they meet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["auxfast.cli"])

HOST = re.escape(socket.gethostname())
COMMAND = (
    *("train", "illustrative", "--method", "nonlinear", "--setting=", "--seeds", "3"),
    *("--set", "train.outer_steps=6", "--set", "train.inner_steps=3", "--set", "train.checkpoint_every=2"),
)


def _command(out, barrier, number):
    """Runs the command as a process of its own would, with its errors in a file."""
    barrier.wait()
    with (
        (out / f"errors-{number}").open("w") as file,
        contextlib.redirect_stderr(file),
        contextlib.redirect_stdout(file),
    ):
        code = main([*COMMAND, "--out", str(out)])
    raise SystemExit(code)


def _two_at_once(out):
    """Exit codes of two such processes, and the last line of each one's errors."""
    out.mkdir()
    barrier = PROCESSES.Barrier(2)
    processes = [PROCESSES.Process(target=_command, args=(out, barrier, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    errors = [(out / f"errors-{number}").read_text() for number in range(2)]
    return [(process.exitcode, text.splitlines()[-1], text) for process, text in zip(processes, errors, strict=True)]


@pytest.mark.parametrize("tries", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_of_two_commands_on_one_folder_one_wins_and_the_other_says_who_holds_it(tries, tmp_path):
    pytest.importorskip("tqdm")
    assert main([*COMMAND, "--out", str(tmp_path / "lone")]) == 0
    (lone,) = find_runs([tmp_path / "lone"])
    for number in range(tries):
        out = tmp_path / str(number)
        (code, _, _), (failed, message, errors) = sorted(_two_at_once(out))
        assert (code, failed) == (0, 1)
        assert re.fullmatch(
            rf"auxfast: {out}/illustrative/nonlinear/seed-3 (is being written by process \d+ on {HOST}: wait for it,|"
            r"holds a run already: --resume \(resume=True\) goes on with it;) or choose another --out",
            message,
        )
        assert "Traceback" not in errors
        (made,) = find_runs([out])
        _same(made, lone)
        assert {path.name for path in made.path.iterdir()} == {path.name for path in lone.path.iterdir()}


def _hold(folder, barrier):
    with locked(folder):
        barrier.wait()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the folder of the run."""
    folder = tmp_path / "noisy-regression" / "linear" / "seed-0"
    barrier = PROCESSES.Barrier(2)
    process = PROCESSES.Process(target=_hold, args=(folder, barrier))
    process.start()
    barrier.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_folder_that_another_process_writes_is_refused_and_left_as_it_is(tmp_path, holder):
    message = rf"seed-0 is being written by process {holder.pid} on {HOST}: wait for it"
    for resume in (False, True):
        with pytest.raises(RunError, match=message):
            run(tmp_path, resume=resume, on_outer_step=lambda _: pytest.fail("trained"))
    assert [path.name for path in (tmp_path / "noisy-regression" / "linear" / "seed-0").iterdir()] == ["lock"]


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    _same(run(tmp_path, resume=True), run(tmp_path / "other"))
    assert not list(tmp_path.rglob("lock"))


def test_a_finished_run_is_read_whoever_holds_the_lock(tmp_path):
    made = run(tmp_path)
    with locked(made.path):
        assert run(tmp_path, resume=True) == made
        assert find_runs([tmp_path]) == [made]


def test_the_lock_of_a_deleted_file_counts_for_nothing(tmp_path, monkeypatch):
    """The holder deletes its file at the end, and another process may have opened that just before."""
    flock, deleted = fcntl.flock, []

    def delete_first(descriptor, kind):
        if not deleted:
            (tmp_path / "lock").unlink()
            deleted.append(descriptor)
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with locked(tmp_path):
        monkeypatch.undo()
        with pytest.raises(RunError, match="is being written by"), locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_refused_with_the_remedy(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(
        RunError, match=r"cannot lock .*lock: No locks available; choose an --out on a file system that"
    ):
        run(tmp_path, on_outer_step=lambda _: pytest.fail("trained"))


def test_lines_of_two_processes_are_not_taken_for_a_run(tmp_path):
    made = run(tmp_path)
    metrics = made.path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([*lines[:3], *lines[1:]]))
    with pytest.raises(
        RunError, match=rf"{metrics}, line 4, is corrupt \(step: got 1, must be 3\): delete {made.path}"
    ):
        find_runs([tmp_path])
    metrics.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(
        RunError, match=rf"{metrics} is corrupt \(it has 6 lines, and result.json is of 7 steps\): delete"
    ):
        find_runs([tmp_path])
    with pytest.raises(RunError, match="it has 6 lines"):
        run(tmp_path, resume=True)
