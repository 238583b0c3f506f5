"""A solver of one's own: anything with a method `solve` serves.

The program writes steepest descent with an exact line search, and compares it with two solvers of auxfast on the
hypergradient of a ridge regression in the logarithm of its weight decays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import auxfast
from auxfast.solvers import MINRES, Dense, Matvec, Solver, SolverState, SolveStats, StopReason


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product over all tensors."""
    return sum(torch.sum(u * v).item() for u, v in zip(a, b, strict=True))


@dataclass(frozen=True)
class SteepestDescent:
    """x <- x + (r . r / r . H r) r with the residual r = b - H x, for a positive definite H."""

    steps: int = 1000
    tol: float = 1e-6

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `H x = rhs`, where `matvec(v)` is `H v` and all of these are lists of tensors."""
        if batched:
            raise ValueError("SteepestDescent solves for one right-hand side at a time")
        x, residual = [torch.zeros_like(b) for b in rhs], [b.clone() for b in rhs]
        norm = initial = dot(rhs, rhs) ** 0.5
        iterations = 0
        while norm > self.tol * initial and iterations < self.steps:
            product = matvec(residual)
            length = norm**2 / dot(residual, product)
            x = [u + length * r for u, r in zip(x, residual, strict=True)]
            residual = [r - length * p for r, p in zip(residual, product, strict=True)]
            norm, iterations = dot(residual, residual) ** 0.5, iterations + 1
        product = matvec(x)  # one more, for the true residual
        error = [b - p for b, p in zip(rhs, product, strict=True)]
        relative = dot(error, error) ** 0.5 / initial if initial else 0.0
        converged = norm <= self.tol * initial
        reason = StopReason.CONVERGED if converged else StopReason.STEPS
        return x, SolveStats(iterations, iterations + 1, relative, converged, reason)


def main() -> dict[str, tuple[float, int]]:
    """Relative error of the hypergradient, and products that it took, for each solver."""
    torch.manual_seed(0)
    x, held_out = torch.randn(100, 20, dtype=torch.float64), torch.randn(50, 20, dtype=torch.float64)
    y, held_out_y = x[:, :5].sum(1) + torch.randn(100), held_out[:, :5].sum(1)
    log_decay = torch.full((20,), -2.0, dtype=torch.float64, requires_grad=True)
    hessian = x.T @ x / 100 + torch.diag(log_decay.detach().exp())
    w = torch.linalg.solve(hessian, x.T @ y / 100).requires_grad_()

    def hypergradient(solver: Solver) -> auxfast.HypergradientResult:
        inner_loss = (x @ w - y).square().mean() + (log_decay.exp() * w.square()).sum()
        outer_loss = (held_out @ w - held_out_y).square().mean()
        return auxfast.hypergradient(outer_loss, inner_loss, [w], [log_decay], solver=solver)

    exact = hypergradient(Dense()).grads[0]
    found = {}
    for solver in (SteepestDescent(), MINRES(tol=1e-6), Dense()):
        result = hypergradient(solver)
        error = ((result.grads[0] - exact).norm() / exact.norm()).item()
        name, stats = type(solver).__name__, result.stats
        found[name] = error, stats.matvecs
        print(f"{name:<16} {stats.matvecs:>3} products, residual {stats.residual:.1e}, error {error:.1e}")
    return found


if __name__ == "__main__":
    main()
