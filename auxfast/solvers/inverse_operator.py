"""An inverse that the user has, such as KFAC's, as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from auxfast.solvers.base import Matvec
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.preconditioners import Apply


@dataclass(frozen=True)
class InverseOperator:
    """An approximate inverse of `H + damping I` as a preconditioner: KFAC's, EKFAC's, a factorisation of one's own.

    Its damping is its own matter: give it about the solver's, or more. It must be symmetric positive definite; the
    solver notices where it is not, and stops with `diverged`. It is used as it is for every solve: give a new one where
    the parameters have moved far.

    Args:
        operator: `v -> approximately (H + damping I)^-1 v`, lists of tensors of the parameters' shapes in and out; with
            a `batched` (see `LinearOperator`) several right-hand sides go in one call.
            `auxfast.compat.linear_operators` makes one of an operator of curvlinops or SciPy.

    Raises:
        TypeError: `operator` is not callable.
        RuntimeError: at a solve, if `operator` returns other shapes or another dtype than it was given.
    """

    operator: Matvec

    refresh: ClassVar[int] = 1  # nothing is built that could be held

    def __post_init__(self) -> None:
        if not callable(self.operator):
            raise TypeError(
                f"operator must be a function of a list of tensors, not a {type(self.operator).__name__}: "
                "auxfast.compat.linear_operators adapts those of curvlinops and SciPy"
            )

    def build(self, system: LinearSystem) -> Apply:
        """See `Preconditioner.build`; no products."""
        like = [system.rhs.new_ones((1, *shape), dtype=system.dtype) for shape in system.shapes]
        return LinearSystem(self.operator, like, 0.0, batched=True, name="the InverseOperator").product
