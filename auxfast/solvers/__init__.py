"""Solvers of `H x = b` over lists of tensors: frozen settings with `solve(matvec, rhs) -> (solution,
SolveStats)`."""

from torch.serialization import add_safe_globals

from auxfast.solvers.base import LinearOperator, Matvec, Solver, SolverState, SolveStats, StopReason
from auxfast.solvers.chebyshev import Chebyshev
from auxfast.solvers.conjugate_gradient import ConjugateGradient
from auxfast.solvers.dense import Dense
from auxfast.solvers.gradient_flow import GradientFlow
from auxfast.solvers.identity import Identity
from auxfast.solvers.iterative import IterativeSolver
from auxfast.solvers.krylov import KrylovSolver
from auxfast.solvers.minres import DEFAULT_SOLVER, MINRES
from auxfast.solvers.neumann import Neumann
from auxfast.solvers.nystrom import LowRank, Nystrom
from auxfast.solvers.preconditioners import Diagonal, Jacobi, Preconditioner

# A SolverState may hold these besides tensors and numbers. They are plain data, which checkpoints may be loaded with.
add_safe_globals([Diagonal, Jacobi, LowRank, Nystrom])

__all__ = [
    "DEFAULT_SOLVER",
    "MINRES",
    "Chebyshev",
    "ConjugateGradient",
    "Dense",
    "GradientFlow",
    "Identity",
    "IterativeSolver",
    "Jacobi",
    "KrylovSolver",
    "LinearOperator",
    "Matvec",
    "Neumann",
    "Nystrom",
    "Preconditioner",
    "SolveStats",
    "Solver",
    "SolverState",
    "StopReason",
]
