"""Conjugate gradients (Hestenes & Stiefel 1952), for positive definite Hessians."""

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
    BROKEN,
    CONJUGATE_GRADIENT_NUMBERS,
    conjugate_gradient_step_,
    conjugate_gradient_step_reference_,
)
from auxfast.solvers.best_iterate import Floats
from auxfast.solvers.krylov import KrylovSolver, Norms, Recurrence
from auxfast.solvers.preconditioners import Apply
from auxfast.solvers.space import VectorSpace


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
    def _recurrence(
        x: Tensor, residual: Tensor, norms: Norms, tolerances: Norms, precondition: Apply | None, space: VectorSpace
    ) -> Recurrence:
        return _ConjugateGradient(x, residual, norms, tolerances, precondition, space)


class _ConjugateGradient(Recurrence):
    names = CONJUGATE_GRADIENT_NUMBERS

    def __init__(
        self,
        x: Tensor,
        residual: Tensor,
        norms: Norms,
        tolerances: Norms,
        precondition: Apply | None,
        space: VectorSpace,
    ) -> None:
        squares = norms**2
        self._step: Callable[..., None] = (
            conjugate_gradient_step_
            if space.is_whole
            else partial(conjugate_gradient_step_reference_, dots=space.dots_of)
        )
        super().__init__(x, norms, tolerances, precondition, space, rz=squares, pp=squares, best_square=squares)
        self.r, self.z = residual, None
        self.best_x = x.clone()
        if precondition is None:
            self.direction = residual.clone()
            return
        self.z = precondition(residual)
        self.direction = self.z.clone()
        rz = space.dots(residual, self.z)
        self.number("rz").copy_(rz)
        self.number("pp").copy_(space.dots(self.z, self.z))
        self.number("status").masked_fill_(~(rz > 0), BROKEN)

    def step(self, product: Tensor) -> None:
        vectors = self.x, self.best_x, self.r, self.direction
        if self.precondition is None:
            self._step(*vectors, None, product, self.numbers)
            return
        self._step(*vectors, self.z, product, self.numbers, BEFORE_PRECONDITIONER)
        self.z = self.precondition(self.r)
        self._step(*vectors, self.z, product, self.numbers, AFTER_PRECONDITIONER)

    def best_rows(self) -> Tensor:
        last = self.number("square") <= self.number("best_square")
        return torch.where(last[:, None], self.x, self.best_x)

    def best(self, numbers: Floats) -> tuple[Tensor, Floats]:
        square, best_square = numbers[self.names["square"]], numbers[self.names["best_square"]]
        rows = self.x if (square <= best_square).all() else self.best_rows()
        return rows, np.sqrt(np.minimum(square, best_square))
