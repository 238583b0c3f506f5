"""Adam on a vector with absent entries."""

from __future__ import annotations

import pytest
import torch

from auxfast.weighting.adam import Adam


def test_as_torch_optim():
    generator = torch.Generator().manual_seed(0)
    ours, adam = torch.zeros(4, dtype=torch.float64), Adam(4, lr=0.05).double()
    theirs = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theirs], lr=0.05)
    for _ in range(50):
        gradient = torch.randn(4, generator=generator, dtype=torch.float64) * torch.tensor([1e-3, 1, 10, 1e3])
        ours += adam.update(gradient, torch.ones(4, dtype=torch.bool))
        theirs.grad = gradient
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_absent_entries_wait():
    """An entry sees only its own gradients, whatever stands in its place while it is absent."""
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(20, 2, generator=generator)
    whole, gaps = Adam(2, lr=0.1), Adam(2, lr=0.1)
    expected = [whole.update(g, torch.tensor([True, True])) for g in gradients]
    found = []
    for gradient in gradients:
        update = gaps.update(torch.tensor([torch.nan, gradient[1]]), torch.tensor([False, True]))
        assert update[0] == 0
        found.append(gaps.update(torch.tensor([gradient[0], torch.inf]), torch.tensor([True, False])))
        found[-1][1] = update[1]
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_a_gradient_whose_square_overflows_is_taken_for_the_largest():
    """Otherwise the running average of squares would be inf, and all later steps 0."""
    adam, present = Adam(1, lr=0.1), torch.ones(1, dtype=torch.bool)
    assert adam.update(torch.tensor([1e30]), present).item() == pytest.approx(-0.1)
    assert adam.square.isfinite().all()
    assert adam.update(torch.tensor([-1e30]), present).item() > 0


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan")])
def test_lr_out_of_range(lr):
    with pytest.raises(ValueError, match="lr must be positive and finite, got"):
        Adam(2, lr)
