"""The solver that forms the whole matrix, exact: for small problems, and to check the other solvers against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxfast.solvers.base import (
    Matvec,
    SolverState,
    SolveStats,
    StopReason,
    check_damping,
    check_steps,
    check_tol,
)
from auxfast.solvers.best_iterate import BestIterate
from auxfast.solvers.linear_system import MAX_BATCH, LinearSystem
from auxfast.solvers.space import refuse_pieces
from auxfast.solvers.symmetry import may_be_symmetric


@dataclass(frozen=True)
class Dense:
    """Forms `H + damping I` from its products with the unit vectors, and inverts its eigenvalues, in float64.

    n parameters take n products, three matrices of `8 n^2` bytes (600 MB for 5000) and some `10 n^3` operations. The
    matrix is symmetrised: H is symmetric, so what its products miss of that is rounding. Where it is more, the stop
    reason is `not symmetric`. A matrix that says that it is not is inverted by its singular values, as it stands.

    **Singular H.** Eigenvalues within rounding, `sqrt(n) eps` of the largest, eps being that of the parameters' dtype,
    are left out: of the solutions of the smallest residual it is the shortest one (the pseudo-inverse's). Should that
    residual be above `tol`, the stop reason is `stagnated`.

    Args:
        damping: at least 0; added to every eigenvalue of H.
        tol: the relative residual that counts as converged, between 0 and 1; nothing else depends on it.
        max_size: the most parameters that it accepts.

    Raises:
        ValueError: a setting outside its range.
    """

    damping: float = 0.0
    tol: float | None = 1e-3
    max_size: int = 5000

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_tol(self.tol)
        check_steps("max_size", self.max_size)

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `(H + damping I) x = rhs`; see `Solver.solve`. Neither uses nor updates `state`.

        Raises:
            ValueError: more than `max_size` parameters; or see `LinearSystem`.
            RuntimeError: `matvec` returns other shapes or dtypes than it was given.
        """
        system = LinearSystem(matvec, rhs, self.damping, batched)
        space = system.space
        refuse_pieces(space, "Dense", "take MINRES(), which forms no matrix")
        n = system.rhs.shape[1]
        if n > self.max_size:
            raise ValueError(
                f"Dense would form {n} x {n} numbers ({8 * n**2 / 1e9:.1f} GB), and its max_size is "
                f"{self.max_size}: use MINRES(), which forms no matrix, or Dense(max_size={n})"
            )
        best = BestIterate(system, self.tol)
        rows = best.unsolved()
        if len(rows) == 0:
            return best.result(iterations=0)
        matrix = _form(system).T
        if not space.are_finite(matrix).all():
            best.set_stop_reason(StopReason.DIVERGED)
            return best.result(iterations=0)
        more: dict[str, Any] = {}
        if system.symmetric:
            sizes = torch.stack([torch.linalg.vector_norm(part) for part in (matrix - matrix.T, matrix)])
            asymmetry, size = space.read(sizes).tolist()
            best.symmetry_error = asymmetry / size if size else 0.0
            best.symmetric = may_be_symmetric(system, best.symmetry_error, None, matrix.T, matrix)
            values, left = torch.linalg.eigh(matrix / 2 + matrix.T / 2)
            right = left.T
        else:
            left, values, right = torch.linalg.svd(matrix)
        rounding = n**0.5 * torch.finfo(rhs[0].dtype).eps * values.abs().amax()
        inverse = torch.where(values.abs() > rounding, 1 / values, 0.0)
        x = ((best.current(rows)[1].double() @ left) * inverse) @ right  # (len(rows), n)
        best.update(rows, x.to(system.rhs.dtype))
        best.set_stop_reason(StopReason.STAGNATED)
        if system.symmetric:
            more["largest_eigenvalue"] = float(values[-1]) - self.damping
            more["negative_curvature"] = bool(values[0] < -rounding)
        return best.result(iterations=0, **more)


def _form(system: LinearSystem) -> Tensor:
    """(n, n) float64, the transpose of the matrix: row i is the product with the i-th unit vector."""
    size = system.rhs.shape[1]
    matrix = system.rhs.new_empty(size, size, dtype=torch.float64)
    for start in range(0, size, MAX_BATCH):
        stop = min(start + MAX_BATCH, size)
        units = system.rhs.new_zeros(stop - start, size)
        units[:, start:stop].fill_diagonal_(1)
        matrix[start:stop] = system.product(units)
    return matrix
