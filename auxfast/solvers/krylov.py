"""The frame of conjugate gradients and MINRES: rows that stop on their own, and restarts from the true residual."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from auxfast.solvers.base import SolverState, StopReason
from auxfast.solvers.best_iterate import RESTART_GAIN, BestIterate, Floats, Rows
from auxfast.solvers.iterative import IterativeSolver, steps_per_check
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.preconditioners import Apply, Preconditioner, check_preconditioner, prepare

Scalars = Any
"""(k,), one number for each row: a NumPy array on a CPU, where that takes a third of torch's time for so few; a tensor
on other devices, where reading it would wait. The functions that the recurrences need have one name in both."""

RUNNING, REACHED, SINGULAR, CURVED, BROKEN = range(5)  # status of a row
_STOP_REASONS = (
    StopReason.STEPS,
    StopReason.STAGNATED,
    StopReason.STAGNATED,
    StopReason.NEGATIVE_CURVATURE,
    StopReason.DIVERGED,
)
_RITZ_STEPS = 32  # steps whose Lanczos matrix is kept: enough for the largest eigenvalue to a few per cent


class Recurrence(ABC):
    """k systems side by side. A row that stops is frozen: its coefficients turn to 1 for what is updated, else to 0.

    Args:
        x: (k, n), where to start from; updated in place.
        tolerances: (k,), residual norms to stop at.
        precondition: see `Apply`.

    Attributes:
        direction: (k, n), the vectors that `step` wants the products with.
        status: (k,), RUNNING or why a row has stopped.
        active: (k,), whether a row is RUNNING.
        negative_curvature: (k,), whether any was met.
        asymmetry: (k,), `|<v, H w> - <w, H v>|` for unit vectors in the span of the first two of the Krylov space,
            relative to what is known of H by then; NaN for rows that had stopped; None before the second step.
    """

    direction: Tensor

    def __init__(self, x: Tensor, tolerances: Floats, precondition: Apply | None) -> None:
        self.x = x
        self.precondition = precondition
        self.tiny = torch.finfo(x.dtype).eps  # rounding, relative to the largest curvature
        self._check_every = steps_per_check(x.device)
        self.xp: Any = np if self._check_every == 1 else torch  # 1: reading is free
        self.tolerances = self.scalars(torch.from_numpy(tolerances).to(x.device))
        self.one, self.zero = self.xp.ones_like(self.tolerances), self.xp.zeros_like(self.tolerances)
        self._stack: Any = np.array if self.xp is np else torch.stack
        self._frozen = self._stack([self.one, self.zero, self.zero, self.zero])
        self.status = self.zero
        self.active = self.status == RUNNING
        self._some_stopped = self.xp is not np  # known to the host without waiting; on a GPU some may have
        self.negative_curvature = ~self.active
        self.lanczos: list[tuple[Scalars, Scalars]] = []
        self.taken = 0
        self.asymmetry: Scalars | None = None

    def note_asymmetry(self, value: Scalars) -> None:
        self.asymmetry = self.xp.where(self.active, abs(value), self.xp.nan)

    @abstractmethod
    def step(self, product: Tensor) -> None:
        """Takes the product (k, n) with `direction`, which it may overwrite. Waits for no device."""

    def best(self) -> Tensor:
        """(k, n): the iterates of the smallest residuals, as far as the recurrence knows."""
        return self.x

    def scalars(self, values: Tensor) -> Scalars:
        return values.numpy() if self.xp is np else values

    def coefficients(self, out: Scalars, *terms: Scalars) -> Tensor:
        """Coefficients of `linear_combination_`, (1 + number of terms, k), that leave stopped rows as they are."""
        values = self._stack([out, *terms])
        if self._some_stopped:
            values = self.xp.where(self.active, values, self._frozen[: 1 + len(terms)])
        return torch.from_numpy(values) if self.xp is np else values

    def stop(self, where: Scalars, status: int) -> None:
        if self.xp is np and not np.count_nonzero(where):
            return
        self._some_stopped = True
        self.status = self.xp.where(self.active & where, status, self.status)
        self.active = self.status == RUNNING

    def record(self, diagonal: Scalars, off_diagonal: Scalars) -> None:
        """Keeps the next entries of the Lanczos matrix, while it is small and that of H itself."""
        if self.precondition is None and len(self.lanczos) < _RITZ_STEPS:
            self.lanczos.append((self.xp.where(self.active, diagonal, np.nan), off_diagonal))

    def run(self, system: LinearSystem, steps: int, index: Tensor) -> int:
        """Takes at most `steps` steps; returns how many.

        Args:
            index: (k,), the right-hand sides that the rows belong to.
        """
        active = torch.arange(len(self.x), device=self.x.device)
        for step in range(1, steps + 1):
            if len(active) == len(self.x):
                product = system.product(self.direction, index)
            else:  # rows that have stopped need no products
                product = torch.zeros_like(self.direction)
                product[active] = system.product(self.direction[active], index[active])
            with torch.no_grad(), np.errstate(all="ignore"):  # a division by 0 ends a row, and says so
                self.step(product)
            self.taken = step
            if step % self._check_every == 0 and self._some_stopped:
                active = torch.as_tensor(self.active).nonzero()[:, 0]  # waits for the device
                if not len(active):
                    break
        return step

    def symmetry_error(self) -> float:
        """The largest `asymmetry` of a row; nan if there is none."""
        errors = [] if self.asymmetry is None else self.asymmetry.tolist()
        return max(filter(math.isfinite, errors), default=math.nan)

    def largest_ritz_value(self) -> float | None:
        """The largest eigenvalue of the rows' Lanczos matrices: at most the largest of `H + damping I`."""
        if not self.lanczos:
            return None
        table = self._stack([self._stack(entries) for entries in self.lanczos])  # (steps, 2, k)
        ritz_values = []
        for entries in np.moveaxis(table if self.xp is np else table.cpu().numpy(), 2, 0):
            diagonal, off_diagonal = entries[np.isfinite(entries[:, 0])].T
            if len(diagonal):
                lower = np.diag(diagonal) + np.diag(off_diagonal[:-1], -1)
                ritz_values.append(float(np.linalg.eigvalsh(lower)[-1]))
        return max(ritz_values, default=None)


