"""Bilevel problems in float64 whose hypergradient is known, for the tests of the implicit layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxfast.solvers import Matvec, SolverState, SolveStats


@dataclass(frozen=True)
class Dense:
    """Forms the matrix column by column and solves exactly: so that what is tested is not the solver."""

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        sizes, b = [t.numel() for t in rhs], flat(rhs)

        def cut(vector: Tensor) -> list[Tensor]:
            return [p.reshape(t.shape) for p, t in zip(vector.split(sizes), rhs, strict=True)]

        columns = [flat(matvec(cut(unit))) for unit in torch.eye(len(b), dtype=b.dtype)]
        x = torch.linalg.solve(torch.stack(columns, dim=1), b)
        return cut(x), SolveStats(0, len(b), 0.0, True, "converged")


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


class Ridge:
    """Ridge regression with a learned log weight decay (per feature) and learned example weights.

    inner(w) = 1/2 sum_i s_i (x_i w - y_i)^2 + 1/2 sum_j e^{d_j} w_j^2
    outer(w) = 1/2 |X' w - y'|^2 + sum_j d_j^2
    With A = X^T S X + diag(e^d), w* = A^-1 X^T S y, r = X w - y and q = A^-1 grad outer:
    d outer / d d_j = -q_j e^{d_j} w_j + 2 d_j,  d outer / d s_i = -(x_i q) r_i.
    """

    def __init__(self, rows: int = 12, features: int = 5) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x, self.y = normal(rows, features), normal(rows)
        self.outer_x, self.outer_y = normal(rows, features), normal(rows)
        self.decay = (0.1 * normal(features)).requires_grad_()
        self.weights = normal(rows).exp().requires_grad_()
        self.w = self.solution().requires_grad_()

    def hessian(self) -> Tensor:
        s, d = self.weights.detach(), self.decay.detach()
        return self.x.T @ (s[:, None] * self.x) + torch.diag(d.exp())

    def solution(self) -> Tensor:
        return torch.linalg.solve(self.hessian(), self.x.T @ (self.weights.detach() * self.y))

    def outer_loss(self) -> Tensor:
        return 0.5 * (self.outer_x @ self.w - self.outer_y).square().sum() + self.decay.square().sum()

    def inner_loss(self) -> Tensor:
        fit = (self.weights * (self.x @ self.w - self.y).square()).sum()
        return 0.5 * fit + 0.5 * (self.decay.exp() * self.w.square()).sum()

    def exact(self) -> tuple[Tensor, Tensor]:
        """The hypergradient in (decay, weights)."""
        w, d = self.w.detach(), self.decay.detach()
        q = torch.linalg.solve(self.hessian(), self.outer_x.T @ (self.outer_x @ w - self.outer_y))
        return -q * d.exp() * w + 2 * d, -(self.x @ q) * (self.x @ w - self.y)


class Reverse(torch.autograd.Function):
    """Gradient reversal, as in domain-adversarial training: a backward pass that is not the derivative of the forward
    pass."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad
