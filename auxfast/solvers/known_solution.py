"""What the solvers share that take their solution from elsewhere than from products with H."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from auxfast.solvers.base import Matvec, SolverState, SolveStats, StopReason
from auxfast.solvers.linear_system import LinearSystem

MixedProduct = Literal["exact", "difference"]
"""How to take the derivative of `<x, d inner / d W>` in the outer parameters: through the recorded gradient; or by the
central difference of two gradients at `W +- e x`, with `e = 0.01 / |x|`."""


class KnownSolution(ABC):
    """Solver that knows x before any product with H. It multiplies the x that it returns, at most, and that once.

    `hypergradient` can then take the mixed product in the same pass, or without H, and looks for nothing that only more
    products would tell: whether H is symmetric, or a parameter at a kink.

    Attributes:
        mixed: see `MixedProduct`. Where it is "difference", no second derivatives are recorded at all.
        lookahead_lr: learning rate of the step of the inner training after which the outer gradient is to be taken; 0
            where that is the one at the inner parameters as they are.
    """

    mixed: MixedProduct = "exact"

    @property
    def lookahead_lr(self) -> float:
        return 0.0

    def without_lookahead(self) -> KnownSolution:
        """The same solver for an outer gradient that is given."""
        return self

    @abstractmethod
    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """The solution; see `Solver.solve`."""


def check_mixed(value: str) -> None:
    if value not in ("exact", "difference"):
        raise ValueError(f"mixed must be 'exact' or 'difference', not {value!r}")


def without_certificate(system: LinearSystem, step_size: float | None = None) -> SolveStats:
    """The stats of a solve that has spent no product: residuals are unknown, but where the right-hand side is zero."""
    residuals = tuple(math.nan if norm else 0.0 for norm in system.rhs_norms.tolist())
    trivial = not any(map(math.isnan, residuals))
    return SolveStats(
        iterations=0,
        matvecs=0,
        residual=0.0 if trivial else math.nan,
        converged=trivial,
        stop_reason=StopReason.TRIVIAL if trivial else StopReason.STEPS,
        step_size=step_size,
        residuals=residuals,
    )
