"""MINRES (Paige & Saunders 1975), for any symmetric Hessian: the solver that is used where none is named."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auxfast.ops.krylov import linear_combination_, row_dots
from auxfast.solvers.best_iterate import Floats
from auxfast.solvers.krylov import BROKEN, REACHED, SINGULAR, KrylovSolver, Recurrence, Scalars
from auxfast.solvers.preconditioners import Apply

_NULL = 0.1  # curvature, in machine epsilons of the largest one, up to which a residual counts as a null vector of H


@dataclass(frozen=True)
class MINRES(KrylovSolver):
    """The iterate of the smallest residual over the Krylov space of `b`: the best there is for a number of products.

    It needs no step size, its residual cannot grow, and H may be indefinite. About `sqrt(condition number) / 2 *
    log(2 / accuracy)` steps if it is not, and no more than H has distinct eigenvalues in any case.

    **Negative curvature** is noticed, at no cost, as soon as the Krylov space holds any; the stats say so, since the
    inner parameters are then at no minimum. The solution is still that of the linear system.

    **Singular H.** If `b` is in its range, the solution is the shortest one. If not, the residual cannot become 0: the
    iteration ends (`stagnated`) before a step along null vectors of H, so long that its rounding outweighs its gain. So
    it does if H is singular to the precision of the parameters; damping mends that.

    **With a preconditioner** the residual is smallest in the norm of that, and its Euclidean norm, which decides when
    to stop, may rise on the way.

    Args:
        steps, tol, damping, warm_start, preconditioner: see `KrylovSolver`.
    """

    @staticmethod
    def _recurrence(x: Tensor, residual: Tensor, tolerances: Floats, precondition: Apply | None) -> Recurrence:
        return _MINRES(x, residual, tolerances, precondition)


DEFAULT_SOLVER = MINRES(steps=10, warm_start=True)
"""The solver of calls that name none: at most ten products and that of the certificate, from where the last call with
the same `state` has ended. It solves well-conditioned systems to `tol`. A network's it leaves at a residual of 0.3 to
0.7; a hundred products leave it at 0.2 to 0.4, and cost ten times as much (docs/choosing.md)."""


class _MINRES(Recurrence):
    """The Lanczos process, and the QR factorisation of its tridiagonal matrix by one rotation (c, s) a step.

    Names as in the authors' own program (stanford.edu/group/SOL/software/minres), which differs from the paper in
    signs. A Lanczos vector is v = z / beta with z = M u, M the preconditioner and u . z = beta^2.
    """

    def __init__(self, x: Tensor, residual: Tensor, tolerances: Floats, precondition: Apply | None) -> None:
        super().__init__(x, tolerances, precondition)
        self.u, self.u_old = residual, residual  # the first coefficient of u_old is 0
        self.r = residual.clone() if precondition else residual  # it is updated with a preconditioner only
        z = precondition(residual) if precondition else residual
        self.beta = self.xp.sqrt(self.scalars(row_dots(residual, z)))
        self.direction = self.v = torch.zeros_like(x)
        linear_combination_(self.v, [z], self.coefficients(self.zero, 1 / self.beta))
        # Rounding in w grows with the square of the condition number (Sleijpen, van der Vorst & Modersitzki 2000), so
        # w and x are float64: in float32 the solution would be lost from a condition number of 1e4 on.
        self.x, self.v_double = x.double(), self.v.double()
        self.w, self.w_old = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.phibar = self.beta
        self.c, self.s = -self.one, self.zero
        self.dbar, self.epsilon = self.zero, self.zero  # this step's column has `epsilon_old`, the one before
        self.beta_ratio = self.zero  # beta / the beta before
        self.largest = self.zero  # the longest column of the tridiagonal matrix, at most |H|

    def step(self, product: Tensor) -> None:
        alfa, z = self._lanczos(product)
        delta, gbar = self._apply_rotation(alfa)
        self._check_curvature(alfa, gbar)

        gamma = self.xp.hypot(gbar, self.beta)
        self.c, self.s = gbar / gamma, self.beta / gamma
        phi, phibar_old, self.phibar = self.c * self.phibar, self.phibar, self.s * self.phibar

        coefficients = self.coefficients(-self.epsilon_old / gamma, -delta / gamma, 1 / gamma)
        ww = self.scalars(linear_combination_(self.w_old, [self.w, self.v_double.copy_(self.v)], coefficients))
        self.w, self.w_old = self.w_old, self.w
        if not self.precondition:  # phibar would be in the preconditioner's norm, and w is not
            self._check_gain(phibar_old, abs(phi) * self.xp.sqrt(ww))
        linear_combination_(self.x, [self.w], self.coefficients(self.one, phi))

        norm = self.phibar
        if self.precondition:  # r = s^2 r - (c phibar / beta) u, whose second coefficient may be 0 / 0 as it stands
            coefficients = self.coefficients(self.s**2, -self.c * phibar_old / gamma)
            norm = self.xp.sqrt(self.scalars(linear_combination_(self.r, [self.u], coefficients)))
        self.stop(norm <= self.tolerances, REACHED)
        linear_combination_(self.v, [z], self.coefficients(self.zero, 1 / self.beta))

    def _lanczos(self, product: Tensor) -> tuple[Scalars, Tensor]:
        """`product` becomes the next u; returns alfa = v . A v, and M u."""
        alfa = self.scalars(row_dots(self.v, product))
        coefficients = self.coefficients(self.one, -alfa / self.beta, -self.beta_ratio)
        squares = linear_combination_(product, [self.u, self.u_old], coefficients)
        z = self.precondition(product) if self.precondition else product
        beta = self.xp.sqrt(self.scalars(row_dots(product, z) if self.precondition else squares))
        if self.taken == 1:  # the new u is orthogonal to the first v but for v1 . A v2 - v2 . A v1
            difference = self.scalars(row_dots(self.u_old, z)) * self.beta_ratio / self.beta
            self.note_asymmetry(difference / self.xp.maximum(self.largest, self.xp.hypot(alfa, beta)))
        self.u, self.u_old = product, self.u
        self.record(alfa, beta)
        self.beta, self.beta_ratio = beta, beta / self.beta
        return alfa, z

    def _apply_rotation(self, alfa: Scalars) -> tuple[Scalars, Scalars]:
        """Applies the last rotation to the new column of the tridiagonal matrix; returns delta and gbar."""
        delta = self.c * self.dbar + self.s * alfa
        gbar = self.s * self.dbar - self.c * alfa
        self.epsilon_old, self.epsilon = self.epsilon, self.s * self.beta
        self.dbar = -self.c * self.beta
        return delta, gbar

    def _check_curvature(self, alfa: Scalars, gbar: Scalars) -> None:
        """Stops rows whose residual r before this step is a null vector, and notes negative curvature along it.

        `r . A r / r . r = -c gbar` (Liu & Roosta 2022, "MINRES: from negative curvature detection to monotonicity
        properties"), and `|A r| / |r| = hypot(gbar, dbar)` (in Paige & Saunders)."""
        curvature, slope = -self.c * gbar, self.xp.hypot(gbar, self.dbar)
        self.stop(~self.xp.isfinite(slope), BROKEN)  # a preconditioner that is not positive definite ends here too
        self.largest = self.xp.maximum(self.largest, self.xp.hypot(alfa, self.beta))
        flat = self.tiny * self.largest
        self.negative_curvature |= self.active & (curvature < -flat)
        null = (abs(curvature) <= _NULL * flat) & (slope**2 <= _NULL * flat * self.largest)
        self.stop(null, SINGULAR)

    def _check_gain(self, phibar_old: Scalars, length: Scalars) -> None:
        """Stops before a step of this length if its rounding, in a product with H, is more than it takes from the
        residual: it would go along null vectors. Rounding within `sqrt(eps)` of the residual never matters."""
        rounding = self.tiny * self.largest * length
        allowed = self.xp.maximum(self.tiny**0.5 * phibar_old, phibar_old - self.phibar)
        self.stop(~(rounding < allowed), SINGULAR)

    def best(self) -> Tensor:
        return self.x.to(self.v.dtype)
