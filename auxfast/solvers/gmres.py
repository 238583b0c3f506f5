"""GMRES (Saad & Schultz 1986), restarted: for matrices that need not be symmetric."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auxfast.solvers.base import check_steps
from auxfast.solvers.best_iterate import Floats
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.restarted import Cycle, RestartedSolver


@dataclass(frozen=True)
class GMRES(RestartedSolver):
    """The iterate of the smallest residual over the Krylov space of `b`, as MINRES finds it, for any square matrix.

    Without symmetry there is no short recurrence: all vectors of the space are held, so the memory of a step, and the
    work beside its product, grow with their number. After `restart` steps the space is dropped, and a new one begins at
    the residual. That costs convergence, and more than some steps: a matrix that permutes its vectors, say, makes no
    progress at all before the last of them. `stagnated` after a cycle of full length means just that, or a singular
    matrix. For symmetric matrices `MINRES` does the same in less time and memory, without restarts.

    Each row may take as many steps as H has distinct eigenvalues, more where it is not diagonalisable.

    Args:
        steps: at most, each of one product; a restart takes one of them for its residual, and a further product tells
            the true residual in the end.
        restart: steps of one cycle, at least 1; `restart + 1` vectors a right-hand side are held.
        tol: stop once the relative residual is at most this, between 0 and 1. `None`: go on to working precision.
        damping: at least 0; added to every eigenvalue of H.
        warm_start: start from `state.solution` if that has a smaller residual than x = 0; costs a product.

    Raises:
        ValueError: a setting outside its range.
    """

    steps: int = 100
    restart: int = 30
    tol: float | None = 1e-3
    damping: float = 0.0
    warm_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps("restart", self.restart)

    def _cycle_steps(self) -> int:
        return self.restart

    def _cycle(self, system: LinearSystem, index: Tensor, residual: Tensor, norms: Floats, tolerances: Floats) -> Cycle:
        return _Arnoldi(system, index, residual, norms, tolerances, min(self.restart, self.steps))


class _Arnoldi(Cycle):
    """Orthonormal bases V of Krylov spaces, and the Hessenberg matrices with `A V_j = V_(j+1) H_j`.

    The residual of the best iterate after j steps has the norm `|r_0| / |y|` with `y^T H_j = 0` and `y_0 = 1`: it is
    the part of `|r_0| e_0` across the range of `H_j`, and y spans that complement. A column of H more is an entry of y
    more, `y_(j+1) = -(sum_i y_i h_ij) / h_(j+1)j`, so the norm costs one short sum, and no rotations.

    Attributes:
        basis: (k, steps + 1, n).
        hessenberg: (k, steps + 1, steps) float64.
        lengths: (k,), the columns of it that count.
    """

    def __init__(
        self, system: LinearSystem, index: Tensor, residual: Tensor, norms: Floats, tolerances: Floats, steps: int
    ) -> None:
        super().__init__(system, index, norms, tolerances)
        rows, size = residual.shape
        self.basis = residual.new_zeros(rows, steps + 1, size)
        self.basis[:, 0] = residual / self.norms[:, None].to(residual.dtype)
        self.hessenberg = residual.new_zeros(rows, steps + 1, steps, dtype=torch.float64)
        self.lengths = residual.new_zeros(rows, dtype=torch.long)
        self._across = torch.ones_like(self.norms)[:, None]  # y, (k, j + 1)
        self._rounding = 10 * torch.finfo(residual.dtype).eps

    def step(self) -> None:
        j = self._across.shape[1] - 1
        basis = self.basis[:, : j + 1]
        vector = self.product(self._system, self.basis[:, j].contiguous())[..., None]  # (k, n, 1)
        space = self._system.space
        first = space.sum(basis @ vector)  # (k, j + 1, 1)
        vector = torch.baddbmm(vector, basis.mT, first, alpha=-1)
        second = space.sum(basis @ vector)  # one Gram-Schmidt pass leaves what rounding put back
        vector = torch.baddbmm(vector, basis.mT, second, alpha=-1)[..., 0]
        above, norm = (first + second)[..., 0].double(), space.dots(vector, vector).sqrt()
        column = torch.cat([above, norm[:, None]], dim=1)
        size = torch.linalg.vector_norm(column, dim=1)  # of the product
        taken = self.running & size.isfinite()
        self.broken |= self.running ^ taken
        self.lengths += taken
        self.hessenberg[:, : j + 2, j] = column  # what rows that stopped have in there is behind their lengths
        across = (self._across * above).sum(dim=1) / -norm
        self._across = torch.cat([self._across, across[:, None]], dim=1)
        left = self.norms / torch.linalg.vector_norm(self._across, dim=1)
        # A norm that is rounding ends an invariant subspace, which the solution is in, if there is one.
        self.running = taken & (norm > self._rounding * size) & (left > self.tolerances)
        self.basis[:, j + 1] = torch.where(self.running[:, None], vector / norm[:, None].to(vector.dtype), 0)

    def correction(self) -> Tensor:
        hessenberg, lengths, norms = (
            self._system.space.read(t.double()) for t in (self.hessenberg, self.lengths, self.norms)
        )
        weights = np.zeros(hessenberg.shape[:2])  # (k, steps + 1)
        of_products, of_sums = (torch.finfo(dtype).eps for dtype in (self._system.dtype, self.basis.dtype))
        for row, (matrix, length, norm) in enumerate(zip(hessenberg, lengths.astype(int).tolist(), norms, strict=True)):
            rounding = max(of_products, length * of_sums)  # singular values of this size may be 0
            start = np.zeros(length + 1)
            start[0] = norm
            weights[row, :length] = np.linalg.lstsq(matrix[: length + 1, :length], start, rcond=rounding)[0]
        correction: Tensor = (torch.from_numpy(weights[:, None]).to(self.basis) @ self.basis)[:, 0]
        return correction
