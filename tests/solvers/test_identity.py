"""The identity approximation: a scaled right-hand side, with the residual that it really has."""

from __future__ import annotations

import pytest
import torch

from auxfast.solvers import Identity

from .systems import Operator, flat, gaussian, symmetric, with_eigenvalues


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


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_where_the_residual_is_unknown_it_returns_zeros(broken):
    x, stats = Identity().solve(lambda v: [t * broken for t in v], [torch.ones(3)])
    assert torch.equal(x[0], torch.zeros(3))
    assert (stats.residual, stats.converged, stats.stop_reason) == (1.0, False, "diverged")


def test_never_overflows():
    x, stats = Identity(3e38).solve(lambda v: v, [torch.full((3,), 1e3)])
    assert torch.equal(x[0], torch.zeros(3))
    assert (stats.residual, stats.stop_reason) == (1.0, "diverged")


@pytest.mark.parametrize("together", [True, False])
def test_several_right_hand_sides(together):
    operator = Operator(with_eigenvalues(torch.linspace(0.5, 2, 6, dtype=torch.float64)))
    b = torch.stack([gaussian(6), torch.zeros(6, dtype=torch.float64), gaussian(6, seed=8)])
    (x,), stats = Identity(0.7).solve(operator if together else lambda v: operator(v), [b], batched=True)
    assert torch.equal(x, 0.7 * b)
    alone = [Identity(0.7).solve(operator, [row])[1].residual for row in b]
    assert stats.residuals == pytest.approx(alone, rel=1e-12)
    assert (stats.residual, stats.matvecs, stats.stop_reason) == (max(stats.residuals), 3, "steps")
    assert alone[1] == 0


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
