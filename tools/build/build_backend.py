"""The build of the native module: PEP 517 hooks, and a setuptools command that hands the work to ninja.

The build needs torch's headers and libraries, but not a second torch: an isolated build environment hides the
installed one, so it is looked for with a fresh interpreter, and only where there is none is torch asked for as a
build requirement. Any torch from 2.11 on will do, since the ops use its stable ABI.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from build_requirements import check_requirements, release

try:
    from setuptools import Extension, build_meta
    from setuptools.build_meta import (  # noqa: F401  (the hooks that need no change)
        build_editable,
        build_sdist,
        build_wheel,
        get_requires_for_build_sdist,
        prepare_metadata_for_build_editable,
        prepare_metadata_for_build_wheel,
    )
    from setuptools.command.build_ext import build_ext
except ModuleNotFoundError:
    check_requirements("setuptools")
    raise

ROOT = Path(__file__).resolve().parents[2]
OLDEST_TORCH = "2.11"
DEFAULT_CUDA = "/usr/local/cuda"
DEVICES = Path("/dev")
NO_KERNELS = Path(__file__).with_name("no_kernels.py")
CHOICES = ("auto", "cpu", "cuda", "none")

_FIND_TORCH = """
import importlib.metadata, importlib.util, pathlib, runpy
spec = importlib.util.find_spec("torch")
if spec is not None:
    folder = spec.submodule_search_locations[0]
    cuda = runpy.run_path(str(pathlib.Path(folder, "version.py")))["cuda"]
    print(folder, importlib.metadata.version("torch"), cuda or "", sep="\\n")
"""


class Torch(NamedTuple):
    """An installed torch. `cuda` is the version of CUDA that it was built with, or empty."""

    folder: Path
    version: str
    cuda: str


@cache
def installed_torch() -> Torch | None:
    """The torch that this interpreter imports, inside a build environment or outside it."""
    for options in ([], ["-E"]):  # -E forgets the build environment that pip put on PYTHONPATH
        found = subprocess.run([sys.executable, *options, "-c", _FIND_TORCH], capture_output=True, text=True)
        if found.returncode == 0 and found.stdout:
            folder, version, cuda = found.stdout.split("\n")[:3]
            return Torch(Path(folder), version, cuda)
    return None


def build_choice() -> str:
    """The value of AUXFAST_BUILD: auto, cpu, cuda or none (no compiler, all ops on the PyTorch reference)."""
    choice = os.environ.get("AUXFAST_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"auxfast: AUXFAST_BUILD must be {', '.join(CHOICES[:-1])} or {CHOICES[-1]}, not {choice!r}")
    return choice


def _with_torch(requirements: list[str]) -> list[str]:
    if build_choice() == "none" or installed_torch():
        return requirements
    return [*requirements, f"torch>={OLDEST_TORCH}"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))


def find_cxx() -> list[str]:
    """The command of the C++ compiler: $CXX (which may be several words, "ccache g++"), else c++, g++ or clang++."""
    chosen = environment_flags("CXX")
    if chosen and not shutil.which(chosen[0]):
        raise SystemExit(f"auxfast: CXX={shlex.join(chosen)}, but there is no command {chosen[0]}")
    for name in ("c++", "g++", "clang++"):
        if not chosen and shutil.which(name):
            chosen = [name]
    if not chosen:
        raise SystemExit(
            "auxfast needs a C++17 compiler and found none. Install one (Debian, Ubuntu: apt-get install g++; "
            "Fedora: dnf install gcc-c++; conda: conda install gxx) or name it in the environment variable CXX."
        )
    return chosen


def find_nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME, else of CUDA_PATH, which are never passed over; if neither is set, the one on the
    PATH or in the default folder, or None."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            nvcc = shutil.which("nvcc", path=f"{home}/bin")
            if nvcc is None:
                raise SystemExit(
                    f"auxfast: {name}={home}, but there is no {home}/bin/nvcc; name the folder of a CUDA toolkit, or "
                    f"unset {name}; AUXFAST_BUILD=cpu builds without CUDA"
                )
            return nvcc
    return shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), f"{DEFAULT_CUDA}/bin"]))


def choose_nvcc() -> str | None:
    """The CUDA compiler to build with, or None for the CPU kernels alone, which is said unless it was asked for.

    Without AUXFAST_BUILD, nvcc is used where its kernels could run: with a torch that has CUDA, or beside a GPU.
    """
    choice = build_choice()
    nvcc = find_nvcc() if choice in ("auto", "cuda") else None
    if choice == "cuda" and nvcc is None:
        raise SystemExit(f"auxfast: AUXFAST_BUILD=cuda, but no nvcc in CUDA_HOME, on the PATH or in {DEFAULT_CUDA}")
    if choice == "auto" and nvcc is None:
        print("auxfast: no nvcc found, building the CPU kernels only", file=sys.stderr)
    elif choice == "auto" and not (_torch_has_cuda() or _has_gpu()):
        print(
            "auxfast: this torch has no CUDA and there is no GPU, building the CPU kernels only; "
            "AUXFAST_BUILD=cuda builds the CUDA kernels too",
            file=sys.stderr,
        )
        return None
    return nvcc


def _torch_has_cuda() -> bool:
    torch = installed_torch()
    return torch is not None and bool(torch.cuda)


def _has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU: as /dev/nvidia0 and so on, under WSL as /dev/dxg."""
    return any(DEVICES.glob("nvidia[0-9]*")) or (DEVICES / "dxg").exists()


