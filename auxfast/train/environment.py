"""The machine and the versions, as a bug report and the reader of a result need them."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import auxfast
from auxfast._native import use_native

_PACKAGES = (
    *("numpy", "scipy", "scikit-learn", "scikit-image", "matplotlib"),
    *("cattrs", "jinja2", "tqdm", "tensorboard"),
)


def environment() -> dict[str, Any]:
    """Versions, processors, devices, how auxfast was built, and which kernels run on which device."""
    return {
        "versions": _versions(),
        "cpu": {
            "model": _cpu_model(),
            "logical cores": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
        },
        "cuda": _cuda(),
        "kernels": {kind: "native" if use_native(torch.device(kind)) else "reference" for kind in ("cpu", "cuda")},
        "build": auxfast.build_info(),
    }


def _versions() -> dict[str, str]:
    versions = {
        "auxfast": auxfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**versions, "platform": platform.platform()}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    """Driver and devices. The driver is looked up without torch: a torch without CUDA should not hide it."""
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        driver = "none found"
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
    return {"driver": driver, "torch's CUDA": torch.version.cuda or "none", "devices": devices or "none"}
