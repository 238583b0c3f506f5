"""The frame of conjugate gradients and MINRES: rows that stop on their own, and restarts from the true residual."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from auxfast.ops.krylov import BROKEN, LANCZOS, LANCZOS_STEPS, NUMBERS, REACHED, RUNNING
from auxfast.solvers.base import SolverState, StopReason
from auxfast.solvers.best_iterate import RESTART_GAIN, BestIterate, Floats, Rows
from auxfast.solvers.iterative import IterativeSolver, steps_per_check
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.preconditioners import Apply, Preconditioner, check_preconditioner, prepare
from auxfast.solvers.space import LOCAL, VectorSpace

REASONS_OF_STATUS = (  # by the status of a row
    StopReason.STEPS,
    StopReason.STAGNATED,
    StopReason.STAGNATED,
    StopReason.NEGATIVE_CURVATURE,
    StopReason.DIVERGED,
)
_NEGLIGIBLE = 0.03
"""The part of a residual, or of the tolerance, that may be rounding: it is orthogonal to the rest or nearly so, and
moves the norm by 0.03^2 / 2, one in two thousand."""

Norms = Floats | Tensor
"""(k,), on the host; or on the device, where nothing waits for them."""


class Recurrence(ABC):
    """k systems side by side, each with numbers of its own, which stay on the device. A row that stops is left alone.

    Args:
        x: (k, n), where to start from; updated in place.
        norms: of the residuals of x.
        tolerances: residual norms to stop at, in the same place.
        precondition: see `Apply`.
        space: that of the rows.
        first: (k,) each, or one number for all, what the method knows of the rows before the first step.

    Attributes:
        names: rows of `numbers`, by name.
        exchanged: names of the attributes whose tensors `step` exchanges or replaces.
        numbers: (NUMBERS, k), see `auxfast.ops.krylov`.
        direction: (k, n), the vectors that `step` wants the products with.
    """

    names: ClassVar[dict[str, int]]
    exchanged: ClassVar[tuple[str, ...]] = ()
    direction: Tensor

    def __init__(
        self,
        x: Tensor,
        norms: Norms,
        tolerances: Norms,
        precondition: Apply | None,
        space: VectorSpace,
        **first: Any,
    ) -> None:
        self.x = x
        self.space = space
        self.precondition = precondition
        first |= {"tolerance": tolerances, "square": norms**2}
        if isinstance(norms, Tensor):
            self.numbers = x.new_zeros((NUMBERS, len(norms)), dtype=torch.float64)
            for unknown in (self.numbers[LANCZOS:], self.number("asymmetry")):
                unknown.fill_(math.nan)
            for name, values in first.items():
                self.number(name).add_(values)
        else:
            numbers = np.zeros((NUMBERS, len(norms)))
            numbers[LANCZOS:] = numbers[self.names["asymmetry"]] = np.nan
            for name, values in first.items():
                numbers[self.names[name]] = values
            self.numbers = torch.from_numpy(numbers).to(x.device)

    def number(self, name: str) -> Tensor:
        """(k,)"""
        return self.numbers[self.names[name]]

    @abstractmethod
    def step(self, product: Tensor) -> None:
        """Takes the product (k, n) with `direction`, which it may overwrite. Waits for no device."""

    @abstractmethod
    def best_rows(self) -> Tensor:
        """(k, n), the iterates of the smallest residuals. Waits for no device."""

    @abstractmethod
    def best(self, numbers: Floats) -> tuple[Tensor, Floats]:
        """(k, n) and (k,): the iterates of the smallest residuals, and the norms of those, as far as the recurrence
        knows. numbers: those of the recurrence, on the host."""

    def run(self, system: LinearSystem, rows: Rows, steps: int) -> int:
        """Takes at most `steps` steps, on these rows of the system; returns how many."""
        check_every, status = steps_per_check(self.x.device), self.number("status")
        is_free = check_every == 1 and self.space is LOCAL
        on_host = status.numpy() if is_free else None  # the same memory, which a look at costs nothing
        index = None if len(rows) == len(system.rhs) else torch.from_numpy(rows).to(self.x.device)
        active, stopped = index, 0
        for step in range(1, steps + 1):
            if not stopped:
                product = system.product(self.direction, index)
            else:  # rows that have stopped need no products
                product = torch.zeros_like(self.direction)
                product[active] = system.product(self.direction[active], active if index is None else index[active])
            self.step(product)
            if step % check_every == 0 and (on_host is None or np.count_nonzero(on_host) > stopped):
                running = np.flatnonzero(self.space.read(status) == RUNNING)
                if not len(running):
                    break
                if len(running) < len(self.x) - stopped:
                    active, stopped = torch.from_numpy(running).to(self.x.device), len(self.x) - len(running)
        return step


@dataclass(frozen=True)
class Outcome:
    """How a cycle of k rows went, read from the device once.

    Attributes:
        x: (k, n), the best iterates.
        norms: (k,), of their residuals, as the recurrence knows them.
        numbers: (NUMBERS, k)
        names: rows of `numbers`, by name.
    """

    x: Tensor
    norms: Floats
    numbers: Floats
    names: dict[str, int]

    def number(self, name: str) -> Floats:
        values: Floats = self.numbers[self.names[name]]
        return values

    def symmetry_error(self) -> float:
        """The largest `asymmetry` of a row; nan if there is none."""
        return max(filter(math.isfinite, self.number("asymmetry").tolist()), default=math.nan)

    def largest_ritz_value(self) -> float | None:
        """The largest eigenvalue of the rows' Lanczos matrices: at most the largest of `H + damping I`."""
        ritz_values = []
        for entries in self.numbers[LANCZOS:].T:
            diagonal, off_diagonal = entries.reshape(LANCZOS_STEPS, 2)[np.isfinite(entries[::2])].T
            if size := len(diagonal):
                lower = np.zeros((size, size))
                lower.flat[:: size + 1], lower.flat[size :: size + 1] = diagonal, off_diagonal[:-1]
                ritz_values.append(float(np.linalg.eigvalsh(lower)[-1]))
        return max(ritz_values, default=None)

    def known(self, best: BestIterate, rows: Rows) -> tuple[Floats, Any]:
        """(k,) norms of the true residuals, and which of them need no product to be known.

        The residual of the recurrence is that of its products; it drifts from the true one by what is wrong with these,
        and by the rounding of x (van der Vorst & Ye 2000). With products that are off by e_j, relative to |H|, and
        x = sum_j y_j v_j over orthonormal vectors v_j, the drift is at most `|H| sum_j e_j |y_j| <= |H| e sqrt(steps)
        |x|`, and the same for conjugate gradients, whose directions point one way. e is the machine epsilon, or twice
        what products show: each two that follow each other contradict symmetry by one of the n components of an error.
        """
        system = best.system
        steps = self.number("steps")
        shown = np.sqrt(system.size * self.number("noise") / np.maximum(steps - 1, 1))
        lengths = np.sqrt(system.space.read(system.space.dots(self.x, self.x)))
        error = np.maximum(torch.finfo(system.dtype).eps, 2 * shown)
        drift = error * self.number("largest") * np.sqrt(steps) * lengths
        norms = np.hypot(self.norms, drift)
        tolerances = best.tolerances[rows]
        known = (drift <= _NEGLIGIBLE * np.maximum(self.norms, tolerances)) & (self.number("status") != BROKEN)
        known &= (self.number("status") != REACHED) | (norms <= tolerances)
        return norms, known & ((steps > 2) | (lengths == 0))  # each step but the first makes a sample