def cuda_flags(nvcc: str, architectures: list[int], ptx: Sequence[int] = ()) -> tuple[list[str], list[str]]:
    """(compile flags, defines that tell build_info): code for those of `architectures` that this nvcc knows, and PTX
    for the GPUs that come after them, of the newest of them and of those in `ptx`."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [arch for arch in architectures if f"compute_{arch}" in listed]
    if not known:
        raise SystemExit(f"auxfast: {nvcc} knows none of the architectures {architectures}, only {', '.join(listed)}")
    virtual = [arch for arch in known if arch in ptx or arch == known[-1]]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    flags += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in virtual]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    toolkit = version.partition("release ")[2].partition(",")[0]
    return flags, [
        "-DAUXFAST_WITH_CUDA",
        f"-DAUXFAST_CUDA_ARCHITECTURES={'.'.join(map(str, known))}",
        f"-DAUXFAST_CUDA_PTX={'.'.join(map(str, virtual))}",
        f"-DAUXFAST_CUDA_TOOLKIT={toolkit}",
    ]


def torch_flags() -> tuple[list[str], list[str], str]:
    """(compile flags, link flags, a name for what is compiled with them) for code that uses torch's stable ABI."""
    found = installed_torch()
    if found is None:
        raise SystemExit(f"auxfast: the build needs torch's headers; pip install 'torch>={OLDEST_TORCH}' first")
    if release(found.version) < release(OLDEST_TORCH):
        raise SystemExit(
            f"auxfast needs torch {OLDEST_TORCH} or newer, and {found.folder} is {found.version}; "
            f"pip install --upgrade 'torch>={OLDEST_TORCH}' first"
        )
    includes, libraries = ["-isystem", f"{found.folder / 'include'}"], [f"-L{found.folder / 'lib'}", "-ltorch_cpu"]
    return includes, libraries, f"torch-{found.version}"


def python_flags() -> list[str]:
    import pybind11

    return ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]


def environment_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@dataclass(frozen=True)
class Compile:
    """One source file, the command that compiles it, and a name that tells builds of one file apart."""

    source: str
    command: list[str]
    variant: str = ""

    def object_file(self, folder: str) -> str:
        return "/".join([folder, *filter(None, [self.source, self.variant])]) + ".o"


