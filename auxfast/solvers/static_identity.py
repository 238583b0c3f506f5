"""The identity approximation as a static solve: a scaling, and the product that certifies it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from auxfast.ops.krylov import row_dots
from auxfast.solvers.base import Matvec, SolveStats, StopReason
from auxfast.solvers.identity import Identity
from auxfast.solvers.space import Floats, as_row
from auxfast.solvers.static_solve import StaticSolve, StaticSystem


class StaticIdentity(StaticSolve):
    """`Identity`.

    Args:
        solver: its settings.
    """

    chunks: tuple[int, ...] = ()

    def __init__(self, solver: Identity) -> None:
        self._step_size = solver.scale

    def begin(self, matvec: Matvec, rhs: Sequence[Tensor]) -> None:
        self._system = StaticSystem(matvec, rhs, 0.0)
        self._b = as_row(self._system.b)

    def steps(self, count: int) -> None:
        raise AssertionError("there are no steps")

    def status(self) -> Tensor:
        return self._system.largest.new_ones(1)

    def end(self) -> tuple[list[Tensor], Tensor]:
        system = self._system
        x = system.rounded(self._b * self._step_size)
        left = self._b - system.of_row(x)
        norm, of_b = row_dots(left, left).sqrt(), row_dots(self._b, self._b).sqrt()
        is_finite = x.isfinite().all()
        is_usable = is_finite & norm.isfinite()
        failed = ~system.largest.isfinite() | (is_finite & ~is_usable)
        residual = torch.where(is_usable, norm, of_b)
        solution = system.solution(torch.where(is_usable, x, 0.0), failed)
        return solution, torch.cat([system.largest[None], of_b, residual, is_usable.double(), failed.double()])

    def reset(self) -> None:
        pass  # nothing is kept

    def stats(self, numbers: Floats, steps: int) -> SolveStats:
        _, of_b, left, is_usable, failed = numbers.tolist()
        residual = left / of_b if of_b else 0.0
        if failed:
            reason = StopReason.NOT_FINITE
        elif not is_usable:
            reason = StopReason.DIVERGED
        elif residual:
            reason = StopReason.STEPS
        else:
            reason = StopReason.CONVERGED if of_b else StopReason.TRIVIAL
        return SolveStats(
            iterations=0,
            matvecs=1,
            residual=residual,
            converged=residual == 0,
            stop_reason=reason,
            step_size=self._step_size,
            residuals=(residual,),
        )

    def largest_of_rhs(self, numbers: Floats) -> float:
        return float(numbers[0])

    def has_no_curvature(self, numbers: Floats) -> bool:
        return False  # x = 0 comes of an overflow alone
