"""The interface of static solves: the same operations whatever the numbers are, so that a device can replay them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from auxfast.solvers.base import Matvec, SolveStats
from auxfast.solvers.linear_system import check_product
from auxfast.solvers.space import Floats, as_row


class StaticSolve(ABC):
    """A solve of `(H + damping I) x = b` in which nothing depends on a number that the host has read: `begin`, then as
    many of the `chunks` as are to be run, then `end`. What is recorded of the three (as CUDA graphs) may be replayed in
    that order, a chunk of one length as often as is wanted.

    Where eager solvers decide, a static one freezes what it has, or chooses by `torch.where`.

    Attributes:
        chunks: the steps of each chunk.
    """

    chunks: tuple[int, ...]

    @abstractmethod
    def begin(self, matvec: Matvec, rhs: Sequence[Tensor]) -> None:
        """Takes the right-hand side, of one floating dtype on one device, which stays as it is."""

    @abstractmethod
    def steps(self, count: int) -> None:
        """Takes so many steps, one product each."""

    @abstractmethod
    def status(self) -> Tensor:
        """(1,), 0 as long as a further step may change something."""

    @abstractmethod
    def end(self) -> tuple[list[Tensor], Tensor]:
        """The solution, like the right-hand side, and float64 numbers on the device, from which `stats` tells how the
        solve went. All of the solution is NaN where nothing could be solved: the right-hand side or the first product
        is not finite."""

    @abstractmethod
    def stats(self, numbers: Floats, steps: int) -> SolveStats:
        """How the solve went that `end` returned these `numbers` of, after so many steps.

        `stop_reason` is NOT_FINITE where the right-hand side or the first product is not.
        """

    @abstractmethod
    def largest_of_rhs(self, numbers: Floats) -> float:
        """The largest modulus of an entry of the right-hand side."""

    @abstractmethod
    def has_no_curvature(self, numbers: Floats) -> bool:
        """Whether the product with the right-hand side was 0, as far as the numbers tell."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets what the next solve would start from, if there is anything."""


class StaticSystem:
    """`(H + damping I) x = b` as a static solve works on it: in float32 for parameters of a narrower dtype, and in the
    scale of a power of two in which the largest entry of b is 1 to 2, so that no square leaves the range of its dtype.
    Vectors are lists of tensors like the right-hand side, or rows (1, n) of all their entries.

    Attributes:
        dtype: that of the right-hand side.
        is_narrow: whether a solve works in a wider one.
        largest: the largest modulus of an entry of the right-hand side, 0-dim float64.
        scale: the power of two, 0-dim.
        b: the right-hand side, divided by it.
    """

    def __init__(self, matvec: Matvec, rhs: Sequence[Tensor], damping: float) -> None:
        self._matvec, self._damping = matvec, damping
        self._shapes = [b.shape for b in rhs]
        self._sizes = [b.numel() for b in rhs]
        self.dtype = rhs[0].dtype
        self._work = torch.promote_types(self.dtype, torch.float32)
        self.is_narrow = self._work != self.dtype
        given = self._widened(rhs)
        self.largest = largest_entry(given)
        self.scale = _power_of_two(self.largest).to(self._work)
        self.b = [*torch._foreach_div(given, self.scale)]

    def _widened(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors without a graph, in the dtype that a solve works in."""
        return [tensor.detach().to(self._work) for tensor in tensors]

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product, which may share memory with the vectors."""
        given = [v.to(self.dtype) for v in vectors]
        found = self._matvec(given)
        check_product(found, given)
        found = self._widened(found)
        return [*torch._foreach_add(found, list(vectors), alpha=self._damping)] if self._damping else found

    def of_row(self, row: Tensor) -> Tensor:
        """The product (1, n) with a row, a copy."""
        return as_row(self.product(self._cut(row)))

    def _cut(self, row: Tensor) -> list[Tensor]:
        """Views of a row (1, n), like the right-hand side but for their dtype."""
        pieces = row[0].split_with_sizes(self._sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def rounded(self, row: Tensor) -> Tensor:
        """The row as `solution` rounds it: what is certified is what is returned."""
        return (row * self.scale).to(self.dtype).to(row.dtype) / self.scale if self.is_narrow else row

    def solution(self, row: Tensor, failed: Tensor) -> list[Tensor]:
        """The solution like the right-hand side, without the scale; NaN where the solve has `failed`, a flag."""
        return self._cut((row * torch.where(failed, torch.nan, self.scale)).to(self.dtype))


def largest_entry(tensors: Sequence[Tensor]) -> Tensor:
    """The largest modulus of an entry, 0-dim float64, 0 where there are none; NaN if one is. Waits for no device."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return tensors[0].new_zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(filled, torch.inf, dtype=torch.float64)).amax()


def _power_of_two(largest: Tensor) -> Tensor:
    """The power of two, 0-dim, by which a vector of this largest entry is divided to have one of 1 to 2; 1 for what is
    0 or not finite."""
    power = largest / (2 * torch.frexp(largest).mantissa)  # exact
    return torch.where((largest > 0) & largest.isfinite(), power, 1.0)
