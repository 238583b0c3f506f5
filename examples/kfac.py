"""A preconditioner from another library: the inverse of KFAC, by curvlinops (pip install curvlinops-for-pytorch).

A linear model with 60 inputs of different units and 8 outputs learns by least squares, and the hypergradient is that of
its weight decay. Its Hessian is a Kronecker product, so KFAC is exact, and the solve takes next to no products. For
networks KFAC is an approximation: the products with and without it tell what it is worth.
"""

from __future__ import annotations

import curvlinops
import torch
from torch.nn.functional import mse_loss

import auxfast
from auxfast.compat.linear_operators import from_curvlinops
from auxfast.solvers import ConjugateGradient, InverseOperator, Preconditioner


def main() -> dict[str, auxfast.HypergradientResult]:
    """The hypergradient and its statistics without a preconditioner, and with KFAC."""
    torch.manual_seed(0)
    x, held_out = (torch.randn(300, 60, dtype=torch.float64) * torch.logspace(-1, 1, 60) for _ in range(2))
    truth = torch.randn(60, 8, dtype=torch.float64)
    y, held_out_y = (inputs @ truth + torch.randn(300, 8) for inputs in (x, held_out))
    net = torch.nn.Linear(60, 8, bias=False).double()
    params = list(net.parameters())
    log_decay = torch.full((), -4.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(params, max_iter=500, line_search_fn="strong_wolfe")

    def inner_loss() -> torch.Tensor:
        return mse_loss(net(x), y) + log_decay.exp() / 2 * net.weight.square().sum()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = inner_loss()
        loss.backward(inputs=params)
        return loss

    optimizer.step(closure)
    factors = curvlinops.KFACLinearOperator(net, torch.nn.MSELoss(), params, [(x, y)], fisher_type="type-2")
    inverse = curvlinops.KFACInverseLinearOperator(factors, damping=log_decay.exp().item(), use_exact_damping=True)
    kfac = InverseOperator(from_curvlinops(inverse))
    preconditioners: dict[str, Preconditioner | None] = {"none": None, "KFAC": kfac}
    results = {}
    for name, preconditioner in preconditioners.items():
        solver = ConjugateGradient(steps=2000, tol=1e-6, preconditioner=preconditioner)
        outer_loss = mse_loss(net(held_out), held_out_y)
        results[name] = auxfast.hypergradient(outer_loss, inner_loss(), params, [log_decay], solver=solver)
        stats = results[name].stats
        print(f"{name:<5} {stats.matvecs:>4} products, residual {stats.residual:.1e}")
    return results


if __name__ == "__main__":
    main()
