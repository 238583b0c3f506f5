"""What all solvers share: the matvec they are given, the statistics they return, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Matvec = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""`v -> H v`, one tensor per parameter. It must not keep `v`, which the solver goes on to change."""


@dataclass(frozen=True)
class SolveStats:
    """How a solve of `H x = b` went."""

    iterations: int
    matvecs: int
    """Hessian-vector products spent, those for the certificate included."""
    residual: float
    """`||b - H x|| / ||b||` over all tensors together; `inf` if that is not finite. 0 is exact, and 1 is what
    `x = 0` has. Every solver says in its documentation which `x` it is for."""
    converged: bool
    """Whether the residual is within the solver's tolerance (without one: whether it is 0)."""
    step_size: float | None
    stop_reason: str
    """`converged`; `steps`: the fixed number of steps is done; `diverged`: the residual is above 1 or not
    finite; `trivial`: `b` is zero, and so is the exact solution."""


class Solver(Protocol):
    """A setting of a method, reusable and without state."""

    def solve(self, matvec: Matvec, rhs: Sequence[Tensor]) -> tuple[list[Tensor], SolveStats]:
        """Solves `H x = rhs`, which stays as it is; the solution has its shapes and dtype, and no graph."""
        ...


TRIVIAL = SolveStats(iterations=0, matvecs=0, residual=0.0, converged=True, step_size=None, stop_reason="trivial")


def relative_residual(squared_residual: float, squared_rhs: float) -> float:
    """`||r|| / ||b||` of the squared norms; raises ValueError if `b` itself is not finite."""
    if not math.isfinite(squared_rhs):
        raise ValueError("rhs is not finite: the gradient of the outer loss holds an inf or NaN")
    if squared_rhs == 0:
        return 0.0
    return math.inf if math.isnan(squared_residual) else math.sqrt(squared_residual / squared_rhs)


def check_rhs(rhs: Sequence[Tensor]) -> None:
    if not rhs:
        raise ValueError("rhs is empty: a solver needs at least one tensor")


def check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, not {value!r}")
