"""Gradient hooks of the user are honoured, whatever they did in an earlier call."""

from __future__ import annotations

import pytest
import torch

from auxfast import hypergradient
from auxfast.solvers import MINRES, ConjugateGradient, Dense, Nystrom

SOLVERS = {
    "MINRES": MINRES(tol=1e-10),
    "CG": ConjugateGradient(tol=1e-10),
    "CG, batches for its preconditioner": ConjugateGradient(tol=1e-10, preconditioner=Nystrom(rank=20)),
    "dense, batches only": Dense(),
}


@pytest.mark.parametrize("factors", [(1.0, 0.1), (0.1, 1.0)])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_hook_whose_factor_changes_between_calls(solver, factors):
    """The factor is in the gradient of both losses and cancels: the hypergradient is the same with any."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 12, dtype=torch.float64), torch.randn(60, 4, dtype=torch.float64)
    w = torch.nn.Parameter(torch.linalg.lstsq(x, y).solution)
    phi = torch.zeros(60, dtype=torch.float64, requires_grad=True)  # weights of examples
    hessian = 2 / 4 * x.T @ x
    outer_gradient = 2 / 80 * x[:20].T @ (x[:20] @ w - y[20:40]).detach()
    exact = -(2 / 4 * (x @ torch.linalg.solve(hessian, outer_gradient)) * (x @ w - y).detach()).sum(1)
    factor = 1.0
    w.register_hook(lambda grad: grad * factor)
    for now in factors:
        factor = now
        inner_loss = (phi.exp() * (x @ w - y).square().mean(1)).sum()
        outer_loss = (x[:20] @ w - y[20:40]).square().mean()
        result = hypergradient(outer_loss, inner_loss, [w], [phi], solver=solver)
        assert result.stats.converged
        torch.testing.assert_close(result.grads[0], exact, rtol=1e-7, atol=1e-8 * float(exact.abs().max()))