def compile_all(pattern: str, command: list[str], variant: str = "") -> list[Compile]:
    """The steps for all matching files in csrc/; named from the repository's root, where all commands run."""
    files = sorted((ROOT / "csrc").glob(pattern))
    return [Compile(file.relative_to(ROOT).as_posix(), command, variant) for file in files]


# The compiler's messages are kept beside the object file, and shown but for ptxas's report (`-Xptxas=-v`).
PTXAS_REPORT = r"^ptxas info +:|^ +[0-9]+ bytes stack frame"
_KEEP_LOG = f"2> $out.log; code=$$?; grep -Ev '{PTXAS_REPORT}' $out.log >&2; exit $$code"


@dataclass(frozen=True)
class ModuleBuild:
    """All compile steps of a module; the command that links it, and what that needs behind the object files."""

    steps: list[Compile]
    link: list[str]
    libraries: list[str]

    def ninja_file(self, folder: str, output: str) -> str:
        """The build.ninja that leaves everything in `folder`; paths are relative to the repository's root."""
        lines = [
            f"builddir = {_escape(folder)}",
            f"rule compile\n  command = $cmd -MMD -MF $out.d -c $in -o $out {_KEEP_LOG}",
            "  depfile = $out.d\n  deps = gcc\n  description = $in $variant",
            "rule link\n  command = $cmd $in -o $out $libraries\n  description = $out",
        ]
        objects = []
        for step in self.steps:
            objects.append(_escape(step.object_file(folder)))
            lines.append(f"build {objects[-1]}: compile {_escape(step.source)}")
            lines.append(f"  cmd = {_command(step.command)}\n  variant = {step.variant}")
        lines.append(f"build {_escape(output)}: link {' '.join(objects)}")
        lines.append(f"  cmd = {_command(self.link)}\n  libraries = {_command(self.libraries)}")
        return "\n".join(lines) + "\n"


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def build_folder() -> str:
    """The folder of this Python's object files, from the repository's root."""
    return f"build/{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


class NativeExtension(Extension):
    """An extension module that is described only when it is built: neither an sdist nor metadata needs a compiler."""

    def __init__(self, name: str, describe: Callable[[], ModuleBuild]) -> None:
        super().__init__(name, sources=[])
        self.describe = describe


class NinjaBuild(build_ext):
    """build_ext that lets ninja do the work: parallel, and only what changed since the last build, of any kind.

    With AUXFAST_BUILD=none it installs no_kernels.py in the module's place. The last build decides what is imported:
    each removes what another kind of build left.
    """

    def run(self) -> None:
        """Builds, and leaves the module in the source tree too: there, the tree's auxfast hides an installed one."""
        super().run()
        if not self.inplace:
            self.copy_extensions_to_source()

    def get_ext_filename(self, fullname: str) -> str:
        return self._stand_in(fullname) if build_choice() == "none" else self._native_module(fullname)

    def build_extension(self, extension: Extension) -> None:
        assert isinstance(extension, NativeExtension)
        output = Path(self.get_ext_fullpath(extension.name))
        if build_choice() == "none":
            module, other = NO_KERNELS, self._native_module(extension.name)
        else:
            module, other = self._compile(extension, output.name), self._stand_in(extension.name)
        for folder in (Path(self.build_lib), ROOT):
            (folder / other).unlink(missing_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(module), str(output))

    def _native_module(self, fullname: str) -> str:
        filename: str = super().get_ext_filename(fullname)  # type: ignore[no-untyped-call]
        return filename

    @staticmethod
    def _stand_in(fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.py"

    @staticmethod
    def _compile(extension: NativeExtension, name: str) -> Path:
        check_requirements("ninja", "pybind11")
        import ninja

        folder = build_folder()
        module = f"{folder}/{name}"
        file = ROOT / folder / "build.ninja"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(extension.describe().ninja_file(folder, module))
        done = subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-f", file.relative_to(ROOT)], cwd=ROOT)
        if done.returncode != 0:
            raise SystemExit("auxfast: the native build failed; the compiler's messages are above")
        return ROOT / module
