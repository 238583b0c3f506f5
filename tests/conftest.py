"""How many threads a test has; and tests marked `cuda` run where there is a GPU and auxfast has kernels for it, and are
skipped elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import auxfast

# Most of their work is small: on a busy machine, more threads spend their time waiting for each other. Tests of what
# threads change set their number themselves.
ONE_THREAD = ("compat", "ops", "train")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread in those folders; a test leaves as many threads as it found."""
    threads = torch.get_num_threads()
    if request.path.relative_to(Path(__file__).parent).parts[0] in ONE_THREAD:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch.cuda.is_available() is False")
    if not auxfast.build_info()["cuda_kernels"]:
        pytest.skip("needs CUDA kernels, and auxfast was built without")
