"""The frame that the iterative solvers share, and how often they read numbers from the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from auxfast.solvers.base import (
    Matvec,
    SolverState,
    SolveStats,
    check_damping,
    check_flag,
    check_steps,
    check_tol,
    refuse_not_symmetric,
)
from auxfast.solvers.best_iterate import BestIterate
from auxfast.solvers.linear_system import LinearSystem

CHECK_EVERY = 8
"""Steps between two checks where reading a number waits for the device: one wait is then spread over 8 products, and at
most 7 steps are done in vain."""


def steps_per_check(device: torch.device) -> int:
    """Steps after which a solver reads from the device whether to go on; on a CPU reading is free, and this is 1."""
    return 1 if device.type == "cpu" else CHECK_EVERY


class IterativeSolver(ABC):
    """Settings that iterative solvers share, and the frame of a solve; subclasses are frozen dataclasses.

    Args:
        steps: steps of the method at most, at least 1; each is one product.
        tol: stop once the relative residual is at most this, between 0 and 1; `None`: see the solver.
        damping: at least 0; added to every eigenvalue of H.
        warm_start: start from `state.solution` if that has a smaller residual than x = 0; costs a product.

    Raises:
        ValueError: a setting outside its range.
    """

    steps: int
    tol: float | None
    damping: float
    warm_start: bool
    _symmetric_alone: ClassVar[bool] = True
    """Whether the method needs a symmetric matrix."""

    def __post_init__(self) -> None:
        check_steps("steps", self.steps)
        check_tol(self.tol)
        check_damping(self.damping)
        check_flag("warm_start", self.warm_start)

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `(H + damping I) x = rhs`; see `Solver.solve`.

        Raises:
            ValueError: `rhs` is empty or not finite, or (batched) of different numbers of right-hand sides; or `matvec`
                says that it is not symmetric, and the method needs that.
            RuntimeError: `matvec` returns other shapes or dtypes than it was given.
        """
        if self._symmetric_alone:
            refuse_not_symmetric(self, matvec)
        system = LinearSystem(matvec, rhs, self.damping, batched)
        best = BestIterate(system, self.tol)
        if self.warm_start:
            best.warm_start(state)
        stats = self._iterate(best, state)
        if self.warm_start and state is not None:
            state.solution = system.unflatten(best.solution.clone())
        return best.result(**stats)

    @abstractmethod
    def _iterate(self, best: BestIterate, state: SolverState | None) -> dict[str, Any]:
        """Improves the rows of `best` that are unsolved, in cycles that each start from the true residual. Returns the
        fields of SolveStats that `best` does not know; `iterations` is one of them."""
