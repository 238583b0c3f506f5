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
