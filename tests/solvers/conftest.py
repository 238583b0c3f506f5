"""Fixtures that make solvers read numbers from the CPU as rarely as they do from a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def set_check_every(monkeypatch) -> Callable[[int], None]:
    """Sets after how many steps solvers read whether to go on. With more than 1 they work as on a GPU: their scalars
    stay on the device."""

    def set_steps(steps: int) -> None:
        for module in ("series", "chebyshev", "krylov", "gradient_flow", "restarted"):
            monkeypatch.setattr(f"auxfast.solvers.{module}.steps_per_check", lambda device: steps)

    return set_steps


@pytest.fixture(params=[1, 8], ids=["as on a CPU", "as on a GPU"])
def check_every(request, set_check_every) -> int:
    """The number of steps, set for the test."""
    set_check_every(request.param)
    steps: int = request.param
    return steps
