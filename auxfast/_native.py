"""The native module, loaded once, and the choice whether an op runs on its kernel or on its PyTorch reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch  # first: the native module links to torch's libraries, which this loads

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
_KERNEL_DEVICES = frozenset(device for device in ("cpu", "cuda") if _BUILD[f"{device}_kernels"])


@cache  # `device.type` writes a string each time, 8 us in a training step
def has_kernels(device: torch.device) -> bool:
    return device.type in _KERNEL_DEVICES


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
    `cuda_kernels` (compute capabilities compiled, empty for a CPU-only build); `cuda_toolkit` (version or None);
    `cuda_available` (whether torch sees a GPU now). After a build with AUXFAST_BUILD=none there are no kernels, and
    `compiler` says so.
    """
    return {"auxfast": __version__, "torch": torch.__version__, **_BUILD, "cuda_available": torch.cuda.is_available()}
