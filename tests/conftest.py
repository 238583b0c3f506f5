"""The number of threads and the device of a test.

Tests run on the CPU, and those that take the fixture `device` on the device that the environment names: with
AUXFAST_TEST_DEVICE=cuda on a GPU, where they have the mark `cuda`. The tests of cuda_on_gpu, which always have it, are
skipped where there is no GPU or auxfast has no kernels for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from device import DEVICE, on_device

import auxfast
from auxfast._native import use_native


def pytest_configure() -> None:
    if DEVICE != "cpu" and (missing := _missing_for_cuda()):
        raise pytest.UsageError(f"AUXFAST_TEST_DEVICE={DEVICE} {missing}")


def _missing_for_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU, and torch.cuda.is_available() is False"
    if not use_native(torch.device("cuda")):
        return f"needs CUDA kernels that run on this GPU, and this build has none: {auxfast.build_info()}"
    return None


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Most of a test's work is small: on a busy machine, more threads would spend their time waiting for each other.
    Tests of what threads change set their number themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[on_device(DEVICE)])
def device(request: pytest.FixtureRequest) -> str:
    """The device that is tested."""
    name: str = request.param
    return name


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None and (missing := _missing_for_cuda()):
        pytest.skip(missing)
