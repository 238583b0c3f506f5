"""`torchrun -m auxfast train`: real processes, of which some are killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from auxfast.cli import main
from auxfast.train import RunError, find_runs
from auxfast.train.launch import Launch

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)
pytest.importorskip("tqdm")
pytest.importorskip("cattrs")

ROOT = Path(__file__).resolve().parents[2]
TASK = """
import os, signal
from auxfast.experiments import Experiment
from auxfast.train import WHOLE
from train.problems import Shared, noisy_config

class Ending(Shared):
    calls = 0

    def training_batch(self, generator, part=WHOLE):
        Ending.calls += 1
        rank, call, how = os.environ.get("ENDS", "-1 0 no").split()
        if (part.rank, Ending.calls, part.size) == (int(rank), int(call), 2):
            if how == "raises":
                raise OSError("the disk with the data is gone")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_batch(generator, part)

EXPERIMENT = Experiment("ending", lambda seed: Ending(), config=noisy_config(None, outer_steps=12), methods=["linear"])
"""


def torchrun(*arguments: str, ends: str = "-1 0 no") -> subprocess.CompletedProcess[str]:
    """Two processes that torchrun starts, once they have ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "auxfast"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "ENDS": ends},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_several_processes_cannot_do_is_refused(monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "auxfast: info is for one process, and 2 were started\n"
    with pytest.raises(RunError, match=r"train.device: got 'cuda:1', must be 'cpu' or 'cuda' with 2 processes: each"):
        Launch(1, 2, 1).join(["cpu", "cuda:1"])


@pytest.mark.slow
def test_processes_that_end_are_named_and_the_run_goes_on_to_the_same_numbers(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    command = ["train", f"{tmp_path}/task.py:EXPERIMENT", "--seeds", "0", "--set", "train.checkpoint_every=2"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    (whole,) = find_runs([tmp_path / "whole"])
    shared = [*command, "--out", str(tmp_path / "shared")]
    for more, ends, survivor, message in (
        ([], "1 24 killed", 0, "rank 1 was killed, or does not answer"),
        (["--resume"], "0 16 killed", 1, "rank 0 was killed, or does not answer"),
        (["--resume"], "1 17 raises", 0, "rank 1 has ended: .*OSError: the disk with the data is gone"),
    ):
        run = torchrun(*shared, *more, ends=ends)
        assert run.returncode != 0
        told = rf"auxfast: rank {survivor} ends, since {message}.*; what was saved is kept"
        assert re.search(told, run.stderr), run.stderr
        (unfinished,) = find_runs([tmp_path / "shared"])
        assert unfinished.result is None
        assert 0 < len(unfinished.records) < 12
    assert main([*shared, "--resume"]) == 0
    (resumed,) = find_runs([tmp_path / "shared"])
    assert resumed.result.score == pytest.approx(whole.result.score, rel=1e-4)
    for record, expected in zip(resumed.records, whole.records, strict=True):
        assert record.training_loss == pytest.approx(expected.training_loss, rel=1e-4)
        assert record.outer_loss == pytest.approx(expected.outer_loss, rel=1e-4)
        assert record.phi == pytest.approx(expected.phi, rel=1e-4)
