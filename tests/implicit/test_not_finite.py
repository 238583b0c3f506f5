"""Second derivatives that hold NaN or inf, and solves that overflow by themselves: each is called what it is."""

from __future__ import annotations

import pytest
import torch

from auxfast import hypergradient
from auxfast.solvers import MINRES, Chebyshev, ConjugateGradient, Dense, Identity, Jacobi, Neumann, Nystrom


@pytest.mark.parametrize(
    "solver",
    [
        MINRES(),
        ConjugateGradient(),
        Neumann(3, 0.1),
        Neumann(3, 0.1, certify=False),
        Neumann(3),
        Chebyshev(),
        Nystrom(3),
        Dense(),
        Identity(),
        MINRES(preconditioner=Jacobi()),
        MINRES(warm_start=True),
    ],
)
def test_second_derivatives_that_are_not_finite_are_called_so(solver):
    """The norm has no second derivative at 0."""
    w, v, phi = (
        torch.zeros(2, requires_grad=True),
        torch.ones(2, requires_grad=True),
        torch.zeros(1, requires_grad=True),
    )
    inner = (w + v - 3).square().sum() + phi.exp() * (w.norm() + v.square().sum())
    stats = hypergradient(v.sum(), inner, [w, v], [phi], solver=solver, warn=False).stats
    assert (stats.stop_reason, stats.converged) == ("not finite", False)
    assert stats.residual == 1 or not getattr(solver, "certify", True)


def test_second_derivatives_that_are_finite_and_a_step_that_is_not_are_divergence():
    w, phi = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    for solver in (Neumann(300, 1e3), Neumann(300, 1e38), Chebyshev(300, (1e-9, 1e-8)), Identity(1e38)):
        inner = 50 * (w - phi).square().sum()
        stats = hypergradient(w.sum() * 10, inner, [w], [phi], solver=solver, warn=False).stats
        assert (stats.stop_reason, stats.residual <= 1) == ("diverged", True)
