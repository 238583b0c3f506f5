"""Tests marked `cuda` run where there is a GPU and auxfast has kernels for it, and are skipped elsewhere."""

from __future__ import annotations

import pytest
import torch

import auxfast


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch.cuda.is_available() is False")
    if not auxfast.build_info()["cuda_kernels"]:
        pytest.skip("needs CUDA kernels, and auxfast was built without")
