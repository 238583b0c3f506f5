"""The best solution that is known of each right-hand side, with its true residual: what certified solvers return."""

from __future__ import annotations

from math import isfinite
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from auxfast.solvers.base import SolverState, SolveStats, StopReason, are_alike
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.symmetry import check_pair

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
"""Indices of right-hand sides."""

RESTART_GAIN = 0.5
"""The residual that a cycle may leave, relative to the one it started from, for another cycle to be worth its products:
one that gains less has met rounding."""


class BestIterate:
    """Starts at x = 0, whose residual is the right-hand side, and takes only what has a smaller one.

    So no residual is above 1, and nothing that is not finite is ever returned.

    Attributes:
        system: the linear system, of k rows.
        solution: (k, n).
        residual: (k, n), `rhs - (H + damping I) solution`.
        rhs_norms: (k,), on the host.
        norms: (k,), of the rows of `residual`; on the host, so an update waits for the device once.
        tolerances: (k,), the norms that count as converged.
        stop_reasons: one for each row; STEPS is for the solver to make more precise.
        residual_from, symmetry_error: see SolveStats.
        symmetric: whether H may be symmetric.
    """

    def __init__(self, system: LinearSystem, tol: float | None) -> None:
        self.system = system
        self.solution = torch.zeros_like(system.rhs)
        self.residual = system.rhs.clone()
        self.rhs_norms: Floats = system.rhs_norms
        self.norms = self.rhs_norms.copy()
        self.tolerances = (tol or 0.0) * self.rhs_norms
        self.stop_reasons = [StopReason.STEPS if norm > 0 else StopReason.TRIVIAL for norm in self.rhs_norms]
        self.residual_from: Literal["product", "recurrence"] = "product"
        self.symmetry_error: float | None = None
        self.symmetric = True

    def unsolved(self) -> Rows:
        """The rows whose residual is above the tolerance."""
        return np.flatnonzero(self.norms > self.tolerances)

    def current(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Copies of those rows' solutions and residuals, each (len(rows), n)."""
        if len(rows) == len(self.solution):
            return self.solution.clone(), self.residual.clone()
        index = torch.from_numpy(rows).to(self.solution.device)
        return self.solution.index_select(0, index), self.residual.index_select(0, index)

    def update(self, rows: Rows, x: Tensor, product: Tensor | None = None) -> None:
        """Takes `x` (len(rows), n), rounded as it would be returned, as the solution of those rows for which it is
        better.

        `product` is that of the operator with `x`, which is so rounded then; without it this costs one product a row.
        """
        index = None if len(rows) == len(self.solution) else torch.from_numpy(rows).to(x.device)
        x = self.system.rounded(x, index)
        product = self.system.product(x, index) if product is None else product
        rhs = self.system.rhs if index is None else self.system.rhs.index_select(0, index)
        residual = rhs - product
        space = self.system.space
        norms: Floats = np.sqrt(space.read(space.dots(residual, residual)))
        taken = self._take(rows, x, norms)
        if len(taken) == len(self.solution):
            self.residual = residual
        elif len(taken):
            place, of_all = (torch.from_numpy(each).to(x.device) for each in (taken, rows[taken]))
            self.residual.index_copy_(0, of_all, residual.index_select(0, place))

    def accept(self, rows: Rows, x: Tensor, norms: Floats) -> None:
        """The same without a product: `norms` (len(rows),) are known to be those of the residuals of `x`, rounded as it
        would be returned. `residual` stays as it is, so no cycle may start from these rows."""
        if len(self._take(rows, x, norms)):
            self.residual_from = "recurrence"

    def _take(self, rows: Rows, x: Tensor, norms: Floats) -> Rows:
        """Takes what is better, sets why rows stopped, and returns which of `rows` it took, by their place in there."""
        taken = np.flatnonzero(norms < self.norms[rows])  # false for NaN
        if len(taken) == len(self.solution):
            self.solution.copy_(x)
        elif len(taken):
            place = torch.from_numpy(taken).to(x.device)
            self.solution.index_copy_(0, torch.from_numpy(rows[taken]).to(x.device), x.index_select(0, place))
        self.norms[rows[taken]] = norms[taken]
        for row, norm in zip(rows.tolist(), norms.tolist(), strict=True):
            if self.norms[row] <= self.tolerances[row]:
                self.stop_reasons[row] = StopReason.CONVERGED
            else:
                self.stop_reasons[row] = StopReason.STEPS if isfinite(norm) else StopReason.DIVERGED
        return taken

    def set_stop_reason(self, reason: StopReason) -> None:
        """Sets why all rows stopped that have neither converged nor diverged."""
        self.stop_reasons = [reason if given == StopReason.STEPS else given for given in self.stop_reasons]

    def warm_start(self, state: SolverState | None) -> None:
        """Starts from the solution in `state` instead, if it has the shapes, dtypes and device of the right-hand sides
        and is better than 0."""
        if state is None or state.solution is None:
            return
        if self.system.space.all(are_alike(state.solution, self.system.unflatten(self.solution))):
            rows, x = self.unsolved(), self.system.flatten(state.solution)
            some = len(rows) < len(x)
            self.update(rows, x.index_select(0, torch.from_numpy(rows).to(x.device)) if some else x)

    def check_symmetry(self, error: float) -> None:
        """Takes note of what `check_pair` is about, if it is a number."""
        if np.isfinite(error):
            self.symmetry_error = max(error, self.symmetry_error or 0.0)
            self.symmetric = self.symmetric and check_pair(self.system, error)

    def _look_into_failures(self) -> None:
        """Makes the reason NOT_FINITE where a row diverged without any gain and not even its first product, the one
        with the right-hand side, is finite: a product that only such solves spend."""
        if StopReason.DIVERGED not in self.stop_reasons:
            return
        diverged = np.array([reason == StopReason.DIVERGED for reason in self.stop_reasons])
        failed = np.flatnonzero(diverged & (self.norms == self.rhs_norms))
        if len(failed):
            index = torch.from_numpy(failed).to(self.solution.device)
            product = self.system.product(self.system.rhs.index_select(0, index), index)
            for row in failed[~self.system.space.are_finite(product)]:
                self.stop_reasons[row] = StopReason.NOT_FINITE

    def result(self, iterations: int, **more: Any) -> tuple[list[Tensor], SolveStats]:
        """The solution and its stats; `more` are fields of SolveStats that only the solver knows."""
        self._look_into_failures()
        residuals = np.divide(self.norms, self.rhs_norms, out=np.zeros_like(self.norms), where=self.rhs_norms > 0)
        worst = int(residuals.argmax())
        stats = SolveStats(
            iterations=iterations,
            matvecs=self.system.matvecs,
            residual=float(residuals[worst]),
            converged=self.symmetric and len(self.unsolved()) == 0,
            stop_reason=self.stop_reasons[worst] if self.symmetric else StopReason.NOT_SYMMETRIC,
            residuals=tuple(residuals.tolist()),
            residual_from=self.residual_from,
            symmetry_error=self.symmetry_error,
            **more,
        )
        return self.system.unflatten(self.solution), stats
