"""All that only a GPU can tell, in one run of at most ten minutes, without network (`make gpu-check`).

    python -m benchmarks.gpu.check --out build/gpu-check                      everything
    python -m benchmarks.gpu.check --seconds 150 --only import,kernels,solvers
    python -m benchmarks.gpu.check --dry-run                                  on a CPU, in small sizes: do they run?

The built module is all that it needs. In this order: the module loads and a kernel runs; every kernel; streams and
graphs; every solver; benchmarks; the other tests; memcheck and racecheck; counters. Where there are cores, tests run
side by side; benchmarks and counters have the GPU to themselves. Each step ends with its own limit. Results are written
as they come: log.txt has each step's output, benchmark.json the figures, summary.json how each step ended. The exit
status is 1 where a step that tells of correctness failed, or had no time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import torch

import auxfast

ROOT = Path(__file__).parents[2]
CORES = os.cpu_count() or 1
_ON_GPU = "tests/cuda_on_gpu"
_LEAST_SECONDS = 5.0  # what starts later tells nothing

IMPORT = """
import pprint, torch, auxfast
from auxfast._native import use_native
from auxfast.ops.krylov import row_dots
assert use_native(torch.device({device!r})), "the reference runs"
x = torch.randn(4, 1000, device={device!r})
torch.testing.assert_close(row_dots(x, x), x.double().square().sum(1))
pprint.pp(auxfast.build_info())
"""


@dataclass(frozen=True)
class Step:
    """A command with a limit of its own, in seconds.

    decides: whether its failure is one of the check.
    needs: a program that it cannot do without; `None`: Python alone.
    """

    name: str
    command: list[str]
    seconds: float
    decides: bool = True
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Ended:
    name: str
    status: str
    seconds: float
    failed: bool


def stages(out: Path, seconds: float, dry_run: bool, commit: str | None = None) -> list[list[Step]]:
    """Steps that may run side by side, in the order of the stages."""
    sizes = ["--small"] if dry_run else []
    kernels, solvers, large = (f"{_ON_GPU}/test_{name}.py" for name in ("every_kernel", "solvers", "large"))
    on_gpu = {str(path.relative_to(ROOT)) for path in (ROOT / _ON_GPU).glob("test_*.py")}
    streams, others = sorted(on_gpu - {kernels, solvers, large}), [large, *_folders_of_device_tests()]
    benchmark = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out / "benchmark.json"), *sizes]
    benchmark += ["--figure-seconds", "0.001"] if dry_run else []
    benchmark += ["--commit", commit] if commit else []
    return [
        [Step("import", [sys.executable, "-c", IMPORT.format(device="cpu" if dry_run else "cuda")], 60)],
        [
            Step("kernels", _pytest([kernels], 3), 100),
            Step("streams", _pytest(streams, 4), 100),
            Step("solvers", _pytest([solvers], 4), 100),
        ],
        [Step("benchmark", [*benchmark, "--seconds", f"{min(150.0, 0.6 * seconds):.0f}"], 190, decides=False)],
        [
            Step(
                "others",
                _pytest(others, CORES - 4),
                150,
                environment={} if dry_run else {"AUXFAST_TEST_DEVICE": "cuda"},
            ),
            *(_sanitized(tool, kernels, dry_run) for tool in ("memcheck", "racecheck")),
        ],
        [_counters([sys.executable, "-m", "benchmarks.gpu.kernels", *sizes], dry_run)],
    ]


def _folders_of_device_tests() -> list[str]:
    """Folders, but for tests/cuda_on_gpu, with tests that run on any device: these take the fixture `device`."""
    takes_device = re.compile(r"\bon_device\(|def test_\w+\([^)]*\bdevice\b")
    folders = {path.parent for path in (ROOT / "tests").glob("*/test_*.py") if takes_device.search(path.read_text())}
    return sorted(str(folder.relative_to(ROOT)) for folder in folders if folder != ROOT / _ON_GPU)


def _pytest(files: Iterable[str], processes: int, *options: str) -> list[str]:
    several = ["-n", str(processes)] if find_spec("xdist") and processes > 1 and CORES > 4 else []
    quiet = ["-p", "no:cacheprovider", "-q", "--tb=short"]
    return [sys.executable, "-m", "pytest", *quiet, "-m", "cuda", *several, *options, *files]


def _sanitized(tool: str, file: str, dry_run: bool) -> Step:
    """Every kernel in float32, under a tool that looks at auxfast's kernels alone."""
    sanitizer = _program("compute-sanitizer")
    options = ["--tool", tool, "--kernel-name", "kernel_substring=auxfast", "--report-api-errors", "no"]
    before = [] if dry_run else [sanitizer or "compute-sanitizer", *options, "--error-exitcode", "9"]
    command = [*before, *_pytest([file], 1, "-x", "-k", "dtype0")]
    needs = None if dry_run else "compute-sanitizer"
    return Step(tool, command, 120, needs=needs, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _counters(command: list[str], dry_run: bool) -> Step:
    if dry_run:
        return Step("counters", command, 90, decides=False)
    options = ["--profile-from-start", "off", "--clock-control", "none", "--kernel-name-base", "demangled", "--csv"]
    sections = ["SpeedOfLight", "Occupancy", "WarpStateStats", "SchedulerStats"]
    before = [_program("ncu") or "ncu", *options, "-k", "regex:auxfast", *(f"--section={name}" for name in sections)]
    return Step("counters", [*before, *command], 90, decides=False, needs="ncu")


def _program(name: str) -> str | None:
    places = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    return shutil.which(name, path=os.pathsep.join(places))


class Check:
    """Runs steps until `seconds` have passed, and writes what came of them into `out`."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.log, self.summary = out / "log.txt", out / "summary.json"
        self.begin, self.end = time.monotonic(), time.monotonic() + seconds
        self.ended: list[Ended] = []
        self._lock = Lock()
        self.log.write_text("")

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, steps: list[Step]) -> None:
        with ThreadPoolExecutor(max(1, CORES // 2)) as pool:
            list(pool.map(self._run, steps))

    def _run(self, step: Step) -> None:
        limit = min(step.seconds, self.left())
        if step.needs is not None and _program(step.needs) is None:
            return self._end(step, f"not run: there is no {step.needs}", 0.0, False, "")
        if limit < _LEAST_SECONDS:
            return self._end(step, "not run: no time was left", 0.0, step.decides, "")
        start = time.monotonic()
        environment = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **os.environ, **step.environment}
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _stop(process)
            output.seek(0)
            text = output.read()
        seconds = time.monotonic() - start
        if status == 0:
            return self._end(step, "passed", seconds, False, text)
        told = f"stopped at its limit of {limit:.0f} s" if status is None else f"failed with exit status {status}"
        return self._end(step, told, seconds, step.decides, text)

    def _end(self, step: Step, status: str, seconds: float, failed: bool, text: str) -> None:
        ended = Ended(step.name, status, round(seconds, 1), failed)
        with self._lock:
            self.ended.append(ended)
            with self.log.open("a") as log:
                log.write(f"==== {step.name}: {status}, {seconds:.1f} s\n$ {' '.join(step.command)}\n{text}\n")
            self.summary.write_text(json.dumps([vars(each) for each in self.ended], indent=1) + "\n")
            last = text.rstrip().splitlines()[-40 if status.startswith("failed") else -1 :]
            print(f"[{time.monotonic() - self.begin:5.0f} s] {step.name}: {status}, {seconds:.1f} s")
            print("".join(f"    {line}\n" for line in last), end="", flush=True)


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends a step's whole process group: workers of pytest, and what a sanitizer runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-check", help="folder (build/gpu-check)")
    parser.add_argument("--seconds", type=float, default=560, help="for everything (560)")
    parser.add_argument("--only", help="names of steps, with commas between them")
    parser.add_argument("--commit", help="what is checked, where there is no git repository to tell")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in small sizes: tests are skipped")
    given = parser.parse_args()
    planned = stages(given.out, given.seconds, given.dry_run, given.commit)
    names = [step.name for steps in planned for step in steps]
    only = given.only.split(",") if given.only else names
    if unknown := set(only) - set(names):
        parser.error(f"--only: got {', '.join(sorted(unknown))}, must be of {', '.join(names)}")
    info = auxfast.build_info()
    if not given.dry_run and not (torch.cuda.is_available() and info["cuda_kernels"]):
        sys.exit(
            f"gpu-check needs a GPU that torch sees ({torch.cuda.is_available()}) and a build with nvcc "
            f"({info['cuda_toolkit']}); --dry-run does without"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    check = Check(given.out, given.seconds)
    for steps in planned:
        check.run([step for step in steps if step.name in only])
    failed = [ended.name for ended in check.ended if ended.failed]
    print(f"{given.out}: {', '.join(path.name for path in sorted(given.out.iterdir()))}")
    sys.exit(f"gpu-check failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
