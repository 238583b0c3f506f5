"""What conjugate gradients and MINRES share: rows that stop on their own, and restarts from the true residual."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from auxfast.solvers.base import Block, Matvec, SolverState, SolveStats, check_damping, check_steps, check_tol
from auxfast.solvers.certificate import PROGRESS, Certified, Floats, Rows
from auxfast.solvers.preconditioners import Apply, Preconditioner, prepare

Scalars = Any
"""(k,), one number for each row. NumPy on a CPU, where that takes a third of torch's time for so few; a tensor on other
devices, where reading it would wait. The functions that the recurrences need have one name in both."""

RUNNING, REACHED, SINGULAR, CURVED, BROKEN = range(5)  # the status of a row
_REASONS = ("steps", "stagnated", "stagnated", "negative curvature", "diverged")

_STEPS_PER_LOOK = 8  # on a GPU, where looking at who has stopped waits for all that was launched
_RITZ_STEPS = 32  # enough for the largest eigenvalue to a few per cent


class Recurrence(ABC):
    """k systems side by side. A row that stops is frozen: its coefficients turn to 1 for what is updated, else to 0.

    Args:
        x: (k, n), where to start from; updated in place.
        goals: (k,) residual norms to stop at.
        precondition: see `Apply`.
    """

    direction: Tensor
    """(k, n): what the next product is wanted of."""

    def __init__(self, x: Tensor, goals: Floats, precondition: Apply | None) -> None:
        self.x = x
        self.precondition = precondition
        self.tiny = torch.finfo(x.dtype).eps  # what is rounding, relative to the largest curvature
        self.xp: Any = np if _reading_is_free(x.device) else torch
        self.goals = self.scalars(torch.from_numpy(goals).to(x.device))
        self.one, self.zero = self.xp.ones_like(self.goals), self.xp.zeros_like(self.goals)
        self._stack: Any = np.array if self.xp is np else torch.stack
        self._frozen = self._stack([self.one, self.zero, self.zero, self.zero])
        self.status = self.zero  # (k,), RUNNING or why a row has stopped
        self.active = self.status == RUNNING
        self._some_stopped = self.xp is not np  # as far as the host knows without waiting
        self.negative_curvature = ~self.active
        self.lanczos: list[tuple[Scalars, Scalars]] = []

    @abstractmethod
    def step(self, product: Tensor) -> None:
        """Takes the product (k, n) with `direction`, which it may overwrite. Waits for no device."""

    def best(self) -> Tensor:
        """(k, n): the iterates of the smallest residuals, as far as the recurrence knows."""
        return self.x

    def scalars(self, values: Tensor) -> Scalars:
        return values.numpy() if self.xp is np else values

    def coefficients(self, out: Scalars, *terms: Scalars) -> Tensor:
        """Those of `linear_combination_`, (1 + number of terms, k), for the active rows."""
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
        """The next entries of the Lanczos matrix, while it is small and that of H itself."""
        if self.precondition is None and len(self.lanczos) < _RITZ_STEPS:
            self.lanczos.append((self.xp.where(self.active, diagonal, np.nan), off_diagonal))

    def run(self, block: Block, steps: int) -> int:
        """At most `steps` steps; returns how many."""
        every = 1 if self.xp is np else _STEPS_PER_LOOK
        active = torch.arange(len(self.x), device=self.x.device)
        for step in range(1, steps + 1):
            if len(active) == len(self.x):
                product = block.product(self.direction)
            else:  # what has stopped needs no products
                product = torch.zeros_like(self.direction)
                product[active] = block.product(self.direction[active])
            with torch.no_grad(), np.errstate(all="ignore"):  # a division by 0 ends a row, and says so
                self.step(product)
            if step % every == 0 and self._some_stopped:
                active = torch.as_tensor(self.active).nonzero()[:, 0]  # waits for the device
                if not len(active):
                    break
        return step

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
class KrylovSolver(ABC):
    """Settings and outer loop; see its subclasses.

    The recurrence's own residual drifts from the true one by rounding. Every cycle ends with the product that tells the
    true one, and if that is above the tolerance while the recurrence says below, another one starts from there.
    """

    steps: int = 100
    tol: float | None = 1e-3
    damping: float = 0.0
    warm_start: bool = False
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_steps("steps", self.steps)
        check_tol(self.tol)
        check_damping(self.damping)

    @staticmethod
    @abstractmethod
    def _recurrence(x: Tensor, residual: Tensor, goals: Floats, precondition: Apply | None) -> Recurrence:
        """Starts from `x`, whose residual is `residual`, both (k, n) and free to be overwritten."""

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `(H + damping I) x = rhs`; see `Solver.solve`.

        Raises:
            ValueError: see `Block`.
            RuntimeError: `matvec` returns other shapes than it was given.
        """
        block = Block(matvec, rhs, self.damping, batched)
        best = Certified(block, self.tol)
        if self.warm_start:
            best.warm_start(state)
        rows = best.unsolved()
        precondition = prepare(self.preconditioner, block, state) if len(rows) else None
        iterations, negative_curvature, largest = 0, False, None
        while len(rows) and iterations < self.steps:
            before = best.norms[rows]
            goals = np.maximum(best.goals[rows], torch.finfo(block.rhs.dtype).eps * before)
            with np.errstate(all="ignore"):
                cycle = self._recurrence(*best.at(rows), goals, precondition)
            iterations += cycle.run(block, self.steps - iterations)
            best.offer(rows, cycle.best())
            if largest is None and (ritz := cycle.largest_ritz_value()) is not None:
                largest = ritz - self.damping
            negative_curvature |= bool(cycle.negative_curvature.any())
            rows = _go_on(best, rows, before, cycle)
        if self.warm_start and state is not None:
            state.solution = block.unflatten(best.solution.clone())
        return best.result(iterations, largest_eigenvalue=largest, negative_curvature=negative_curvature)


def _go_on(best: Certified, rows: Rows, before: Floats, cycle: Recurrence) -> Rows:
    """Says why rows have stopped; returns those that were done but for the drift of the recurrence's residual."""
    again = []
    for row, norm, status in zip(rows, before, cycle.status.tolist(), strict=True):
        if best.reasons[row] != "steps":
            continue
        if status == REACHED and best.norms[row] <= PROGRESS * norm:
            again.append(row)
        else:
            best.reasons[row] = _REASONS[int(status)]
    return np.array(again, dtype=np.intp)


def _reading_is_free(device: torch.device) -> bool:
    return device.type == "cpu"
