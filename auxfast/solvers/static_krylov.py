"""Conjugate gradients and MINRES as static solves, in chunks of steps that a host may stop between."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from auxfast.ops.krylov import BROKEN, NUMBERS, REACHED, RUNNING, row_dots
from auxfast.solvers.base import Matvec, SolveStats, StopReason
from auxfast.solvers.best_iterate import RESTART_GAIN
from auxfast.solvers.iterative import CHECK_EVERY
from auxfast.solvers.krylov import REASONS_OF_STATUS, KrylovSolver, Outcome
from auxfast.solvers.space import LOCAL, Floats, as_row
from auxfast.solvers.static_solve import StaticSolve, StaticSystem

_MOST_STEPS_IN_ONE = 2 * CHECK_EVERY
"""Steps that are one chunk: a host that reads one chunk behind could stop no earlier."""


class StaticKrylov(StaticSolve):
    """`ConjugateGradient` or `MINRES` without a preconditioner: one cycle of the recurrence, in which a row that stops
    is left alone, and the product that tells the true residual. No cycle follows where the two differ.

    Args:
        solver: its settings.
    """

    def __init__(self, solver: KrylovSolver) -> None:
        self._solver = solver
        self._solution: Tensor | None = None
        size = solver.steps if solver.tol is None or solver.steps <= _MOST_STEPS_IN_ONE else CHECK_EVERY
        rest = solver.steps % size
        self.chunks: tuple[int, ...] = (size,) * (solver.steps // size) + ((rest,) if rest else ())

    def begin(self, matvec: Matvec, rhs: Sequence[Tensor]) -> None:
        self._system = system = StaticSystem(matvec, rhs, self._solver.damping)
        self._b = as_row(system.b)
        self._norm = self._norm_of(self._b)
        x, residual, start = torch.zeros_like(self._b), self._b.clone(), self._norm
        if self._solver.warm_start:
            if self._solution is None:  # one tensor from call to call
                self._solution = torch.zeros_like(self._b)
            given_x = system.rounded(self._solution / system.scale)
            left = self._b - system.of_row(given_x)
            norm = self._norm_of(left)
            is_better = norm < start  # false for NaN
            x, residual = torch.where(is_better, given_x, x), torch.where(is_better, left, residual)
            start = torch.where(is_better, norm, start)
        self._start_x, self._start = x.clone(), start
        self._tolerance = (self._solver.tol or 0.0) * self._norm
        least = torch.finfo(self._b.dtype).eps * start
        tolerances = torch.maximum(self._tolerance, least)
        self._recurrence = self._solver._recurrence(x, residual, start, tolerances, None, LOCAL)
        status = self._recurrence.number("status")
        status.masked_fill_(start <= self._tolerance, REACHED)
        self._frozen = torch.zeros_like(status)
        self._memory: dict[str, Tensor] = {}
        if len(self.chunks) > 1:
            for name in self._recurrence.exchanged:  # two of them may be one tensor at first
                self._memory[name] = getattr(self._recurrence, name).clone()
                setattr(self._recurrence, name, self._memory[name])

    def steps(self, count: int) -> None:
        recurrence = self._recurrence
        for _ in range(count):
            self._frozen.add_(recurrence.number("status"))  # from its first step on a row that stopped adds the same
            recurrence.step(self._system.of_row(recurrence.direction))
        self._put_back()

    def _put_back(self) -> None:
        """Copies what the steps have exchanged to the memory that it had before them, where the next chunk finds it."""
        present = {name: getattr(self._recurrence, name) for name in self._memory}
        moved = {name: tensor.clone() for name, tensor in present.items() if tensor is not self._memory[name]}
        for name, tensor in moved.items():
            setattr(self._recurrence, name, self._memory[name].copy_(tensor))

    def status(self) -> Tensor:
        return self._recurrence.number("status")

    def end(self) -> tuple[list[Tensor], Tensor]:
        system = self._system
        x = system.rounded(self._recurrence.best_rows())
        norm = self._norm_of(self._b - system.of_row(x))
        is_better = norm < self._start  # false for NaN
        x = torch.where(is_better, x, self._start_x)
        residual = torch.where(is_better, norm, self._start)
        if self._solution is not None:
            self._solution.copy_(x * system.scale)
        of = self._recurrence.number
        is_broken = (of("status") == BROKEN) & (of("steps") == 0) & (residual >= self._norm)
        failed = ~system.largest.isfinite() | is_broken
        more = torch.cat([system.largest[None], self._norm, self._start, residual, norm, self._frozen, failed.double()])
        return system.solution(x, failed), torch.cat([self._recurrence.numbers[:, 0], more])

    @staticmethod
    def _norm_of(rows: Tensor) -> Tensor:
        return row_dots(rows, rows).sqrt()

    def reset(self) -> None:
        if self._solution is not None:
            self._solution.zero_()

    def stats(self, numbers: Floats, steps: int) -> SolveStats:
        of_b, start, left, norm, frozen, failed = numbers[NUMBERS + 1 :].tolist()
        names = self._recurrence.names
        outcome = Outcome(torch.empty(1, 0), numbers[:0], numbers[:NUMBERS, None], names)
        status = int(numbers[names["status"]])
        residual = left / of_b if of_b else 0.0
        converged = left <= (self._solver.tol or 0.0) * of_b
        if failed:
            reason = StopReason.NOT_FINITE
        elif not of_b:
            reason = StopReason.TRIVIAL
        elif converged:
            reason = StopReason.CONVERGED
        elif not math.isfinite(norm):
            reason = StopReason.DIVERGED
        elif status == REACHED and self._solver.tol is not None and left <= RESTART_GAIN * start:
            reason = StopReason.STEPS  # an eager solve would go on from here
        else:
            reason = REASONS_OF_STATUS[status]
        ritz = outcome.largest_ritz_value()
        asymmetry = outcome.symmetry_error()
        return SolveStats(
            iterations=steps - round(frozen / status) if status != RUNNING else steps,
            matvecs=steps + 1 + self._solver.warm_start,
            residual=residual,
            converged=converged,
            stop_reason=reason,
            largest_eigenvalue=None if ritz is None else ritz - self._solver.damping,
            negative_curvature=bool(numbers[names["negative"]]),
            residuals=(residual,),
            symmetry_error=None if math.isnan(asymmetry) else asymmetry,
        )

    def largest_of_rhs(self, numbers: Floats) -> float:
        return float(numbers[NUMBERS])

    def has_no_curvature(self, numbers: Floats) -> bool:
        return not numbers[self._recurrence.names["largest"]]
