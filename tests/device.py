"""The device that the tests of `device` run on: the CPU, or a GPU by the environment's AUXFAST_TEST_DEVICE=cuda."""

from __future__ import annotations

import os
from typing import Any

import pytest

DEVICE = os.environ.get("AUXFAST_TEST_DEVICE", "cpu")


def on_device(*values: Any) -> Any:
    """Values of a parametrisation that put tensors on DEVICE. On a GPU, `-m cuda` selects them."""
    return pytest.param(*values, marks=[pytest.mark.cuda] if DEVICE != "cpu" else [])
