"""Sener and Koltun."""

from __future__ import annotations

import pytest
import torch

from auxfast.weighting import MGDA

from .problems import linear_losses, network_losses


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        # On the segment: a (1, 0) + (1 - a) (0, 2), shortest at a = 4 / (1 + 4).
        ([[1.0, 0.0], [0.0, 2.0]], [0.8, 0.2]),
        # (1, 0) . (2, 1) = 2 is more than |(1, 0)|^2: the shorter one alone.
        ([[1.0, 0.0], [2.0, 1.0]], [1.0, 0.0]),
        # Three axes: the middle.
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [1 / 3, 1 / 3, 1 / 3]),
        # The third is beyond the segment of the others.
        ([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0.5, 0.5, 0.0]),
    ],
)
def test_by_hand(gradients, expected):
    losses, parameters = linear_losses([1.0] * len(gradients), gradients)
    torch.testing.assert_close(MGDA(len(gradients))(losses, parameters), torch.tensor(expected))


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("none", [0.8, 0.2]),
        # Divided by 1 and 2: (1, 0) and (0, 1), a = (1, 1) / 2. Weights in the ratio 1/2 : 1/4.
        ("l2", [2 / 3, 1 / 3]),
        # Divided by the losses 1 and 4: (1, 0) and (0, 1/2), a = (1, 4) / 5. Weights 1/5 : 4/5 / 4.
        ("loss", [1 / 2, 1 / 2]),
        # Divided by 1 and 8: (1, 0) and (0, 1/4), a = (1, 16) / 17. Weights 1/17 : 16/17 / 8.
        ("loss+", [1 / 3, 2 / 3]),
    ],
)
def test_normalization_by_hand(normalization, expected):
    losses, parameters = linear_losses([1.0, 4.0], [[1.0, 0.0], [0.0, 2.0]])
    weights = MGDA(2, normalization=normalization)(losses, parameters)
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
def test_every_loss_falls(normalization):
    """Unless the point is stationary: three losses in 50 parameters, so it is not."""
    for seed in range(10):
        losses, parameters = network_losses(3, seed, dtype=torch.float64)
        weights = MGDA(3, normalization=normalization)(losses, parameters)
        assert weights.sum().item() == pytest.approx(1)
        gradients = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
                for loss in losses
            ]
        )
        assert (gradients @ (weights @ gradients) > 0).all()


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
def test_absent_losses_have_weight_zero(normalization):
    """An absent loss has the shortest gradient there is, and would take all the weight."""
    weighting = MGDA(3, normalization=normalization)
    assert weighting(*network_losses(3, 0, absent=(1,)))[1] == 0
    assert weighting(*network_losses(3, 0, absent=(0, 1))).tolist() == [0, 0, 1]
    assert weighting(*network_losses(3, 0, absent=(0, 1, 2))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
def test_a_loss_at_its_minimum_is_stationary(normalization):
    losses, parameters = linear_losses([1.0, 4.0, 2.0], [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    assert MGDA(3, normalization=normalization)(losses, parameters).tolist() == [0, 1, 0]


def test_errors():
    with pytest.raises(ValueError, match=r"normalization must be one of none, l2, loss, loss\+, got 'l1'"):
        MGDA(2, normalization="l1")
    for tolerance in (-1e-3, 1.0, float("nan")):
        with pytest.raises(ValueError, match="tolerance must be from 0 to below 1, got"):
            MGDA(2, tolerance=tolerance)
    with pytest.raises(ValueError, match=r"normalization 'loss' needs losses above 0, got \[1.0, -1.0\]"):
        MGDA(2, normalization="loss")(*linear_losses([1.0, -1.0], [[1.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
def test_a_loss_of_0_that_normalises_is_absent(normalization):
    """Divided by it, its gradient would be the longest of all."""
    losses, parameters = linear_losses([1.0, 0.0, 2.0], [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    weights = MGDA(3, normalization=normalization)(losses, parameters)
    assert weights[1] == 0
    assert (weights[[0, 2]] > 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e36])
@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
def test_squares_outside_of_the_range_of_float32(normalization, scale):
    values, gradients = [1.0, 2.0, 3.0], [[1.0, 0.0], [0.0, 2.0], [3.0, -1.0]]
    expected = MGDA(3, normalization=normalization)(*linear_losses(values, gradients))
    scaled = linear_losses([scale * v for v in values], [[scale * g for g in row] for row in gradients])
    torch.testing.assert_close(MGDA(3, normalization=normalization)(*scaled), expected)