@dataclass(frozen=True)
class KrylovSolver(IterativeSolver):
    """Settings and outer loop of `ConjugateGradient` and `MINRES`.

    The recurrence's own residual drifts from the true one by rounding. A cycle ends with the product that tells the
    true one, unless the operator says that its products are `exact` (see `LinearOperator`) and a bound of the drift
    says that it is negligible; `SolveStats.residual_from` tells. Where the true residual is above the tolerance while
    the recurrence says below, another cycle starts from there.

    Args:
        steps: at most, each of one product; a further product may tell the true residual in the end. A restart's
            product counts as a step.
        tol: stop once the relative residual is at most this, between 0 and 1. `None`: go on to working precision.
        damping: at least 0; added to every eigenvalue of H.
        warm_start: start from `state.solution` if that has a smaller residual than x = 0; costs a product.
        preconditioner: such as `Jacobi()`.

    Raises:
        ValueError: a setting outside its range.
        TypeError: a preconditioner that is none.
    """

    steps: int = 100
    tol: float | None = 1e-3
    damping: float = 0.0
    warm_start: bool = False
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preconditioner(self.preconditioner)

    @staticmethod
    @abstractmethod
    def _recurrence(
        x: Tensor, residual: Tensor, norms: Norms, tolerances: Norms, precondition: Apply | None, space: VectorSpace
    ) -> Recurrence:
        """The recurrence from `x`, whose residual is `residual`, both (k, n) and free to be overwritten; norms: those
        of `residual`; space: that of the rows."""

    def _iterate(self, best: BestIterate, state: SolverState | None) -> dict[str, Any]:
        rows = best.unsolved()
        precondition = prepare(self.preconditioner, best.system, state) if len(rows) else None
        iterations, left, negative_curvature, largest = 0, self.steps, False, None
        while len(rows) and left > 0:
            before = best.norms[rows]
            tolerances = np.maximum(best.tolerances[rows], torch.finfo(best.residual.dtype).eps * before)
            cycle = self._recurrence(*best.current(rows), before, tolerances, precondition, best.system.space)
            taken = cycle.run(best.system, rows, left)
            iterations, left = iterations + taken, left - taken - 1
            numbers = best.system.space.read(cycle.numbers)
            outcome = Outcome(*cycle.best(numbers), numbers, cycle.names)
            self._take(best, rows, outcome, is_known=best.system.exact and precondition is None and taken == iterations)
            if largest is None and precondition is None and (ritz := outcome.largest_ritz_value()) is not None:
                largest = ritz - self.damping
            negative_curvature |= bool(outcome.number("negative").any())
            best.check_symmetry(outcome.symmetry_error())
            rows = _rows_to_restart(best, rows, before, outcome.number("status"))
        return {
            "iterations": iterations,
            "largest_eigenvalue": largest,
            "negative_curvature": negative_curvature,
        }

    @staticmethod
    def _take(best: BestIterate, rows: Rows, outcome: Outcome, is_known: bool) -> None:
        """Takes the iterates of a cycle, and spends products on those whose residuals need one to be known.

        is_known: whether the recurrence may know any. It does not with a preconditioner, where its numbers do not tell
        of H itself; nor where a cycle before has drifted."""
        norms, known = outcome.known(best, rows) if is_known else (outcome.norms, np.zeros(len(rows), dtype=bool))

        def those(which: Any) -> Tensor:
            return outcome.x if which.all() else outcome.x[torch.from_numpy(which).to(outcome.x.device)]

        if known.any():
            best.accept(rows[known], those(known), norms[known])
        if not known.all():
            best.update(rows[~known], those(~known))


def _rows_to_restart(best: BestIterate, rows: Rows, before: Floats, statuses: Floats) -> Rows:
    """The rows that are done but for the drift of the recurrence's residual; sets why the others have stopped."""
    again = []
    for row, norm, status in zip(rows, before, statuses.tolist(), strict=True):
        if best.stop_reasons[row] != StopReason.STEPS:
            continue
        if status == REACHED and best.norms[row] <= RESTART_GAIN * norm:
            again.append(row)
        else:
            best.stop_reasons[row] = REASONS_OF_STATUS[int(status)]
    return np.array(again, dtype=np.intp)
