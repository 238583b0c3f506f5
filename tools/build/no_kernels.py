"""The stand-in for the native module that AUXFAST_BUILD=none installs as auxfast/_C.py: no op has a kernel."""

from typing import Any


def build_info() -> dict[str, Any]:
    return {
        "compiler": "none: built with AUXFAST_BUILD=none, so every op runs on the PyTorch reference",
        "cpu_kernels": [],
        "cpu_kernels_in_use": "none",
        "cuda_kernels": [],
        "cuda_ptx": [],
        "cuda_toolkit": None,
    }


def cuda_driver_version() -> int:
    return 0
