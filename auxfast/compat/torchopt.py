"""auxfast's solvers as `solve=` of torchopt's implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from auxfast.implicit.advice import found_nothing, problem_of, warn_of
from auxfast.solvers import MINRES, Solver, SolverState, SolveStats
from auxfast.solvers.base import check_solver, checked_solve

_DEFAULT_SOLVER = MINRES()


class LinearSolve:
    """A solver as the function `solve(matvec, b) -> x` that `torchopt.diff.implicit.custom_root(..., solve=)` takes,
    with the certificate of the last solve.

    Where the optimality function is the gradient of a loss, the matrix is symmetric, and any solver serves; where it
    is not, as for fixed-point maps, take one that does without symmetry, such as `GMRES()`.

    Args:
        solver: see `auxfast.solvers`.
        warn: whether to warn of a solve that is not to be trusted, as `hypergradient` does.

    Attributes:
        stats: how the last solve went; None before the first.
        state: what the solver keeps from one solve for the next, such as warm starts.

    Raises:
        TypeError: `solver` is none.
    """

    def __init__(self, solver: Solver = _DEFAULT_SOLVER, *, warn: bool = True) -> None:
        check_solver(solver)
        self.solver, self.warn = solver, warn
        self.state = SolverState()
        self.stats: SolveStats | None = None

    def __call__(self, matvec: Callable[[Any], Any], b: Any) -> Any:
        """Solves `A x = b`.

        Args:
            matvec: `v -> A v`, for v like `b`.
            b: a tuple of tensors, as `custom_root` gives, a list of tensors, or a tensor.

        Returns:
            x, like `b`, without a graph.

        Raises:
            TypeError: `b` is none of these.
        """
        if isinstance(b, Tensor):
            return self(lambda v: (matvec(v[0]),), (b,))[0]
        if not isinstance(b, (tuple, list)) or not all(isinstance(part, Tensor) for part in b):
            raise TypeError(f"b must be a tensor, or a tuple or list of tensors, not {b!r:.60}")
        kind: Any = getattr(type(b), "_make", type(b))  # a named tuple takes its entries one by one

        def listed(vectors: Sequence[Tensor]) -> list[Tensor]:
            return list(matvec(kind(vectors)))

        solution, self.stats = checked_solve(self.solver, listed, b, self.state)
        if self.warn:
            problem = problem_of(self.solver, self.stats, listed, b, found_nothing(self.stats, solution))
            warn_of(problem, self.solver, self.state)
        return kind(solution)
