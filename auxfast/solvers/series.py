"""Neumann series side by side: the fused steps, when they stop, and the way back from growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from auxfast.ops.neumann import neumann_step_, squared_norm
from auxfast.solvers.base import Block, Matvec

_GROWTH = 1.002  # of a squared norm: beyond rounding


def steps_per_look(device: torch.device) -> int:
    """How often a norm is read: on a GPU that waits for all that was launched."""
    return 1 if device.type == "cpu" else 8


class Products(Protocol):
    """`A v` of several series at once, `A = H + damping I`."""

    @property
    def matvecs(self) -> int:
        """How many, so far."""
        ...

    def __call__(self, series: Sequence[Series]) -> Sequence[Sequence[Tensor]]: ...


class ListProducts:
    """For one series on the tensors of the right-hand side as they are, without copies; no damping."""

    def __init__(self, matvec: Matvec) -> None:
        self.matvecs = 0
        self._matvec = matvec

    def __call__(self, series: Sequence[Series]) -> list[Sequence[Tensor]]:
        self.matvecs += len(series)
        return [self._matvec(s.v) for s in series]


class RowProducts:
    """For series on rows of a block."""

    def __init__(self, block: Block) -> None:
        self._block = block

    @property
    def matvecs(self) -> int:
        return self._block.matvecs

    def __call__(self, series: Sequence[Series]) -> list[list[Tensor]]:
        return [[row] for row in self._block.product(torch.stack([s.v[0] for s in series]))]


class Series:
    """The series from one right-hand side: after j steps `v = (I - a A)^j start`, and `p` is the sum of all v so far.

    `v` is the residual of `a (p - v)`. Once its norm grows it does so for ever, for the squares are the moments of
    `(I - a A)^2` and hence log-convex: the smallest is the last before.
    """

    def __init__(self, start: Sequence[Tensor]) -> None:
        self.start = start
        self.squares: list[float] = []  # of the norm of v, from j = 0 on
        self.best = 0  # the index of the smallest
        self.reached = self.grew = False
        self.curvature: float | None = None  # a Rayleigh quotient of A in the growing direction
        self._begin()

    def _begin(self) -> None:
        self.v, self.p = ([torch.zeros_like(tensor) for tensor in self.start] for _ in range(2))
        self._unread = [neumann_step_(self.v, self.start, self.p, -1.0)]  # from zeros: v = p = start, in one pass

    def step(self, product: Sequence[Tensor], step_size: float) -> None:
        self._unread.append(neumann_step_(self.v, product, self.p, step_size))

    def look(self, product: Sequence[Tensor], step_size: float, goal: float) -> bool:
        """Whether to go on; `product` is that of the last step, `goal` a squared norm. Waits for the device."""
        self._read()
        last = self.squares[-1]
        self.reached = last <= goal
        self.grew = not (self.reached or last <= _GROWTH * self.squares[self.best])  # so is NaN
        if self.grew and math.isfinite(last):
            before = self.squares[-2]  # of w, with |w - a A w|^2 = last
            slope = (before - last) / (2 * step_size) + step_size / 2 * squared_norm(product).item()  # w . A w
            self.curvature = slope / before
        return not (self.reached or self.grew)

    def _read(self) -> None:
        few = len(self._unread) < 3
        squares = [square.item() for square in self._unread] if few else torch.stack(self._unread).tolist()
        self._unread = []
        for square in squares:
            self.squares.append(square)
            if square < self.squares[self.best]:
                self.best = len(self.squares) - 1

    def rewind(self, products: Products, step_size: float) -> None:
        """Makes `step_size * p` the solution of the smallest residual, by summing the series once more up to there:
        taking away what has grown would leave its rounding."""
        del self.squares[self.best + 1 :]
        self._begin()
        for _ in self.squares[2:]:  # the residual that the last term leaves is known
            (product,) = products([self])
            with torch.no_grad():
                self.step(product, step_size)
        if self.best == 0 or not bool(torch.stack(self._unread).isfinite().all()):
            self._reset()

    def _reset(self) -> None:
        del self.squares[1:]
        self.p = [torch.zeros_like(tensor) for tensor in self.start]

    def finish(self, step_size: float) -> None:
        """Multiplies `p` by `step_size`, if the result is surely finite."""
        largest = torch.finfo(self.p[0].dtype).max
        if step_size <= largest and step_size * sum(map(math.sqrt, self.squares)) <= largest:
            torch._foreach_mul_(self.p, step_size)
        else:
            self.grew = True
            self._reset()


def run(series: Sequence[Series], products: Products, step_size: float, steps: int, goals: Sequence[float]) -> int:
    """Steps all of them until each has reached its goal, a squared norm, or grown; at most `steps` times. Returns how
    often."""
    every = steps_per_look(series[0].v[0].device)
    active = list(zip(series, goals, strict=True))
    for step in range(1, steps + 1):
        taken = products([s for s, _ in active])
        with torch.no_grad():
            for (s, _), product in zip(active, taken, strict=True):
                s.step(product, step_size)
            if step % every == 0 or step == steps:
                looks = [s.look(product, step_size, goal) for (s, goal), product in zip(active, taken, strict=True)]
                active = [one for one, goes_on in zip(active, looks, strict=True) if goes_on]
        if not active:
            break
    return step
