"""The Hessian taken for a multiple of the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxfast.solvers.base import Block, Matvec, SolverState, SolveStats, check_positive


@dataclass(frozen=True)
class Identity:
    """`x = scale * b`: takes `H^-1` for `scale * I` (Luketina et al. 2016, in the paper's related work).

    A baseline that cannot diverge: it keeps the direction of `b` and looks at no curvature. One Hessian-vector product
    a right-hand side is spent, on the certificate alone: the residual is the true one of the returned solution. It may
    well exceed 1, for the scale is then wrong; the stats say so, and that is all. There is no damping, which would
    change that figure and nothing else.

    Args:
        scale: above 0; the inner learning rate makes it one unrolled step of gradient descent.

    Raises:
        ValueError: a scale outside its range.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `H x = rhs` in that approximation; see `Solver.solve`. `state` is left as it is: there is nothing to
        learn. Where the residual is not finite, x = 0 is returned, whose residual is 1, and `stop_reason` is
        `diverged`.

        Raises:
            ValueError: see `Block`.
            RuntimeError: `matvec` returns other shapes than it was given.
        """
        block = Block(matvec, rhs, 0.0, batched)
        x = block.rhs * self.scale
        left = torch.linalg.vector_norm(block.rhs - block.product(x), dim=1, dtype=torch.float64)
        residuals = torch.where(block.rhs_norms == 0, 0, left / block.rhs_norms)
        usable = residuals.isfinite() & x.isfinite().all(dim=1)
        x, residuals = torch.where(usable[:, None], x, 0), torch.where(usable, residuals, 1)
        worst = int(residuals.argmax())
        residual = float(residuals[worst])
        if not usable[worst]:
            reason = "diverged"
        elif residual == 0:
            reason = "converged" if bool(block.rhs_norms[worst]) else "trivial"
        else:
            reason = "steps"
        stats = SolveStats(
            iterations=0,
            matvecs=block.matvecs,
            residual=residual,
            converged=residual == 0,
            stop_reason=reason,
            step_size=self.scale,
            residuals=tuple(residuals.tolist()),
        )
        return block.unflatten(x), stats
