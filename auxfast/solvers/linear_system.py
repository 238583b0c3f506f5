"""The linear system that solvers work on, with its right-hand sides as the rows of one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from auxfast.solvers.base import RHS_NOT_FINITE, Matvec, batched_matvec, is_symmetric
from auxfast.solvers.block_operator import BlockOperator
from auxfast.solvers.space import LOCAL, Floats, VectorSpace

MAX_BATCH = 32
"""Vectors in one batched product. More are hardly faster, and each holds all activations once more."""

_Call = tuple[Matvec, list[Tensor], int]  # function, operand, and number of vectors in it


class LinearSystem:
    """`(H + damping I) x = b` for k right-hand sides b, the rows of a matrix (k, n), and products with the operator.

    Flat rows make one operation of what would be one per parameter, for every solver but Neumann. They are float32 for
    parameters of a narrower dtype: the products then have the rounding of that dtype, and nothing else has.

    Right-hand sides of a norm at which squares or products would soon underflow or overflow are scaled by powers of
    two, and solutions back: all rows here are in that scale.

    Attributes:
        rhs: (k, n), a copy of the right-hand sides.
        rhs_norms: (k,), on the host.
        dtype: that of the parameters.
        shapes: those of the parameters.
        damping: as given.
        symmetric: whether H does not say that it is not.
        has_own_matrices: whether each row has a matrix of its own, the operator being a `BlockOperator`.
        exact: whether the operator says that its products are; see `LinearOperator`.
        space: where the rows live: in it dot products are formed, and read the numbers that decide.
        matvecs: vectors multiplied so far.
        params: the parameters themselves, where the operator knows them (`matvec.params`, as a curvature does); else
            None.

    Raises:
        ValueError: `rhs` is empty, not finite, or (batched) of different numbers of right-hand sides.
    """

    def __init__(
        self, matvec: Matvec, rhs: Sequence[Tensor], damping: float, batched: bool, name: str = "matvec"
    ) -> None:
        check_rhs(rhs, batched)
        self._matvec = matvec
        self._name = name  # of the argument, for errors
        self.params: Sequence[Tensor] | None = getattr(matvec, "params", None)
        self._batched = batched
        self.dtype = rhs[0].dtype
        self.shapes = [tensor.shape[1:] if batched else tensor.shape for tensor in rhs]
        self._sizes = [shape.numel() for shape in self.shapes]
        self.damping = damping
        self.symmetric = is_symmetric(matvec)
        self.has_own_matrices = isinstance(matvec, BlockOperator)
        self.exact = bool(getattr(matvec, "exact", False))
        self.space: VectorSpace = getattr(matvec, "space", LOCAL)
        self.matvecs = 0
        self._last: tuple[Tensor, list[_Call]] | None = None  # rows of the last product, and its calls
        self._scale: Tensor | None = None  # (k, 1), powers of two
        self.rhs = self.flatten(rhs)
        self.rhs_norms = self._norms()
        limit = torch.finfo(self.dtype).max ** 0.25
        if not all(1 / limit < norm < limit for norm in self.rhs_norms.tolist()):
            largest = torch.from_numpy(self.space.largest_entries(self.rhs))[:, None].to(self.rhs)
            if not bool(largest.isfinite().all()):
                raise ValueError(RHS_NOT_FINITE)
            power = largest / (2 * torch.frexp(largest).mantissa)  # exact
            self._scale = torch.where(largest > 0, power, 1)
            self.rhs /= self._scale
            self.rhs_norms = self._norms()

    def _norms(self) -> Floats:
        norms: Floats = np.sqrt(self.space.read(self.space.dots(self.rhs, self.rhs)))
        return norms

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows (k, n) of tensors like `rhs`, a copy without a graph."""
        rows = len(tensors[0]) if self._batched else 1
        flat = torch.cat([tensor.detach().reshape(rows, -1) for tensor in tensors], dim=1)
        flat = flat.to(torch.promote_types(self.dtype, torch.float32))
        return flat if self._scale is None else flat / self._scale

    def unflatten(self, rows: Tensor) -> list[Tensor]:
        """The tensors like `rhs` of rows (k, n), views where they can be."""
        rows = rows if self._scale is None else rows * self._scale
        return self._cut(rows if self._batched else rows[0], self._batched)

    def rounded(self, rows: Tensor, index: Tensor | None) -> Tensor:
        """The rows (m, n), for the right-hand sides in `index` (m,) or for all in order, as `unflatten` rounds them:
        what is certified is what is returned."""
        if self._scale is None:
            return rows.to(self.dtype).to(rows.dtype)
        scale = self._scale if index is None else self._scale.index_select(0, index)
        return (rows * scale).to(self.dtype).to(rows.dtype) / scale

    def limits(self) -> list[float]:
        """The largest entry that the solution to each row may have, not to overflow the dtype of the parameters or that
        of the rows."""
        largest = torch.full((len(self.rhs), 1), torch.finfo(self.dtype).max, dtype=torch.float64)
        limits = largest if self._scale is None else largest / self._scale.cpu()
        return limits[:, 0].clamp(max=torch.finfo(self.rhs.dtype).max).tolist()

    def _cut(self, rows: Tensor, batched: bool) -> list[Tensor]:
        lead = rows.shape[:1] if batched else torch.Size()
        pieces = rows.to(self.dtype).split_with_sizes(self._sizes, dim=-1)
        return [piece.reshape(lead + shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def product(self, rows: Tensor, index: Tensor | None = None) -> Tensor:
        """Rows (m, n) times `H + damping I`, for any m.

        Args:
            index: (m,), the right-hand side that each of the rows belongs to; `None`: any, or all in order. Where rows
                have matrices of their own, each right-hand side may come once.
        """
        if self.has_own_matrices and index is not None:
            every = torch.zeros_like(self.rhs).index_copy_(0, index, rows)
            return self.product(every).index_select(0, index)
        self.matvecs += rows.shape[0]
        calls = self._calls(rows)
        if len(calls) == 1:
            ((matvec, operand, count),) = calls
            result = self._join(matvec(operand), operand, count)
        else:
            result = torch.cat([*(self._join(call(part), part, count) for call, part, count in calls), rows[:0]])
        return result.add_(rows, alpha=self.damping) if self.damping else result

    def _calls(self, rows: Tensor) -> list[_Call]:
        """The calls that multiply `rows`. They hold views of them, so that a solver that goes on to write to the same
        rows needs no others."""
        if self._last is None or self._last[0] is not rows or rows.dtype != self.dtype:
            calls: list[_Call] = []
            most = len(rows) if self.has_own_matrices else MAX_BATCH
            for part in rows.split(most) if len(rows) > most else (rows,):
                if len(part) > 1 or self.has_own_matrices:
                    calls.append((self._batched_matvec, self._cut(part, True), len(part)))
                elif len(part):
                    calls.append((self._matvec, self._cut(part[0], False), 1))
            self._last = rows, calls
        return self._last[1]

    @cached_property
    def size(self) -> int:
        """The number of unknowns: n, and where processes have pieces of the rows, the sum over all of them."""
        if self.space.is_whole:
            return self.rhs.shape[1]
        own = self.rhs.new_tensor(self.rhs.shape[1], dtype=torch.float64)
        return int(self.space.read(self.space.sum(own)))

    @cached_property
    def transposed(self) -> LinearSystem:
        """The system with the transpose of H in its place; this one itself, if H is symmetric.

        Raises:
            TypeError: the operator is not symmetric and has no products with its transpose.
        """
        if self.symmetric:
            return self
        transpose = getattr(self._matvec, "transposed", None)
        if transpose is None:
            raise TypeError(
                "matvec must have products with its transpose, as matvec.transposed(vectors), where it is not "
                "symmetric; or take GMRES(), which needs none"
            )
        other = copy(self)
        other.__dict__.pop("_batched_matvec", None)
        other._matvec, other._last, other.matvecs = transpose, None, 0
        return other

    @cached_property
    def _batched_matvec(self) -> Matvec:
        return batched_matvec(self._matvec)

    def _join(self, products: Sequence[Tensor], operand: Sequence[Tensor], count: int) -> Tensor:
        check_product(products, operand, self._name)
        joined = torch.cat([product.reshape(count, -1) for product in products], dim=1)  # a copy, even of one tensor
        joined = joined.detach() if joined.requires_grad else joined
        return joined if joined.dtype == self.rhs.dtype else joined.to(self.rhs.dtype)


def check_product(product: Sequence[Tensor], operand: Sequence[Tensor], name: str = "matvec") -> None:
    """Raises RuntimeError where a product has other shapes or dtypes than its operand."""
    if len(product) != len(operand):
        raise RuntimeError(f"{name} returned {len(product)} tensors for {len(operand)} parameters")
    for i, (returned, like) in enumerate(zip(product, operand, strict=True)):
        if returned.shape != like.shape or returned.dtype != like.dtype:
            given, wanted = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (returned, like))
            raise RuntimeError(f"{name} returned {given} for tensor {i}, not {wanted}")


def check_rhs(rhs: Tensor | Sequence[Tensor], batched: bool = False) -> None:
    if isinstance(rhs, Tensor):
        raise TypeError("rhs must be a list of tensors, like parameters, and not a tensor: pass [rhs]")
    if not rhs:
        raise ValueError("rhs is empty: a solver needs at least one tensor")
    dtype, device = rhs[0].dtype, rhs[0].device
    if not dtype.is_floating_point or any(tensor.dtype != dtype or tensor.device != device for tensor in rhs):
        kinds = ", ".join(sorted({f"{tensor.dtype} on {tensor.device}" for tensor in rhs}))
        raise ValueError(f"rhs must be tensors of one floating dtype on one device, got {kinds}")
    if not batched:
        return
    counts = {len(tensor) if tensor.dim() else 0 for tensor in rhs}
    if len(counts) > 1 or 0 in counts:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in rhs)
        raise ValueError(f"rhs must have one axis of right-hand sides in front of each tensor, got shapes {shapes}")
