"""Kendall, Gal and Cipolla."""

from __future__ import annotations

import math

import pytest
import torch

from auxfast.weighting import Uncertainty


def test_two_steps_by_hand():
    """d/ds (exp(-s) L + s / 2) = 1/2 - exp(-s) L: at s = 0 -3/2, 0 and 3/8 for L = 2, 1/2, 1/8. Adam's first step is
    -lr times the sign: s = (0.1, 0, -0.1), and the weights are (exp(-0.1), 1, exp(0.1))."""
    weighting = Uncertainty(3, lr=0.1).double()
    losses = torch.tensor([2.0, 0.5, 0.125], dtype=torch.float64)
    assert weighting(losses, []).tolist() == [1, 1, 1]
    expected = torch.tensor([math.exp(-0.1), 1, math.exp(0.1)], dtype=torch.float64)
    torch.testing.assert_close(weighting(losses, []), expected, rtol=1e-6, atol=0)


def test_settles_where_the_paper_says():
    """exp(-s) L = 1/2: the weight is 1 / (2 L)."""
    weighting = Uncertainty(3)
    losses = torch.tensor([2.0, 0.5, 0.05])
    for _ in range(1000):
        weights = weighting(losses, [])
    torch.testing.assert_close(weights, torch.tensor([0.25, 1.0, 10.0]), rtol=1e-3, atol=0)


def test_an_absent_loss_stays():
    weighting = Uncertainty(2)
    for _ in range(5):
        weighting(torch.tensor([2.0, 2.0]), [])
    before = weighting.log_variances.clone()
    weighting(torch.tensor([2.0, 0.0]), [])
    assert weighting.log_variances[1] == before[1]
    assert weighting.log_variances[0] > before[0]


@pytest.mark.parametrize(("dtype", "loss"), [(torch.float32, 1e-40), (torch.float16, 1e-6)])
def test_the_weight_of_a_tiny_loss_stays_finite(dtype, loss):
    """It would settle at 1 / (2 L), which is above the largest number."""
    weighting = Uncertainty(2, lr=1.0)
    losses = torch.tensor([loss, 0.5], dtype=dtype)
    for _ in range(300):
        weights = weighting(losses, [])
        assert weights.isfinite().all()
    assert weights[0] > 1e4


def test_lr_out_of_range():
    with pytest.raises(ValueError, match="lr must be positive and finite, got 0"):
        Uncertainty(2, lr=0)
