"""The tester is tested: each mistake of planted.cu is reported in the modes that can see it, its twin in none."""

from __future__ import annotations

import re
import subprocess
import sys

import build_backend
import pytest

from .kernels import HERE, MODE, MODES, library_file
from .sanitizers import sanitizer_library

RACE, WRONG = "data race", "wrong result"

# What each mode says. A mode that is missing may see nothing; one order in twenty is enough to see it.
REPORTS = {
    "missing_syncthreads": {"plain": WRONG, "tsan": RACE},
    "missing_syncwarp": {"plain": WRONG, "tsan": RACE},
    "missing_atomic": {"tsan": RACE},
    "missing_atomic_between_blocks": {"tsan": RACE},
    "overlapping_blocks": {"tsan": RACE},
    "global_out_of_bounds": {"asan": "heap-buffer-overflow"},
    "static_shared_out_of_bounds": {"asan": "use-after-poison"},
    "dynamic_shared_out_of_bounds": {"asan": "use-after-poison"},
    "uninitialised_shared": dict.fromkeys(MODES, WRONG),
    "barrier_not_reached_by_all": dict.fromkeys(MODES, r"waits at .*planted\.cu:\d+ for threads that never come"),
    "two_barriers_taken_for_one": dict.fromkeys(MODES, r"at .*planted\.cu:\d+ and at .*planted\.cu:\d+"),
    "shuffle_without_all_lanes": dict.fromkeys(MODES, r"waits at .*planted\.cu:\d+ for threads that never come"),
    "mask_without_the_lane": dict.fromkeys(MODES, r"planted\.cu:\d+: lane \d+ of 32 gave the mask 0xff"),
    "too_many_threads": dict.fromkeys(MODES, r"a launch of \(32, 32, 2\) threads a block: CUDA allows 1 to 1024"),
    "too_much_shared": dict.fromkeys(MODES, "a launch with 49153 bytes of dynamic shared memory: CUDA allows 49152"),
    "too_much_shared_together": dict.fromkeys(MODES, "a block with 49153 bytes of shared memory"),
    "copy_read_too_early": {"plain": WRONG, "asan": WRONG, "tsan": RACE},
    "copy_never_waited_for": dict.fromkeys(MODES, r"thread \(\d+, 0, 0\) has not waited for 1 of its copies"),
    "no_blocks": dict.fromkeys(MODES, r"a launch of \(1, 0, 1\) blocks: CUDA allows 1 to"),
}


def run(kernel: str, bug: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "run_planted.py"), str(library_file()), kernel, str(int(bug))]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("kernel", [kernel for kernel, reports in REPORTS.items() if MODE in reports])
def test_mistake_is_reported(kernel):
    done = run(kernel, bug=True)
    assert done.returncode != 0
    assert re.search(REPORTS[kernel][MODE], done.stderr), done.stderr


@pytest.mark.parametrize("kernel", REPORTS)
def test_correct_twin_is_not(kernel):
    done = run(kernel, bug=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_missing_sanitizer_is_an_error():
    with pytest.raises(SystemExit, match=r"this g\+\+ has no libnosan\.so, which the sanitizer runs need"):
        sanitizer_library("nosan")


def test_every_kernel_file_is_run():
    for file in (build_backend.ROOT / "csrc").glob("*/*_cuda.cu"):
        op = file.parent.name
        assert (HERE / f"{op}.cpp").exists(), f"{file.name} has no wrapper"
        assert (HERE / f"test_{op}.py").exists(), f"{file.name} has no test"
