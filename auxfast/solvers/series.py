"""Neumann series of several right-hand sides: the fused steps, when they stop, and the way back from growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from auxfast.ops.neumann import GROWTH, NeumannSteps, squared_norm
from auxfast.solvers.base import RHS_NOT_FINITE, Matvec, StopReason
from auxfast.solvers.iterative import steps_per_check
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.space import LOCAL, VectorSpace, as_row


class Products(Protocol):
    """The products `A v` of several series, `A = H + damping I`."""

    @property
    def matvecs(self) -> int:
        """Vectors multiplied so far."""
        ...

    def __call__(self, series: Sequence[Series]) -> Sequence[Sequence[Tensor]]: ...


class ListProducts:
    """Products of one series on the tensors of the right-hand side as they are, without copies; no damping."""

    def __init__(self, matvec: Matvec) -> None:
        self.matvecs = 0
        self._matvec = matvec

    def __call__(self, series: Sequence[Series]) -> list[Sequence[Tensor]]:
        return [self.product(s.v) for s in series]

    def product(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        self.matvecs += 1
        return without_graph(self._matvec(vectors))


def without_graph(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors, detached if gradients are being recorded, so that in-place operations may write to them."""
    return [tensor.detach() for tensor in tensors] if torch.is_grad_enabled() else tensors


class RowProducts:
    """Products of series that are rows of a linear system."""

    def __init__(self, system: LinearSystem) -> None:
        self._system = system
        self._alone: tuple[Tensor, Tensor] | None = None  # v of a series that was alone, and its view as one row

    @property
    def matvecs(self) -> int:
        return self._system.matvecs

    def __call__(self, series: Sequence[Series]) -> list[list[Tensor]]:
        vectors = [s.v[0] for s in series]
        index = None
        if self._system.has_own_matrices:
            index = torch.tensor([s.row for s in series], device=vectors[0].device)
        if len(vectors) > 1:
            rows = torch.stack(vectors)
        else:  # the same view each time, for which the system keeps what it made of it
            if self._alone is None or self._alone[0] is not vectors[0]:
                self._alone = vectors[0], vectors[0][None]
            rows = self._alone[1]
        return [[row] for row in self._system.product(rows, index)]


