"""Conjugate gradients (Hestenes & Stiefel 1952), for positive definite Hessians."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auxfast.ops.krylov import linear_combination_, row_dots
from auxfast.solvers.best_iterate import Floats
from auxfast.solvers.krylov import BROKEN, CURVED, REACHED, SINGULAR, KrylovSolver, Recurrence, Scalars
from auxfast.solvers.preconditioners import Apply


@dataclass(frozen=True)
class ConjugateGradient(KrylovSolver):
    """The iterate whose error is smallest in the norm of `H + damping I`, over the Krylov space of the residual.

    About `sqrt(condition number) / 2 * log(2 / accuracy)` steps, and no more than H has distinct eigenvalues. The
    residual may rise on the way, so the best iterate is kept.

    **Negative curvature.** A direction with `p . (H + damping I) p < 0` means that the inner parameters are at no
    minimum, where conjugate gradients minimise nothing: the row stops at its best iterate so far. If it is the very
    first direction that is x = 0 (or the warm start): along `b`, a positive step only raises the residual, and a
    negative one would turn the hypergradient round. The stats say `negative curvature`; `MINRES` carries on instead,
    and enough damping makes the system definite.

    Args:
        steps, tol, damping, warm_start, preconditioner: see `KrylovSolver`.
    """

    @staticmethod
    def _recurrence(x: Tensor, residual: Tensor, tolerances: Floats, precondition: Apply | None) -> Recurrence:
        return _ConjugateGradient(x, residual, tolerances, precondition)


class _ConjugateGradient(Recurrence):
    """The recurrence in the notation of Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm 9.1."""

    def __init__(self, x: Tensor, residual: Tensor, tolerances: Floats, precondition: Apply | None) -> None:
        super().__init__(x, tolerances, precondition)
        self.r = residual
        self.z = precondition(self.r) if precondition else self.r
        self.direction = self.p = self.z.clone()
        self.rz = self.scalars(row_dots(self.r, self.p))
        self.pp = self.scalars(row_dots(self.p, self.p))
        self.rr = self.scalars(row_dots(self.r, self.r))
        self.first_pp, self.beta = self.pp, self.zero
        self.best_x, self.best_rr = x.clone(), self.rr
        self.largest = self.zero  # curvature seen
        self.last = self.zero  # beta / alpha of the step before
        self.stop(~(self.rz > 0), BROKEN)

    def step(self, product: Tensor) -> None:
        xp, p, r = self.xp, self.p, self.r
        pap = self.scalars(row_dots(p, product))
        self._check_curvature(pap / self.pp)
        if self.taken == 1:  # p0 . A p1, which is 0 but for p0 . A p1 - p1 . A p0; p1 = z + beta p0
            difference = (pap - self.scalars(row_dots(self.z, product))) / self.beta
            self.note_asymmetry(difference / (xp.sqrt(self.first_pp * self.pp) * self.largest))

        alpha = self.rz / pap
        rr = self.scalars(linear_combination_(r, [product], self.coefficients(self.one, -alpha)))
        self.stop(~xp.isfinite(rr), BROKEN)
        self._keep_best(rr)
        linear_combination_(self.x, [p], self.coefficients(self.one, alpha))

        z = self.precondition(r) if self.precondition else r
        rz = self.scalars(row_dots(r, z)) if self.precondition else rr
        beta = rz / self.rz
        self.record(1 / alpha + self.last, xp.sqrt(beta) / alpha)
        self.z, self.rz, self.beta, self.last = z, rz, beta, beta / alpha

        self.stop(rr <= self.tolerances**2, REACHED)
        self.stop(~(rz > 0), BROKEN)  # a preconditioner that is not positive definite
        self.pp = self.scalars(linear_combination_(p, [z], self.coefficients(beta, self.one)))

    def _check_curvature(self, curvature: Scalars) -> None:
        self.stop(~self.xp.isfinite(curvature), BROKEN)
        self.largest = self.xp.maximum(self.largest, abs(curvature))
        flat = self.tiny * self.largest
        negative = curvature < -flat
        self.negative_curvature |= self.active & negative
        self.stop(negative, CURVED)
        self.stop(curvature <= flat, SINGULAR)

    def _keep_best(self, rr: Scalars) -> None:
        """Copies the iterate where it is the best so far and the next one, of squared residual `rr`, is worse."""
        better = self.rr <= self.best_rr
        leaving = self.active & better & (rr > self.rr)
        if self.xp is not np or leaving.any():
            copy = self.xp.where(leaving, 1.0, self.zero)
            linear_combination_(self.best_x, [self.x], self.coefficients(1 - copy, copy))
            self.best_rr = self.xp.where(leaving, self.rr, self.best_rr)
        self.rr = self.xp.where(self.active, rr, self.rr)

    def best(self) -> Tensor:
        better = torch.as_tensor(self.rr <= self.best_rr, device=self.x.device)
        return torch.where(better[:, None], self.x, self.best_x)
