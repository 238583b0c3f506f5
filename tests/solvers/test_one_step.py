"""`x = lr * b` for nothing: no product, and so no residual."""

from __future__ import annotations

import math

import pytest
import torch

from auxfast.solvers import OneStep

from .systems import flat, symmetric


@pytest.mark.parametrize("mixed", ["exact", "difference"])
def test_scales_without_a_product(mixed):
    system = symmetric()
    x, stats = OneStep(0.1, mixed=mixed).solve(system.matvec, system.rhs)
    torch.testing.assert_close(flat(x), 0.1 * flat(system.rhs))
    assert (stats.iterations, stats.matvecs, system.products) == (0, 0, 0)
    assert (stats.step_size, stats.converged, stats.stop_reason) == (0.1, False, "steps")
    assert math.isnan(stats.residual)


def test_several_right_hand_sides_know_which_are_zero():
    b = torch.stack([torch.ones(3), torch.zeros(3)])
    (x,), stats = OneStep(0.5).solve(lambda v: pytest.fail("no product"), [b], batched=True)
    assert torch.equal(x, 0.5 * b)
    assert math.isnan(stats.residuals[0])
    assert stats.residuals[1] == 0
    assert stats.stop_reason == "steps"


def test_look_ahead_needs_the_outer_loss():
    with pytest.raises(ValueError, match=r"OneStep\(lookahead=True\) evaluates the outer loss"):
        OneStep(0.1, lookahead=True).solve(lambda v: v, [torch.ones(3)])
