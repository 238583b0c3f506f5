"""`make test-cuda-sanitizers`: these tests in every mode: plain, under ASan and UBSan, and under TSan.

A sanitizer's library has to be in the process before Python is, so each mode is a pytest of its own.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time

from build_backend import ROOT

from .kernels import MODES, build_libraries, find_gxx

PRELOADED = {"plain": [], "asan": ["asan", "stdc++"], "tsan": ["tsan"]}  # ASan looks for what throws when it starts
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "OMP_NUM_THREADS": "1",  # torch's threads would be watched too
}
ADDR_NO_RANDOMIZE, CURRENT = 0x0040000, 0xFFFFFFFF


def sanitizer_library(name: str) -> str:
    command = [find_gxx(), f"-print-file-name=lib{name}.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(
            f"tests/cuda_on_cpu: this g++ has no lib{name}.so, which the sanitizer runs need "
            f"(Debian, Ubuntu: it comes with g++; Fedora: dnf install lib{name})"
        )
    return path


def fix_addresses() -> None:
    """What `setarch -R` does, for this process and those it starts: ThreadSanitizer cannot place its memory where
    addresses are random in more bits than it knows (vm.mmap_rnd_bits above 28)."""
    personality = ctypes.CDLL(None).personality
    personality.argtypes = [ctypes.c_ulong]
    personality(personality(CURRENT) | ADDR_NO_RANDOMIZE)


def start(mode: str, preloaded: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | OPTIONS | {"AUXFAST_CUDA_ON_CPU": mode, "LD_PRELOAD": " ".join(preloaded)}
    # capture=sys: a report goes to the process's own stderr, past pytest.
    options = ["-v", "--capture=sys", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "tests/cuda_on_cpu"]
    before = fix_addresses if mode == "tsan" else None
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, preexec_fn=before, **pipes)


def main() -> None:
    began = time.monotonic()
    preloaded = {mode: [sanitizer_library(name) for name in names] for mode, names in PRELOADED.items()}
    build_libraries(MODES)
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    failed = []
    processes = {mode: start(mode, preloaded[mode]) for mode in MODES}
    for mode, process in processes.items():
        output, _ = process.communicate()
        if process.returncode != 0:
            failed.append(mode)
            print(output)
        if "unexpected memory mapping" in output:
            print("ThreadSanitizer needs fixed addresses, and personality(2) was refused: sysctl vm.mmap_rnd_bits=28")
        print(f"{mode}: {output.strip().splitlines()[-1].strip(' =')}", flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
