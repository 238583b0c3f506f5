"""MINRES (Paige & Saunders 1975), for any symmetric Hessian: the solver that is used where none is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from auxfast.ops.krylov import (
    AFTER_PRECONDITIONER,
    BEFORE_PRECONDITIONER,
    MINRES_NUMBERS,
    minres_step_,
    minres_step_reference_,
)
from auxfast.solvers.best_iterate import Floats
from auxfast.solvers.krylov import KrylovSolver, Norms, Recurrence
from auxfast.solvers.preconditioners import Apply
from auxfast.solvers.space import VectorSpace


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
    def _recurrence(
        x: Tensor, residual: Tensor, norms: Norms, tolerances: Norms, precondition: Apply | None, space: VectorSpace
    ) -> Recurrence:
        return _MINRES(x, residual, norms, tolerances, precondition, space)


DEFAULT_SOLVER = MINRES(steps=10, warm_start=True)
"""The solver of calls that name none: at most ten products and that of the certificate, from where the last call with
the same `state` has ended. It solves well-conditioned systems to `tol`. A network's it leaves at a residual of 0.3 to
0.7; a hundred products leave it at 0.1 to 0.4, and cost nearly ten times as much (docs/solvers.md)."""


class _MINRES(Recurrence):
    names = MINRES_NUMBERS
    exchanged = ("w", "w_old", "u", "u_old")

    def __init__(
        self,
        x: Tensor,
        residual: Tensor,
        norms: Norms,
        tolerances: Norms,
        precondition: Apply | None,
        space: VectorSpace,
    ) -> None:
        super().__init__(x, norms, tolerances, precondition, space, beta=norms, phibar=norms, c=-1.0)
        self.u, self.u_old = residual, residual  # the first coefficient of u_old is 0
        self.r = residual.clone()
        z = residual
        if precondition is not None:
            z = precondition(residual)
            beta = space.dots(residual, z).sqrt()
            self.number("beta").copy_(beta)
            self.number("phibar").copy_(beta)
        self.direction = z / self.number("beta")[:, None].to(z.dtype)
        self.x = x.double()  # csrc/krylov/minres_math.h says why
        self.w, self.w_old = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self._step: Callable[..., None] = (
            minres_step_ if space.is_whole else partial(minres_step_reference_, dots=space.dots_of)
        )

    def step(self, product: Tensor) -> None:
        vectors = self.x, self.w, self.w_old, self.direction, self.u, self.u_old, self.r
        if self.precondition is None:
            self._step(*vectors, None, product, self.numbers)
        else:
            self._step(*vectors, None, product, self.numbers, BEFORE_PRECONDITIONER)
            self._step(*vectors, self.precondition(product), product, self.numbers, AFTER_PRECONDITIONER)
        self.w, self.w_old = self.w_old, self.w
        self.u, self.u_old = product, self.u

    def best_rows(self) -> Tensor:
        return self.x.to(self.direction.dtype)

    def best(self, numbers: Floats) -> tuple[Tensor, Floats]:
        return self.best_rows(), np.sqrt(numbers[self.names["square"]])
