"""Builds the project's .cu files for the CPU and calls them: one library, in one of three modes, of all kernels."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import build_backend as build
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
WRAPPERS = sorted(HERE.glob("*.cpp"))  # and the engine
CPU_KERNELS = ["krylov", "neumann"]  # of which the ends run, on sizes that take too long as a whole

# Flags of the kernels and of the engine, which no sanitizer must watch.
MODES = {
    "plain": (["-O2"], []),
    "asan": (["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], ["-DCUDA_ON_CPU_ASAN"]),
    "tsan": (["-O1", "-g1", "-fsanitize=thread"], ["-DCUDA_ON_CPU_TSAN"]),
}
# A size that loses bits on its way into a number of another type does not compile.
NO_NARROWING = ["-Werror=conversion", "-Wno-sign-conversion", "-Wno-float-conversion"]
MAP_NORESERVE = 0x4000  # of Linux; module mmap has the name from Python 3.13 on
MODE = os.environ.get("AUXFAST_CUDA_ON_CPU", "plain")


def build_libraries(modes: Iterable[str]) -> dict[str, Path]:
    """The library of each mode, brought up to date; raises SystemExit if there is no compiler or it fails."""
    import ninja

    libraries, running = {}, []
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer of ours
    for mode in modes:
        folder = f"build/cuda_on_cpu/{mode}"
        library = f"{folder}/libkernels.so"
        file = build.ROOT / folder / "build.ninja"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_plan(mode).ninja_file(folder, library))
        libraries[mode] = build.ROOT / library
        command = [Path(ninja.BIN_DIR, "ninja"), "-f", file.relative_to(build.ROOT)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running.append(subprocess.Popen(command, cwd=build.ROOT, env=environment, text=True, **pipes))
    for process in running:
        output, _ = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"{output}\ntests/cuda_on_cpu: the kernels do not compile")
    return libraries


def _plan(mode: str) -> build.ModuleBuild:
    kernel_flags, engine_flags = MODES[mode]
    gxx = find_gxx()
    common = [gxx, "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *NO_NARROWING]
    kernel = [*common, *kernel_flags, f"-I{HERE / 'include'}", "-Icsrc", "-x", "c++"]
    steps = []
    for source in [*sorted((build.ROOT / "csrc").glob("*/*_cuda.cu")), *WRAPPERS, HERE / "planted.cu"]:
        command = [*common, "-O2", *engine_flags] if source.name == "engine.cpp" else kernel
        steps.append(build.Compile(source.relative_to(build.ROOT).as_posix(), command))
    for op in CPU_KERNELS:
        command = [*common, *kernel_flags, "-Icsrc", "-DAUXFAST_ISA=baseline", "-Wno-psabi"]
        steps.append(build.Compile(f"csrc/{op}/{op}_cpu.cpp", command))
    return build.ModuleBuild(steps, [gxx, "-shared", *kernel_flags], [])


def find_gxx() -> str:
    """g++: the engine uses its setjmp, and its sanitizers are libraries that a running Python can preload."""
    gxx = shutil.which("g++")
    if gxx is None:
        raise SystemExit("tests/cuda_on_cpu: these tests need g++, and there is none on the PATH")
    return gxx


@cache
def library_file() -> Path:
    return build_libraries([MODE])[MODE]


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_file()))


def call(function: str, *arguments: int | float | Tensor | list[int] | list[Tensor] | None) -> None:
    """Calls a function of a wrapper with int64_t, double, pointers to tensors, or arrays of int64_t or pointers.

    Raises:
        RuntimeError: a launch was refused, or the engine found a mistake; the message says which.
    """
    entry = library()[function]
    entry.restype = ctypes.c_char_p
    error = entry(*map(_to_c, arguments))
    if error is not None:
        raise RuntimeError(error.decode())


def _to_c(argument: object) -> object:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, list):
        items = [_to_c(item) for item in argument]
        return (type(items[0]) * len(items))(*items)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return None if argument is None else ctypes.c_int64(argument)  # type: ignore[arg-type]


def launches(run: Callable[[], object]) -> int:
    """How many kernels run() launches."""
    count = library().launches
    count.restype = ctypes.c_int64
    before: int = count()
    run()
    return count() - before


@contextmanager
def window(blocks: int, device: str = "cuda") -> Iterator[None]:
    """A context in which only the first and the last `blocks` blocks along each axis of a grid run, in a workspace of
    zeros. Where device is "cpu", the kernels of CPU_KERNELS for the CPU run in their stead: the first and the last
    chunks."""
    library().set_window(ctypes.c_int64(blocks))
    library().set_on_cpu(ctypes.c_int64(device == "cpu"))
    try:
        yield
    finally:
        library().set_window(ctypes.c_int64(0))
        library().set_on_cpu(ctypes.c_int64(0))


@contextmanager
def device(index: int) -> Iterator[None]:
    """A context in which the current device is number `index`, which has 2^(34 - index) bytes of memory."""
    library().set_device(ctypes.c_int64(index))
    try:
        yield
    finally:
        library().set_device(ctypes.c_int64(0))


def sparse(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of any size, in memory that gets a page when something is written there."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # or a number that is written would take 2 MB
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def network_numbers(packed: str) -> list[int]:
    """What a wrapper is told of a network, of which `packed` is the text that the op is told."""
    return [int(number) for number in packed.split(",")]


def in_any_order(run: Callable[[], dict[str, Tensor]], orders: int = 3) -> dict[str, Tensor]:
    """What run() returns, having checked that it has the same bits for `orders` orders of threads.

    Under a sanitizer there is but one: it sees in any order what is wrong.
    """
    results = []
    for seed in range(orders if MODE == "plain" else 1):
        library().set_seed(ctypes.c_uint64(seed))
        results.append(run())
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{name}: not the same")
    return results[0]


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory for a result: what a kernel leaves out stays NaN."""
    return torch.full(shape, float("nan"), dtype=dtype)
