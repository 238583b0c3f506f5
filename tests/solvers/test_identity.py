"""The identity approximation: a scaled right-hand side, with the residual that it really has."""

from __future__ import annotations

import pytest
import torch

from auxfast.solvers import Identity

from .systems import flat, symmetric


@pytest.mark.parametrize("scale", [0.01, 1.0, 3])
def test_scales_and_certifies(scale):
    system = symmetric()
    x, stats = Identity(scale).solve(system.matvec, system.rhs)
    assert torch.equal(flat(x), scale * flat(system.rhs))
    assert stats.residual == pytest.approx(system.residual(x), rel=1e-12)
    assert (stats.iterations, stats.matvecs, system.products) == (0, 1, 1)
    assert (stats.step_size, stats.converged, stats.stop_reason) == (scale, False, "steps")


def test_exact_where_the_operator_is_that_multiple():
    _, stats = Identity(0.5).solve(lambda v: [2 * t for t in v], [torch.rand(5), torch.rand(2, 3)])
    assert (stats.residual, stats.converged, stats.stop_reason) == (0.0, True, "converged")


def test_zero_right_hand_side():
    x, stats = Identity().solve(lambda v: v, [torch.zeros(3), torch.zeros(())])
    assert not flat(x).any()
    assert (stats.residual, stats.converged, stats.stop_reason) == (0.0, True, "trivial")


def test_an_operator_that_returns_nan_has_an_infinite_residual():
    _, stats = Identity().solve(lambda v: [t * torch.nan for t in v], [torch.ones(3)])
    assert stats.residual == float("inf")


def test_right_hand_side_stays_and_solution_has_no_graph():
    rhs = [torch.rand(3, requires_grad=True)]
    before = rhs[0].detach().clone()
    x, _ = Identity(2.0).solve(lambda v: v, rhs)
    assert torch.equal(rhs[0].detach(), before)
    assert not x[0].requires_grad


@pytest.mark.parametrize("rhs", [[], [torch.tensor([1.0, float("nan")])]], ids=["empty", "nan"])
def test_right_hand_side_is_checked(rhs):
    with pytest.raises(ValueError, match="rhs is"):
        Identity().solve(lambda v: v, rhs)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_scale_is_checked(scale):
    with pytest.raises(ValueError, match="scale must be"):
        Identity(scale)
