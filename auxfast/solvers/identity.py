"""The solver that takes the Hessian for a multiple of the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auxfast.solvers.base import Matvec, SolverState, SolveStats, StopReason, check_positive
from auxfast.solvers.linear_system import LinearSystem


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
        `diverged`, or `not finite` if the product with `rhs` itself is not.

        Raises:
            ValueError: see `LinearSystem`.
            RuntimeError: `matvec` returns other shapes than it was given.
        """
        system = LinearSystem(matvec, rhs, 0.0, batched)
        x = system.rounded(system.rhs * self.scale, torch.arange(len(system.rhs), device=system.rhs.device))
        space, norms, left = system.space, system.rhs_norms, system.rhs - system.product(x)
        lengths = np.sqrt(space.read(space.dots(left, left)))
        residuals = np.divide(lengths, norms, out=np.zeros_like(norms), where=norms > 0)
        usable = np.isfinite(residuals) & space.are_finite(x)
        if not usable.all():
            x, residuals = (
                torch.where(torch.from_numpy(usable)[:, None].to(x.device), x, 0),
                np.where(usable, residuals, 1),
            )
        worst = int(residuals.argmax())
        residual = float(residuals[worst])
        if not usable[worst]:
            index = torch.tensor([worst], device=x.device)
            finite = space.are_finite(system.product(system.rhs[worst : worst + 1], index)).all()
            reason = StopReason.DIVERGED if finite else StopReason.NOT_FINITE
        elif residual == 0:
            reason = StopReason.CONVERGED if system.rhs_norms[worst] else StopReason.TRIVIAL
        else:
            reason = StopReason.STEPS
        stats = SolveStats(
            iterations=0,
            matvecs=system.matvecs,
            residual=residual,
            converged=residual == 0,
            stop_reason=reason,
            step_size=self.scale,
            residuals=tuple(residuals.tolist()),
        )
        return system.unflatten(x), stats
