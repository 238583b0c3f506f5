"""`setup.py check_cuda --inplace`, as `make test-cuda-compile` calls it: a build, and a check of the CUDA kernels.

The build keeps ptxas's report on the architectures that it compiles for. The check compiles for some more, prints one
table of both, and fails on spilled registers and on whatever else the compiler remarks.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import build_backend as build
from setuptools import Extension

MORE_ARCHITECTURES = [86, 89]  # they run what is built for sm_80, so the build leaves them out


@dataclass(frozen=True)
class Usage:
    """Resources that a kernel takes on an architecture: registers a thread, the rest in bytes. The stack holds the
    spills too; shared memory is what the kernel declares, without what a launch adds."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    shared: int
    spills: int  # stores and loads together


_QUANTITIES = ("registers", "bytes stack frame", "bytes spill stores", "bytes spill loads", "bytes smem")


def usages(log: str) -> list[Usage]:
    """ptxas's report in the compiler's output; a function that was not inlined counts for the kernel before it."""
    found = []
    for report in log.split("Compiling entry function ")[1:]:
        _, kernel, _, architecture, _ = report.split("'", 4)
        numbers = {what: [int(n) for n in re.findall(rf"(\d+) {what}", report)] for what in _QUANTITIES}
        (registers,) = numbers["registers"]
        spills = sum(numbers["bytes spill stores"] + numbers["bytes spill loads"])
        stack, shared = sum(numbers["bytes stack frame"]), sum(numbers["bytes smem"])
        found.append(Usage(kernel, architecture, registers, stack, shared, spills))
    return found


def remarks(log: str) -> list[str]:
    """Lines of the compiler's output that are not ptxas's report: warnings."""
    return [line for line in log.splitlines() if line.strip() and not re.match(build.PTXAS_REPORT, line)]


# A line's beginning tells its kind. A compiler that runs alone writes the kinds in this order.
_LINES = {
    r"ptxas info +: \d+ bytes gmem": "g",
    r"ptxas info +: Compiling entry function": "c",
    r"ptxas info +: Function properties": "f",
    r" +\d+ bytes stack frame": "s",
    r"ptxas info +: Used \d+ registers": "u",
    r"ptxas info +: Compile time": "t",
}


def is_garbled(log: str) -> bool:
    """Whether compilers that ran side by side may have written into each other's report."""
    kinds = [kind for line in log.splitlines() for start, kind in _LINES.items() if re.match(start, line)]
    return bool(remarks(log)) or not re.fullmatch("(g|c(fs)+ut?)*", "".join(kinds))


def _short_names(found: list[Usage]) -> dict[str, str]:
    """A readable name of each kernel: demangled, without namespaces and arguments."""
    symbols = list(dict.fromkeys(usage.kernel for usage in found))
    demangled = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = [re.sub(r"^void |\w+::|\(.*", "", name) for name in demangled.splitlines()]
    return dict(zip(symbols, names, strict=True))


def table(found: list[Usage], architectures: list[str]) -> str:
    """A row for each kernel, a column for each architecture; "-": the report is missing."""
    cells = {(u.kernel, u.architecture): f"{u.registers} / {u.stack} / {u.shared}" for u in found}
    rows = [["", *architectures]]
    for kernel, name in _short_names(found).items():
        rows.append([name, *(cells.get((kernel, architecture), "-") for architecture in architectures)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def faults(found: list[Usage], architectures: list[str]) -> list[str]:
    """Spills and missing reports, a line each."""
    spills = {(usage.kernel, usage.architecture): usage.spills for usage in found}
    lines = [] if found else ["ptxas reported no kernel"]
    for kernel, name in _short_names(found).items():
        for architecture in architectures:
            if (kernel, architecture) not in spills:
                lines.append(f"{name}: no report for {architecture}")
            elif amount := spills[kernel, architecture]:
                lines.append(f"{name} spills registers on {architecture}: {amount} bytes stored and loaded")
    return lines


def compile_log(step: build.Compile, flags: list[str]) -> str:
    """The compiler's output for a step of the build, with `flags` for its architectures, one after the other."""
    command = [word for word in step.command if not word.startswith(("-gencode", "--threads"))]
    with tempfile.TemporaryDirectory() as folder:
        command += [*flags, "-c", step.source, "-o", f"{folder}/out.o"]
        done = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"auxfast: failed: {' '.join(command)}\n{done.stderr}")
    return done.stderr


def architectures_of(flags: list[str]) -> list[str]:
    """The architectures that nvcc's flags ask machine code for, oldest first."""
    return sorted(re.findall(r"code=(sm_\d+)", " ".join(flags)), key=lambda name: int(name.removeprefix("sm_")))


class CheckCuda(build.NinjaBuild):
    """build_ext, and then the check."""

    description = "build_ext, and a table of what the CUDA kernels take; fails on spilled registers and on warnings"

    def build_extension(self, extension: Extension) -> None:
        super().build_extension(extension)
        assert isinstance(extension, build.NativeExtension)
        compiled = [] if build.build_choice() == "none" else extension.describe().steps
        steps = [step for step in compiled if step.source.endswith(".cu")]
        if not steps:
            print("auxfast: no check of the CUDA kernels, since they were not built; AUXFAST_BUILD=cuda builds them")
            return
        nvcc = steps[0].command[0]
        flags, _ = build.cuda_flags(nvcc, MORE_ARCHITECTURES)
        log = ""
        for step in steps:
            kept = Path(build.ROOT, step.object_file(build.build_folder()) + ".log").read_text()
            if is_garbled(kept):
                kept = compile_log(step, [word for word in step.command if word.startswith("-gencode")])
            log += kept + compile_log(step, flags)
        found, architectures = usages(log), architectures_of([*steps[0].command, *flags])
        print(f"Registers of a thread / stack / static shared memory, in bytes:\n\n{table(found, architectures)}\n")
        wrong = remarks(log) + faults(found, architectures)
        if wrong:
            raise SystemExit("auxfast: the compiler complains of the CUDA kernels\n" + "\n".join(wrong))
