"""The Hessian taken for a multiple of the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxfast.ops.neumann import squared_norm
from auxfast.solvers.base import (
    Matvec,
    SolveStats,
    check_positive,
    check_rhs,
    relative_residual,
)


@dataclass(frozen=True)
class Identity:
    """`x = scale * b`: takes `H^-1` for `scale * I` (Luketina et al. 2016, in the paper's related work).

    A baseline that cannot diverge: it keeps the direction of `b` and looks at no curvature. One
    Hessian-vector product is spent, on the certificate alone: the residual is the true one of the returned
    solution. It may well exceed 1, for the scale is then wrong; that is reported and not warned of.

    Args:
        scale: above 0; the inner learning rate makes it one unrolled step of gradient descent.

    Raises:
        ValueError: a scale outside its range.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)

    def solve(self, matvec: Matvec, rhs: Sequence[Tensor]) -> tuple[list[Tensor], SolveStats]:
        """Solves `H x = rhs` in that approximation; see `Solver.solve`.

        Raises:
            ValueError: `rhs` is empty or not finite.
        """
        check_rhs(rhs)
        b = [tensor.detach() for tensor in rhs]
        solution = torch._foreach_mul(b, self.scale)
        product = matvec(solution)
        with torch.no_grad():
            norms = torch.stack([squared_norm(torch._foreach_sub(b, list(product))), squared_norm(b)])
        squared_residual, squared_rhs = norms.tolist()
        residual = relative_residual(squared_residual, squared_rhs)
        reason = "trivial" if squared_rhs == 0 else "converged" if residual == 0 else "steps"
        return list(solution), SolveStats(0, 1, residual, residual == 0, self.scale, reason)
