"""The frame of the solvers for matrices that need not be symmetric: cycles whose rows stop on their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from auxfast.solvers.base import SolverState, StopReason
from auxfast.solvers.best_iterate import RESTART_GAIN, BestIterate, Floats, Rows
from auxfast.solvers.iterative import IterativeSolver, steps_per_check
from auxfast.solvers.linear_system import LinearSystem

_LEAST_GAIN = 0.999
"""The residual that a cycle of full length may leave, relative to the one it started from, for another one to follow:
one that gains less would gain as little again."""


class Cycle(ABC):
    """A method on k rows side by side, from their residuals on. A row that stops is left alone.

    Args:
        system: it has the operator.
        index: (k,), the right-hand sides that the rows belong to.
        norms: (k,), of the residuals; above 0.
        tolerances: (k,), norms of the residuals to stop at.

    Attributes:
        running: (k,) bool, on the device.
        broken: (k,) bool, on the device: rows that stopped for a product that is not finite.
    """

    def __init__(self, system: LinearSystem, index: Tensor, norms: Floats, tolerances: Floats) -> None:
        device = index.device
        self._system, self._index = system, index
        self.norms, self.tolerances = (torch.from_numpy(values).to(device) for values in (norms, tolerances))
        self.running = torch.ones(len(index), dtype=torch.bool, device=device)
        self.broken = ~self.running
        self._running_rows = torch.arange(len(index), device=device)  # as the host knows them

    def run(self, steps: int) -> int:
        """Takes at most `steps` steps; returns how many."""
        check_every = steps_per_check(self._index.device)
        for taken in range(1, steps + 1):
            self.step()
            if taken % check_every == 0:
                running = self._system.space.read(self.running.double())
                self._running_rows = torch.from_numpy(np.flatnonzero(running)).to(self._index.device)
                if not len(self._running_rows):
                    break
        return taken

    @abstractmethod
    def step(self) -> None:
        """One step of all rows. Waits for no device."""

    @abstractmethod
    def correction(self) -> Tensor:
        """(k, n), what to add to the solution of each row."""

    def product(self, system: LinearSystem, rows: Tensor) -> Tensor:
        """(k, n) -> (k, n), products with the operator of `system`; zeros for rows that the host knows to have
        stopped."""
        some = self._running_rows
        if len(some) == len(rows):
            return system.product(rows, self._index)
        product = torch.zeros_like(rows)
        return product.index_copy_(0, some, system.product(rows[some], self._index[some]))


class RestartedSolver(IterativeSolver):
    """The outer loop of `GMRES` and `NormalEquations`: cycles, each from the true residual."""

    _symmetric_alone: ClassVar[bool] = False

    def _cycle_steps(self) -> int:
        """The most steps of a cycle."""
        return self.steps

    @abstractmethod
    def _cycle(self, system: LinearSystem, index: Tensor, residual: Tensor, norms: Floats, tolerances: Floats) -> Cycle:
        """The cycle from `residual` (k, n); the other arguments are those of `Cycle`."""

    def _iterate(self, best: BestIterate, state: SolverState | None) -> dict[str, Any]:
        rows, iterations = best.unsolved(), 0
        while len(rows) and iterations < self.steps:
            before = best.norms[rows]
            x, residual = best.current(rows)
            tolerances = np.maximum(best.tolerances[rows], torch.finfo(x.dtype).eps * before)
            index = torch.from_numpy(rows).to(x.device)
            cycle = self._cycle(best.system, index, residual, before, tolerances)
            iterations += cycle.run(min(self._cycle_steps(), self.steps - iterations))
            best.update(rows, x + cycle.correction())
            rows = _rows_to_restart(best, rows, before, cycle, iterations == self.steps)
            iterations += bool(len(rows))  # a restart takes the product of its residual from the steps
        return {"iterations": min(iterations, self.steps)}


def _rows_to_restart(best: BestIterate, rows: Rows, before: Floats, cycle: Cycle, is_last: bool) -> Rows:
    """The rows for which another cycle makes sense; sets why the others have stopped."""
    again = []
    running, broken = best.system.space.read(torch.stack([cycle.running, cycle.broken]).double()).tolist()
    for row, norm, runs, broke in zip(rows, before, running, broken, strict=True):
        if best.stop_reasons[row] != StopReason.STEPS or (runs and is_last):
            continue
        if best.norms[row] <= (_LEAST_GAIN if runs else RESTART_GAIN) * norm:
            again.append(row)
        else:
            best.stop_reasons[row] = StopReason.DIVERGED if broke else StopReason.STAGNATED
    return np.array(again, dtype=np.intp)
