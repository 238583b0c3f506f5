"""Solvers of `H x = b` over lists of tensors: frozen settings with `solve(matvec, rhs) -> (solution,
SolveStats)`."""

from auxfast.solvers.base import Matvec, Solver, SolveStats
from auxfast.solvers.identity import Identity
from auxfast.solvers.neumann import Neumann

__all__ = ["Identity", "Matvec", "Neumann", "SolveStats", "Solver"]
