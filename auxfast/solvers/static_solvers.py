"""Which settings of which solvers are static: see `StaticSolve`."""

from __future__ import annotations

from auxfast.solvers.base import Solver
from auxfast.solvers.conjugate_gradient import ConjugateGradient
from auxfast.solvers.minres import MINRES
from auxfast.solvers.neumann import Neumann
from auxfast.solvers.static_krylov import StaticKrylov
from auxfast.solvers.static_neumann import StaticNeumann, StaticWholeSum
from auxfast.solvers.static_solve import StaticSolve

_STATIC = (
    "Static are Neumann with a number for step_size, tol=None and warm_start=False, and ConjugateGradient and MINRES "
    "without a preconditioner"
)


def static_solve(solver: Solver) -> StaticSolve:
    """The solver as operations that do not depend on numbers.

    Raises:
        TypeError: there is none for solvers of this kind. ValueError: there is none for these settings.
    """
    kind = type(solver)
    if kind is Neumann and isinstance(solver, Neumann):
        if solver.step_size == "auto" or solver.tol is not None or solver.warm_start:
            raise ValueError(f"solver={solver!r} decides from numbers that it computes on the way. {_STATIC}.")
        return StaticNeumann(solver) if solver.certify else StaticWholeSum(solver)
    if kind in (ConjugateGradient, MINRES) and isinstance(solver, (ConjugateGradient, MINRES)):
        if solver.preconditioner is not None:
            raise ValueError(f"solver={solver!r} builds its preconditioner from products. {_STATIC}.")
        return StaticKrylov(solver)
    raise TypeError(
        f"solver must be one that can be static, and {kind.__name__} decides from numbers that it computes on the way, "
        f"or looks at the losses itself. {_STATIC}; hypergradient() takes {kind.__name__} as it is"
    )
