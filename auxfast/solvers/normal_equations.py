"""LSQR (Paige & Saunders 1982): least squares by products with the matrix and its transpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxfast.solvers.base import SolverState
from auxfast.solvers.best_iterate import BestIterate, Floats
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.restarted import Cycle, RestartedSolver


@dataclass(frozen=True)
class NormalEquations(RestartedSolver):
    """The iterate of the smallest residual over the Krylov space of `A^T A` and `A^T b`, `A = H + damping I`.

    It is conjugate gradients on `A^T A x = A^T b`, in the form that is as exact as the matrix and not its square allows
    (LSQR). The residual never grows, five vectors are held whatever the number of steps, and no matrix makes it fail:
    where `GMRES` stagnates, or runs out of memory, this goes on. The price is the square of the condition number, in
    steps and for two products each: about `condition number * log(2 / accuracy) / 2` steps. If A is singular it finds
    the shortest solution, or the shortest of the smallest residual (`stagnated`, if that is above the tolerance).

    The residual is that of `A x = b`, and the damping is in A, as with the other solvers: this is no Tikhonov
    regularisation `A^T A + damping I`.

    Args:
        steps: at most, each of two products, one with H and one with its transpose (which a symmetric H itself is); a
            further one tells the true residual in the end.
        tol: stop once the relative residual is at most this, between 0 and 1. `None`: go on to working precision.
        damping: at least 0; added to every eigenvalue of H.
        warm_start: start from `state.solution` if that has a smaller residual than x = 0; costs a product.

    Raises:
        ValueError: a setting outside its range.
    """

    steps: int = 100
    tol: float | None = 1e-3
    damping: float = 0.0
    warm_start: bool = False

    def _iterate(self, best: BestIterate, state: SolverState | None) -> dict[str, Any]:
        transposed = best.system.transposed  # where there is none, that says so before any work is done
        stats = super()._iterate(best, state)
        if transposed is not best.system:
            best.system.matvecs += transposed.matvecs
        return stats

    def _cycle(self, system: LinearSystem, index: Tensor, residual: Tensor, norms: Floats, tolerances: Floats) -> Cycle:
        return _Bidiagonalization(system, index, residual, norms, tolerances)


class _Bidiagonalization(Cycle):
    """The Golub-Kahan process `beta u = A v - alpha u`, `alpha v = A^T u - beta v`, and the QR factorisation of its
    bidiagonal matrix by one rotation (c, s) a step. Names as in the authors' paper.

    All scalars are (k,) float64, all vectors (k, n).
    """

    def __init__(
        self, system: LinearSystem, index: Tensor, residual: Tensor, norms: Floats, tolerances: Floats
    ) -> None:
        super().__init__(system, index, norms, tolerances)
        self._transposed = system.transposed
        self._rounding = torch.finfo(system.dtype).eps  # of the products
        zero, one = torch.zeros_like(self.norms), torch.ones_like(self.norms)
        self.u = residual / self.norms[:, None].to(residual.dtype)
        self.x, self.v, self.w = (torch.zeros_like(residual) for _ in range(3))
        self.beta, self.phibar = zero, self.norms
        self.c, self.s, self.rho = -one, zero, one  # as if a step had been: they leave the first v as it is
        self.largest = zero  # of the entries of the bidiagonal matrix, at most |A|

    def step(self) -> None:
        self.v, alpha = self._next(self._transposed, self.u, self.beta, self.v)
        self._stop(alpha * self.c.abs() <= self._rounding * self.largest)  # A^T r = 0: the residual cannot be smaller
        self.w = self.v - _column(self.s * alpha / self.rho, self.v) * self.w
        self.u, self.beta = self._next(self._system, self.v, alpha, self.u)
        rhobar = -self.c * alpha
        rho = torch.hypot(rhobar, self.beta)
        self.largest = torch.maximum(self.largest, rho)
        self._stop(rho == 0)
        self.rho = torch.where(self.running, rho, 1)
        self.c, self.s = rhobar / self.rho, self.beta / self.rho
        taken = torch.where(self.running, self.c * self.phibar / self.rho, 0)
        self.x += _column(taken, self.x) * torch.where(self.running[:, None], self.w, 0)
        self.phibar = torch.where(self.running, self.s * self.phibar, self.phibar)
        self._stop(self.phibar <= self.tolerances)

    def _next(self, system: LinearSystem, a: Tensor, coefficient: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The unit vectors along `A a - coefficient b`, and what they were divided by; zeros for rows that have stopped
        or stop here."""
        vector = torch.addcmul(self.product(system, a), _column(coefficient, a), b, value=-1)
        norm = system.space.dots(vector, vector).sqrt()
        taken = self.running & norm.isfinite()
        self.broken |= self.running ^ taken
        self.running = taken
        norm = torch.where(taken, norm, 0)
        return torch.where((norm > 0)[:, None], vector / _column(norm, vector), 0), norm

    def _stop(self, where: Tensor) -> None:
        self.running = self.running & ~where

    def correction(self) -> Tensor:
        return self.x


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(k,) -> (k, 1), of the dtype of `like`."""
    return values[:, None].to(like.dtype)
