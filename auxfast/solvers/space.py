"""Where the vectors of a linear system live: in one process, or in several that solve it together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from auxfast.ops.krylov import row_dots

Floats = npt.NDArray[np.float64]


class VectorSpace:
    """Vectors of which this process has all entries. An operator may have another space as its attribute `space`, see
    `LinearOperator`: subclasses say what processes exchange.

    Attributes:
        is_whole: whether this process has all entries of each vector, and not a piece of it.
        piece: the number of the piece that it has.
    """

    is_whole = True
    piece = 0

    def sum(self, terms: Tensor) -> Tensor:
        """The sums over all pieces of the vectors, of the shape of `terms`, which are those of this piece. The same in
        all processes."""
        return terms

    def max(self, values: Tensor) -> Tensor:
        """The largest of the values over all pieces of the vectors, of the shape of `values`, which are those of this
        piece. The same in all processes. A NaN may become infinite."""
        return values

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """The dot products of the rows of `a` and `b`, both (k, n): see `row_dots`. The same in all processes."""
        return row_dots(a, b)

    def dots_of(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The dot products of the rows of m pairs, (m, k), by one sum; see `dots`."""
        return self.sum(torch.stack([row_dots(a, b) for a, b in pairs]))

    def read(self, numbers: Tensor) -> Floats:
        """Float64 numbers on the host, the same in all processes, for a solver to make its decisions from."""
        on_host: Floats = numbers.cpu().double().numpy()  # waits for the device
        return on_host

    def all(self, flag: bool) -> bool:
        """Whether the flag, of what this process has, is set in all processes."""
        return flag

    def largest_entries(self, rows: Tensor) -> Floats:
        """(k, n) -> (k,): the largest modulus of the entries of each row, on the host; not finite where one is not."""
        largest = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(len(rows))
        return self.read(self.max(largest))

    def are_finite(self, rows: Tensor) -> npt.NDArray[np.bool_]:
        """(k, n) -> (k,): whether all entries of each row are finite, on the host."""
        finite: npt.NDArray[np.bool_] = self.read(self.sum((~rows.isfinite()).sum(dim=1).double())) == 0
        return finite


LOCAL = VectorSpace()


def as_row(tensors: Sequence[Tensor]) -> Tensor:
    """All entries as a row (1, n), a copy."""
    return torch.cat([tensor.reshape(1, -1) for tensor in tensors], dim=1)


class NotSharded(NotImplementedError):
    """A solver or a preconditioner needs whole vectors, and has pieces."""


def refuse_pieces(space: VectorSpace, name: str, way_out: str) -> None:
    """Raises NotSharded where a process has but pieces of the vectors.

    Args:
        name: of what cannot work with them.
        way_out: what can.
    """
    if not space.is_whole:
        raise NotSharded(
            f"{name} needs whole vectors, and parameters of fully_shard have a piece on each rank: {way_out}"
        )
