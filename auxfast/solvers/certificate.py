"""The best solution that is known of each right-hand side, with its true residual: what a solver on a block returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from auxfast.ops.krylov import row_dots
from auxfast.solvers.base import Block, SolverState, SolveStats

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]

PROGRESS = 0.5  # what a restart must leave of the residual, at most, for another one to be worth its products


class Certified:
    """Starts at x = 0, whose residual is the right-hand side, and takes only what has a smaller one.

    So no residual is above 1, and nothing that is not finite is ever returned. The norms are on the host: an offer
    waits for the device once. `reasons` are the rows' stop reasons; "steps" is for the solver to make more precise.
    """

    def __init__(self, block: Block, tol: float | None) -> None:
        self.block = block
        self.solution = torch.zeros_like(block.rhs)  # (k, n)
        self.residual = block.rhs.clone()  # (k, n): rhs - (H + damping I) solution
        self.rhs_norms: Floats = block.rhs_norms.cpu().numpy()  # (k,)
        self.norms = self.rhs_norms.copy()  # (k,), of the rows of `residual`
        self.goals = (tol or 0.0) * self.rhs_norms  # (k,)
        self.reasons = ["steps" if norm > 0 else "trivial" for norm in self.rhs_norms]

    def unsolved(self) -> Rows:
        """The indices of the rows whose residual is above the tolerance."""
        return np.flatnonzero(self.norms > self.goals)

    def at(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Copies of those rows' solutions and residuals, each (len(rows), n)."""
        index = torch.from_numpy(rows).to(self.solution.device)
        return self.solution.index_select(0, index), self.residual.index_select(0, index)

    def offer(self, rows: Rows, x: Tensor, product: Tensor | None = None) -> None:
        """Takes `x` (len(rows), n) as the solution of those rows for which it is better, at one product a row if
        `product`, that with `x`, is not given."""
        index = torch.from_numpy(rows).to(x.device)
        residual = self.block.rhs.index_select(0, index) - (self.block.product(x) if product is None else product)
        norms: Floats = row_dots(residual, residual).sqrt().cpu().numpy()
        better = norms < self.norms[rows]  # false for NaN
        taken = torch.from_numpy(np.flatnonzero(better)).to(x.device)
        self.solution.index_copy_(0, index[taken], x.index_select(0, taken))
        self.residual.index_copy_(0, index[taken], residual.index_select(0, taken))
        self.norms[rows[better]] = norms[better]
        for row, norm in zip(rows, norms, strict=True):
            solved = self.norms[row] <= self.goals[row]
            self.reasons[row] = "converged" if solved else "steps" if np.isfinite(norm) else "diverged"

    def blame(self, reason: str) -> None:
        """Why all rows stopped that have neither converged nor diverged."""
        self.reasons = [reason if given == "steps" else given for given in self.reasons]

    def warm_start(self, state: SolverState | None) -> None:
        """Offers the solution that `state` holds, if it has the shapes, dtypes and device of the right-hand sides."""
        if state is None or state.solution is None:
            return
        if [_kind(t) for t in state.solution] == [_kind(t) for t in self.block.unflatten(self.solution)]:
            rows = self.unsolved()
            self.offer(rows, self.block.flatten(state.solution)[torch.from_numpy(rows).to(self.solution.device)])

    def result(self, iterations: int, **more: Any) -> tuple[list[Tensor], SolveStats]:
        """The solution and its stats; `more` are fields of SolveStats that only the solver knows."""
        residuals = np.divide(self.norms, self.rhs_norms, out=np.zeros_like(self.norms), where=self.rhs_norms > 0)
        worst = int(residuals.argmax())
        stats = SolveStats(
            iterations=iterations,
            matvecs=self.block.matvecs,
            residual=float(residuals[worst]),
            converged=len(self.unsolved()) == 0,
            stop_reason=self.reasons[worst],
            residuals=tuple(residuals.tolist()),
            **more,
        )
        return self.block.unflatten(self.solution), stats


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