class Series:
    """The series from one right-hand side b: after j steps `v = (I - a A)^j a b`, and the solution `p` is the sum of
    all v so far.

    `v` is a times the residual of `p - v`. Once its norm grows it does so for ever, for the squares are the moments of
    `(I - a A)^2` and hence log-convex: the smallest is the last before.

    Args:
        start: b.
        step_size: a.
        tolerance: the norm of the residual that is small enough.
        row: the index of the right-hand side, among those of a linear system.
        space: that of b.

    Attributes:
        v, p: as above, one tensor per parameter.
        squares: squared norms of v, from j = 0 on, as far as they were read.
        best: the index of the smallest of them.
        reached: whether the last is within the tolerance.
        grew: whether the last is larger than the smallest, or not finite.
        curvature: a Rayleigh quotient of A in the growing direction, once there is one.
    """

    def __init__(
        self,
        start: Sequence[Tensor],
        step_size: float,
        tolerance: float = 0.0,
        row: int = 0,
        space: VectorSpace = LOCAL,
    ) -> None:
        self.start = start
        self.row = row
        self._space = space
        self.squares: list[float] = []
        self.best = 0
        self.reached = self.grew = False
        self.curvature: float | None = None
        self._step_size = step_size
        self._smallest_square = (step_size * tolerance) * (step_size * tolerance)
        self._begin()

    def _begin(self) -> None:
        self._steps = NeumannSteps(self.start, self._step_size)
        self.v, self.p = self._steps.v, self._steps.p

    def step(self, product: Sequence[Tensor]) -> None:
        self._steps.step(product)

    def should_continue(self, product: Sequence[Tensor]) -> bool:
        """Whether the series has neither reached its tolerance nor grown; `product` is that of the last step. Waits
        for the device."""
        self._read_pending()
        last, a = self.squares[-1], self._step_size
        self.reached = last <= self._smallest_square
        self.grew = not (self.reached or last <= GROWTH * self.squares[self.best] < math.inf)  # a NaN has grown too
        before = self.squares[-2]  # |w|^2, where |w - a A w|^2 = last
        if self.grew and math.isfinite(last) and before > 0:  # it may have underflowed
            of_product = float(self._space.read(self._space.sum(squared_norm(product))))
            self.curvature = curvature_between(before, last, of_product, a)
        return not (self.reached or self.grew)

    def _read_pending(self) -> None:
        if not self._steps.unread:
            return
        for square in self._read_squares():
            self.squares.append(square)
            if square < self.squares[self.best]:
                self.best = len(self.squares) - 1

    def _read_squares(self) -> list[float]:
        if self._space is LOCAL:
            return self._steps.read()
        squares: list[float] = self._space.read(self._space.sum(self._steps.squares())).tolist()
        return squares

    @property
    def norm(self) -> float:
        """`||b - A (p - v)||`, after the steps whose norms were read."""
        return math.sqrt(self.squares[-1]) / self._step_size

    def is_in_range(self) -> bool:
        """Whether neither b nor a b is 0, or so small or large that numbers may leave the range of their dtype."""
        self._read_pending()
        info = torch.finfo(self.p[0].dtype)
        norm = math.sqrt(self.squares[0])
        return info.tiny / info.eps < min(norm, norm / self._step_size) and max(norm, self.norm) < math.sqrt(info.max)

    def certified_residual(self, products: ListProducts) -> float | None:
        """`||b - H p|| / ||b||` after the steps, for one product. Where the norm has grown, the sum becomes the best
        one; for that only this product may have told of the last term. `None` if something is not finite."""
        if not math.isfinite(self.squares[-1]):
            return None
        if self.grew:
            self.rewind(products)
        if len(self.squares) == 1:
            return 1.0
        info, of_b = torch.finfo(self.p[0].dtype), math.sqrt(self.squares[0]) / self._step_size
        left = self._left(products)
        if not left <= GROWTH * max(self.norm, 10 * info.eps * of_b):
            if self.grew:
                return None
            self.grew = True
            torch._foreach_sub_(self.p, self.v)
            left = self._left(products)
        return left / of_b if left <= of_b else None

    def _left(self, products: ListProducts) -> float:
        """`||b - H p||`"""
        pairs = zip(self.start, products.product(self.p), strict=True)
        return math.sqrt(squared_norm([b - product for b, product in pairs]).item())

    def close(self, products: Products, limit: float) -> StopReason:
        """Says how the steps went, whose norms were not read, and makes `p` 0 where an entry may exceed the limit.

        Raises:
            ValueError: b is not finite.
        """
        self._read_pending()
        if not 0 < self.squares[0] < math.inf:
            largest = self._largest()
            if not math.isfinite(largest):
                raise ValueError(RHS_NOT_FINITE)
            if not largest:
                self._reset()
                return StopReason.TRIVIAL
        if not sum(map(math.sqrt, self.squares)) <= limit:
            self._reset()
            largest = self._largest()
            self.v = [tensor / largest for tensor in self.start]
            (product,) = products([self])
            finite = self._space.are_finite(as_row(product)).all()
            return StopReason.DIVERGED if finite else StopReason.NOT_FINITE
        return StopReason.STEPS if self.squares[-1] <= GROWTH * min(self.squares) else StopReason.DIVERGED

    def _largest(self) -> float:
        """The largest modulus of an entry of b."""
        return float(self._space.largest_entries(as_row(self.start))[0])

    def rewind(self, products: Products) -> None:
        """Makes `p` the solution of the smallest residual, by summing the series once more up to there: taking away
        what has grown would leave its rounding."""
        del self.squares[self.best + 1 :]
        self._begin()
        for _ in self.squares[2:]:  # the last term needs no product: what it leaves is known
            (product,) = products([self])
            self.step(product)
        if self.best == 0 or not all(map(math.isfinite, self._read_squares())):
            self._reset()

    def _reset(self) -> None:
        del self.squares[1:]
        self.p = [torch.zeros_like(tensor) for tensor in self.start]

    def finish(self) -> None:
        """Makes the solution 0 where the sum may have overflowed."""
        if not sum(map(math.sqrt, self.squares)) <= torch.finfo(self.p[0].dtype).max:
            self.grew = True
            self._reset()


def curvature_between(before: float, last: float, of_product: float, step_size: float) -> float:
    """The Rayleigh quotient of A for the vector w, of squared norm `before`, that a step has made `w - a A w`, of
    squared norm `last`; of_product: that of `A w`."""
    slope = (before - last) / (2 * step_size) + step_size / 2 * of_product  # w . A w
    return slope / before


def run(series: Sequence[Series], products: Products, steps: int) -> int:
    """Steps all series until each has reached its tolerance or grown, at most `steps` times. Returns how often."""
    every = steps_per_check(series[0].v[0].device)
    active = series
    for step in range(1, steps + 1):
        taken = products(active)
        for s, product in zip(active, taken, strict=True):
            s.step(product)
        if step % every == 0 or step == steps:
            active = [s for s, product in zip(active, taken, strict=True) if s.should_continue(product)]
        if not active:
            break
    return step
