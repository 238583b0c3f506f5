"""The Neumann series as a static solve: growth is cut on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from auxfast.ops.neumann import (
    BEFORE,
    GREW,
    GROWTH,
    GUARDED_NUMBERS,
    OF_PRODUCT,
    SMALLEST,
    SQUARE,
    STEPS,
    NeumannSteps,
    neumann_guarded_step_,
    squared_norm,
)
from auxfast.solvers.base import Matvec, SolveStats, StopReason
from auxfast.solvers.neumann import Neumann, curvature_of_growth
from auxfast.solvers.series import curvature_between
from auxfast.solvers.space import Floats, as_row
from auxfast.solvers.static_solve import StaticSolve, StaticSystem


class _StaticSeries(StaticSolve):
    """What both series have in common.

    Args:
        solver: `Neumann` with a fixed step size and no tolerance.
    """

    def __init__(self, solver: Neumann) -> None:
        assert solver.step_size != "auto"
        self._step_size, self._damping = solver.step_size, solver.damping
        self.chunks: tuple[int, ...] = (solver.steps,)

    def reset(self) -> None:
        pass  # each solve starts from 0


class StaticNeumann(_StaticSeries):
    """`Neumann` with a fixed step size and no tolerance, certified.

    `neumann_guarded_step_` leaves the sum where the norm has grown. The closing product tells the true residual, and
    whether the last term was the first to grow: the sum without it has a residual that the series knows, since the
    vector of the last step is just that.
    """

    def begin(self, matvec: Matvec, rhs: Sequence[Tensor]) -> None:
        self._system = StaticSystem(matvec, rhs, self._damping)
        self._v = [*torch._foreach_mul(self._system.b, self._step_size)]
        self._v_before, self._p = ([torch.empty_like(v) for v in self._v] for _ in range(2))
        torch._foreach_zero_([*self._v_before, *self._p])
        square = squared_norm(self._v)
        self._numbers = square.new_zeros(GUARDED_NUMBERS)
        self._numbers[SQUARE] = square
        self._numbers[SMALLEST] = square
        self._numbers[GREW] = ~square.isfinite()

    def steps(self, count: int) -> None:
        for _ in range(count):
            product = self._system.product(self._v)
            neumann_guarded_step_(self._v, self._v_before, product, self._p, self._numbers, self._step_size)
            self._v, self._v_before = self._v_before, self._v

    def status(self) -> Tensor:
        return self._numbers[GREW : GREW + 1]

    def end(self) -> tuple[list[Tensor], Tensor]:
        numbers, system = self._numbers, self._system
        self._b_row, p, v_before, v = map(as_row, (system.b, self._p, self._v_before, self._v))
        grew = numbers[GREW] != 0
        shorter = system.rounded(p + v_before)
        x = system.rounded(torch.where(grew, p, p + v_before + v))
        left, of_b = self._left(x), squared_norm([self._b_row]).sqrt()
        norm = numbers[SQUARE].sqrt() / self._step_size  # what `shorter` leaves, where nothing has grown
        rounding = 10 * torch.finfo(v.dtype).eps * of_b
        late = ~grew & ~(left <= GROWTH * torch.maximum(norm, rounding))
        if system.is_narrow:  # rounding has made `shorter` another one
            norm = self._left(shorter)
        residual = torch.where(late, norm, left)
        is_better = residual <= of_b  # false for NaN
        x = torch.where(is_better, torch.where(late, shorter, x), 0.0)
        residual = torch.where(is_better, residual, of_b)
        failed = ~system.largest.isfinite() | ((numbers[STEPS] == 1) & grew & ~numbers[OF_PRODUCT].isfinite())
        more = torch.stack([system.largest, of_b, residual, late.double(), failed.double()])
        return system.solution(x, failed), torch.cat([numbers, more])

    def _left(self, x: Tensor) -> Tensor:
        """`||b - (H + damping I) x||` of a row (1, n)."""
        return squared_norm([self._b_row - self._system.of_row(x)]).sqrt()

    def stats(self, numbers: Floats, steps: int) -> SolveStats:
        largest, of_b, left, late, failed = numbers[GUARDED_NUMBERS:].tolist()
        residual = left / of_b if of_b else 0.0
        grew = bool(numbers[GREW])
        curvature = None
        if grew and math.isfinite(numbers[SQUARE]) and numbers[BEFORE] > 0:
            before, square, of_product = numbers[[BEFORE, SQUARE, OF_PRODUCT]].tolist()
            curvature = curvature_between(before, square, of_product, self._step_size)
        largest_eigenvalue, negative = curvature_of_growth([curvature], self._damping)
        if failed:
            reason = StopReason.NOT_FINITE
        elif not largest:
            reason = StopReason.TRIVIAL
        elif grew or late:
            reason = StopReason.DIVERGED
        else:
            reason = StopReason.STEPS if residual else StopReason.CONVERGED
        return SolveStats(
            iterations=int(numbers[STEPS]) if largest else 0,
            matvecs=steps + 1 + self._system.is_narrow,
            residual=residual,
            converged=residual == 0,
            stop_reason=reason,
            step_size=self._step_size,
            largest_eigenvalue=largest_eigenvalue,
            negative_curvature=negative,
            residuals=(residual,),
            residual_from="recurrence" if late else "product",
        )

    def largest_of_rhs(self, numbers: Floats) -> float:
        return float(numbers[GUARDED_NUMBERS])

    def has_no_curvature(self, numbers: Floats) -> bool:
        return not numbers[OF_PRODUCT]


class StaticWholeSum(_StaticSeries):
    """`Neumann` with `certify=False`: the paper's Algorithm 2 as it stands, which never looks at a number."""

    def begin(self, matvec: Matvec, rhs: Sequence[Tensor]) -> None:
        self._system = StaticSystem(matvec, rhs, self._damping)
        self._series = NeumannSteps(self._system.b, self._step_size)
        self._of_product: Tensor | None = None  # the squared norm of the first product

    def steps(self, count: int) -> None:
        for _ in range(count):
            product = self._system.product(self._series.v)
            if self._of_product is None:
                self._of_product = squared_norm(product)
            self._series.step(product)

    def status(self) -> Tensor:
        return self._system.largest.new_zeros(1)

    def end(self) -> tuple[list[Tensor], Tensor]:
        assert self._of_product is not None
        system, squares = self._system, self._series.squares()
        in_range = squares.sqrt().sum() * system.scale <= torch.finfo(system.dtype).max
        failed = ~system.largest.isfinite() | (~in_range & ~self._of_product.isfinite())
        x = torch.where(in_range, as_row(self._series.p), 0.0)
        more = torch.stack([system.largest, in_range.double(), failed.double(), self._of_product])
        return system.solution(x, failed), torch.cat([more, squares])

    def stats(self, numbers: Floats, steps: int) -> SolveStats:
        largest, in_range, failed, _ = numbers[:4].tolist()
        squares = numbers[4:]
        if failed:
            reason = StopReason.NOT_FINITE
        elif not largest:
            reason = StopReason.TRIVIAL
        else:
            whole = in_range and squares[-1] <= GROWTH * squares.min()
            reason = StopReason.STEPS if whole else StopReason.DIVERGED
        residual = 0.0 if reason == StopReason.TRIVIAL else math.nan
        return SolveStats(
            iterations=steps,
            matvecs=steps,
            residual=residual,
            converged=reason == StopReason.TRIVIAL,
            stop_reason=reason,
            step_size=self._step_size,
            residuals=(residual,),
        )

    def largest_of_rhs(self, numbers: Floats) -> float:
        return float(numbers[0])

    def has_no_curvature(self, numbers: Floats) -> bool:
        return not numbers[3]
