"""Weightings on a GPU."""

from __future__ import annotations

import pytest
import torch
from weighting.problems import made, weights_of

from auxfast.weighting import WEIGHTINGS

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_the_weights_are_those_of_the_cpu(name):
    expected = weights_of(made(name).double(), range(6), dtype=torch.float64)
    found = weights_of(made(name).double().cuda(), range(6), dtype=torch.float64, device="cuda")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs)
