"""Solvers of `H x = b` over lists of tensors: frozen settings with `solve(matvec, rhs) -> (solution,
SolveStats)`."""

from torch.serialization import add_safe_globals

from auxfast.solvers.base import LinearOperator, Matvec, Solver, SolverState, SolveStats, StopReason
from auxfast.solvers.block_diagonal import BlockDiagonal
from auxfast.solvers.chebyshev import Chebyshev
from auxfast.solvers.compact_minres import CompactMINRES
from auxfast.solvers.conjugate_gradient import ConjugateGradient
from auxfast.solvers.dense import Dense
from auxfast.solvers.gmres import GMRES
from auxfast.solvers.gradient_flow import GradientFlow
from auxfast.solvers.identity import Identity
from auxfast.solvers.inverse_operator import InverseOperator
from auxfast.solvers.iterative import IterativeSolver
from auxfast.solvers.krylov import KrylovSolver
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.minres import DEFAULT_SOLVER, MINRES
from auxfast.solvers.neumann import Neumann
from auxfast.solvers.normal_equations import NormalEquations
from auxfast.solvers.nystrom import LowRank, Nystrom
from auxfast.solvers.one_step import OneStep
from auxfast.solvers.optimizer_state import FromOptimizer
from auxfast.solvers.preconditioners import Diagonal, Jacobi, Preconditioner
from auxfast.solvers.sama import SAMA
from auxfast.solvers.single_loop import SingleLoop

# A SolverState may hold these besides tensors and numbers. They are plain data, which checkpoints may be loaded with.
add_safe_globals([Diagonal, Jacobi, LowRank, Nystrom])

__all__ = [
    "DEFAULT_SOLVER",
    "GMRES",
    "MINRES",
    "SAMA",
    "BlockDiagonal",
    "Chebyshev",
    "CompactMINRES",
    "ConjugateGradient",
    "Dense",
    "FromOptimizer",
    "GradientFlow",
    "Identity",
    "InverseOperator",
    "IterativeSolver",
    "Jacobi",
    "KrylovSolver",
    "LinearOperator",
    "LinearSystem",
    "Matvec",
    "Neumann",
    "NormalEquations",
    "Nystrom",
    "OneStep",
    "Preconditioner",
    "SingleLoop",
    "SolveStats",
    "Solver",
    "SolverState",
    "StopReason",
]
