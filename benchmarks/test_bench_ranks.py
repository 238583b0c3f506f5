"""Several ranks: `benchmarks/scaling` measures them under torchrun; here it runs once, with small sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_benchmark_of_several_ranks_runs() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks.scaling", "--smoke"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
