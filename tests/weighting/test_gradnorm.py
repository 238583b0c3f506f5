"""Chen, Badrinarayanan, Lee and Rabinovich."""

from __future__ import annotations

import pytest
import torch

from auxfast.weighting import GradNorm

from .problems import linear_losses, network_losses

GRADIENTS = [[3.0, 4.0], [0.0, 1.0]]  # norms 5 and 1


def test_two_steps_by_hand():
    """The rates are 1 at the first call: G = (5, 1), the target 3 for both, the signs (+, -). Adam's first step is -lr
    times the sign: (0.9, 1.1), of sum 2 already."""
    weighting = GradNorm(2, lr=0.1)
    assert weighting(*linear_losses([2.0, 1.0], GRADIENTS)).tolist() == [1, 1]
    torch.testing.assert_close(weighting(*linear_losses([2.0, 1.0], GRADIENTS)), torch.tensor([0.9, 1.1]))


def test_a_loss_that_trains_slowly_gains():
    """Norms of 1, so only the rates count. Loss ratios 1/2 and 1 are rates 2/3 and 4/3: the first loss is above its
    target and loses. With alpha = 0 the target is the mean, and nothing moves."""
    for alpha, expected in [(1.0, [0.9, 1.1]), (0.0, [1.0, 1.0])]:
        weighting = GradNorm(2, alpha=alpha, lr=0.1)
        weighting.initial_losses.copy_(torch.tensor([2.0, 3.0]))
        weighting(*linear_losses([1.0, 3.0], [[1.0, 0.0], [0.0, 1.0]]))
        torch.testing.assert_close(weighting.weights, torch.tensor(expected))


def test_gradient_is_that_of_the_objective(monkeypatch):
    """The gradient given to Adam, against autograd on the L1 objective with the target held constant."""
    alpha = 1.5
    weighting = GradNorm(4, alpha=alpha).double()
    start, _ = network_losses(4, 0, dtype=torch.float64)
    weighting(*network_losses(4, 0, dtype=torch.float64))
    weights = torch.tensor([0.4, 0.9, 1.3, 1.4], dtype=torch.float64)
    weighting.weights.copy_(weights)
    losses, parameters = network_losses(4, 1, dtype=torch.float64)

    weights.requires_grad_()
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    norms = torch.stack([torch.cat([g.flatten() for g in grad]).norm() for grad in grads])
    ratios = (losses / start).detach()
    target = ((weights * norms).mean() * (ratios / ratios.mean()) ** alpha).detach()
    (expected,) = torch.autograd.grad((weights * norms - target).abs().sum(), weights)

    seen = []
    monkeypatch.setattr(weighting.adam, "update", lambda gradient, present: seen.append(gradient) or 0 * gradient)
    weighting(losses, parameters)
    torch.testing.assert_close(seen[0], expected)
    assert (expected > 0).any()
    assert (expected < 0).any()


@pytest.mark.parametrize("lr", [0.025, 0.5, 10.0])
def test_positive_and_of_sum_num_losses(lr):
    weighting = GradNorm(4, lr=lr)
    for step in range(30):
        weights = weighting(*network_losses(4, step))
        assert (weights > 0).all()
        torch.testing.assert_close(weights.sum(), torch.tensor(4.0))
    assert weights.std() > 0.1  # they did move


def test_balances_the_norms():
    """The weighted norms become equal for alpha = 0: weights 1/3 and 5/3 for norms 5 and 1."""
    weighting = GradNorm(2, alpha=0.0, lr=0.01)
    for _ in range(300):
        weights = weighting(*linear_losses([2.0, 1.0], GRADIENTS))
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 5 / 3]), rtol=0.05, atol=0)


def test_initial_loss_is_that_of_the_first_presence():
    weighting = GradNorm(2)
    for first, second in [(2.0, 0.0), (1.0, 3.0), (0.5, 4.0)]:
        weighting(*linear_losses([first, second], GRADIENTS))
    assert weighting.initial_losses.tolist() == [2, 3]


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_squares_outside_of_the_range_of_float32(scale):
    """Two steps as those of gradients of 5 and 1: Adam's first step knows no scale, if that is above its eps."""
    weighting = GradNorm(2, lr=0.1).double()
    gradients = [[scale * g for g in row] for row in GRADIENTS]
    norms = []
    update = weighting.adam.update
    weighting.adam.update = lambda gradient, present: norms.append(gradient.abs()) or update(gradient, present)
    weighting(*linear_losses([2.0, 1.0], gradients))
    torch.testing.assert_close(norms[0] / scale, torch.tensor([5.0, 1.0], dtype=torch.float64))


def test_errors():
    with pytest.raises(ValueError, match="alpha must be at least 0 and finite, got -1"):
        GradNorm(2, alpha=-1)
    with pytest.raises(ValueError, match="lr must be positive and finite, got 0"):
        GradNorm(2, lr=0)
    with pytest.raises(ValueError, match=r"losses must not be negative for gradnorm, got \[2.0, -1.0\]"):
        GradNorm(2)(*linear_losses([2.0, -1.0], GRADIENTS))
