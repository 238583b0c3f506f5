"""The native module, loaded once, and the choice whether an op runs on its kernel or on its PyTorch reference."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch  # first: the native module links to torch's libraries, which this loads

from auxfast._callers import stacklevel
from auxfast._version import __version__


def _hidden_by_this() -> str:
    """The remark that this folder hides an auxfast which is installed elsewhere on `sys.path`, if it does."""
    here = Path(__file__).resolve().parent
    for entry in sys.path:
        other = Path(entry, "auxfast").resolve()
        if other != here and any(other.glob("_C.*[!i]")):  # not _C.pyi, which lies in every source tree
            return f" {here} hides the auxfast in {other}: started in another folder, Python finds that one."
    return ""


try:
    import auxfast._C as _C  # `from auxfast import _C` would speak of a circular import where it is missing
except ImportError as error:
    raise ImportError(
        f"auxfast's native module could not be loaded ({error}). From a source tree, build it with "
        "`pip install .` (or `pip install -e .`) in the environment that has your torch, or without a compiler: "
        f"`AUXFAST_BUILD=none pip install .`.{_hidden_by_this()}"
    ) from error

_REFERENCE_ONLY: ContextVar[bool] = ContextVar("auxfast_reference_kernels", default=False)
_BUILD: dict[str, Any] = _C.build_info()


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _driver() -> str | None:
    """The newest version of CUDA that the NVIDIA driver knows; `None` without a driver, or without CUDA kernels."""
    version = _C.cuda_driver_version()
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def _obstacle(device: torch.device) -> str | None:
    """Why the CUDA kernels of this build cannot run on a GPU that torch sees, and what to do; `None` if they can.

    Machine code for a capability x.y runs on x.z with z >= y, under any driver of the toolkit's major version. PTX runs
    on its capability and on all that are newer; the driver compiles it, and must be as new as the toolkit for that.
    """
    if torch.version.hip is not None:
        return f"this torch is built for ROCm {torch.version.hip}, and the kernels are for CUDA"
    if not _BUILD["cuda_kernels"]:
        return "this build has none: install auxfast where there is an nvcc (AUXFAST_BUILD=cuda says where it looks)"
    capability = torch.cuda.get_device_capability(device)
    built, ptx = ([divmod(int(digits), 10) for digits in _BUILD[key]] for key in ("cuda_kernels", "cuda_ptx"))
    has_code = any(major == capability[0] and minor <= capability[1] for major, minor in built)
    if not has_code and not any(virtual <= capability for virtual in ptx):
        listed = ", ".join(f"{major}.{minor}" for major, minor in built)
        remedy = "for older ones there are none" if capability < min(built) else "build it with a newer CUDA toolkit"
        return f"it has compute capability {capability[0]}.{capability[1]}, and this build is for {listed}: {remedy}"
    toolkit, driver = _BUILD["cuda_toolkit"], _driver() or "0.0"
    needed = f"{_version(toolkit)[0]}.0" if has_code else toolkit
    if _version(driver) < _version(needed):
        return (
            f"the NVIDIA driver knows CUDA {driver}, and this build, with CUDA {toolkit}, needs {needed}: update the "
            f"driver, or build auxfast with an older CUDA toolkit (CUDA_HOME), such as torch's {torch.version.cuda}"
        )
    return None


class _KernelsByDevice(dict[torch.device, bool]):
    """Whether ops have kernels that run on a device. Each GPU is asked when its first tensor comes, and then never
    again: nothing is initialized before, and the answer is there when a CUDA graph is captured."""

    def __missing__(self, device: torch.device) -> bool:
        has_any = bool(_BUILD["cpu_kernels"])  # not so after AUXFAST_BUILD=none, which asked for the reference
        if device.type != "cuda" or not (has_any and torch.cuda.is_available()):
            answer = self[device] = device.type == "cpu" and has_any
            return answer
        if device == torch.device("cuda"):  # the current one, which may change; tensors name theirs, so no op asks this
            return _obstacle(torch.device("cuda", torch.cuda.current_device())) is None
        obstacle = _obstacle(device)
        answer = self[device] = obstacle is None
        if not answer:
            name = torch.cuda.get_device_name(device)
            warnings.warn(
                f"auxfast's ops run on their PyTorch reference on {device} ({name}), which is slower: the CUDA kernels "
                f"cannot run there, since {obstacle}.",
                RuntimeWarning,
                stacklevel=stacklevel(),
            )
        return answer


# Ops ask at every call: this is a function in C, and `device.type` would write a string each time.
has_kernels = _KernelsByDevice().__getitem__
within_reference_kernels = _REFERENCE_ONLY.get


def use_native(device: torch.device) -> bool:
    """Whether ops on `device` run on auxfast's kernels (else on the reference in PyTorch operations)."""
    return has_kernels(device) and not within_reference_kernels()


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Within this context every op runs on its pure-PyTorch reference: slower, on any device, differentiable to any
    order. The choice is made when an op is called; a graph that was recorded before keeps what it recorded."""
    token = _REFERENCE_ONLY.set(True)
    try:
        yield
    finally:
        _REFERENCE_ONLY.reset(token)


def build_info() -> dict[str, Any]:
    """What was built and what runs here.

    Keys: `auxfast`, `torch` (versions); `compiler`; `cpu_kernels` (instruction sets compiled); `cpu_kernels_in_use`;
    `cuda_kernels` (compute capabilities compiled, empty for a CPU-only build); `cuda_ptx` (those whose PTX is there for
    newer GPUs); `cuda_toolkit` (version or None); `cuda_driver` (the newest CUDA that the NVIDIA driver knows, or None
    without driver or CUDA kernels); `cuda_available` (whether torch sees a GPU now). After a build with
    AUXFAST_BUILD=none there are no kernels, and `compiler` says so.
    """
    here = {"cuda_driver": _driver(), "cuda_available": torch.cuda.is_available()}
    return {"auxfast": __version__, "torch": torch.__version__, **_BUILD, **here}