@dataclass(frozen=True)
class KrylovSolver(IterativeSolver):
    """Settings and outer loop of `ConjugateGradient` and `MINRES`.

    The recurrence's own residual drifts from the true one by rounding. Every cycle ends with the product that tells the
    true one, and if that is above the tolerance while the recurrence says below, another one starts from there.

    Args:
        steps: at most, each of one product; a further product tells the true residual in the end.
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
    def _recurrence(x: Tensor, residual: Tensor, tolerances: Floats, precondition: Apply | None) -> Recurrence:
        """The recurrence from `x`, whose residual is `residual`, both (k, n) and free to be overwritten."""

    def _iterate(self, best: BestIterate, state: SolverState | None) -> dict[str, Any]:
        rows = best.unsolved()
        precondition = prepare(self.preconditioner, best.system, state) if len(rows) else None
        iterations, negative_curvature, largest = 0, False, None
        while len(rows) and iterations < self.steps:
            before = best.norms[rows]
            tolerances = np.maximum(best.tolerances[rows], torch.finfo(best.residual.dtype).eps * before)
            with np.errstate(all="ignore"):
                cycle = self._recurrence(*best.current(rows), tolerances, precondition)
            index = torch.from_numpy(rows).to(best.residual.device)
            iterations += cycle.run(best.system, self.steps - iterations, index)
            best.update(rows, cycle.best())
            if largest is None and (ritz := cycle.largest_ritz_value()) is not None:
                largest = ritz - self.damping
            negative_curvature |= bool(cycle.negative_curvature.any())
            best.check_symmetry(cycle.symmetry_error())
            rows = _rows_to_restart(best, rows, before, cycle)
        return {
            "iterations": iterations,
            "largest_eigenvalue": largest,
            "negative_curvature": negative_curvature,
        }


def _rows_to_restart(best: BestIterate, rows: Rows, before: Floats, cycle: Recurrence) -> Rows:
    """The rows that are done but for the drift of the recurrence's residual; sets why the others have stopped."""
    again = []
    for row, norm, status in zip(rows, before, cycle.status.tolist(), strict=True):
        if best.stop_reasons[row] != StopReason.STEPS:
            continue
        if status == REACHED and best.norms[row] <= RESTART_GAIN * norm:
            again.append(row)
        else:
            best.stop_reasons[row] = _STOP_REASONS[int(status)]
    return np.array(again, dtype=np.intp)
