"""Where the gradients of a `GraphPass` come together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Edge = tuple[int | None, int]
"""To a node, by its number in the graph, at one of its inputs."""


class Sum:
    """What has come in so far along an edge.

    Args:
        nodes: those of the graph at hand.
        is_input: this is one of the pass's results, and stays when it is taken on.
    """

    _FIRST_AXIS = 0  # of the tensor that one gradient is
    gradient: Tensor | None = None
    ours = False
    """Nobody else sees the gradient's memory: it may be written to."""
    shape: torch.Size | None = None
    """For one gradient; read when needed."""
    _dtype: torch.dtype | None = None

    def __init__(self, nodes: Sequence[Any], edge: Edge, is_input: bool) -> None:
        self._nodes, self._is_input = nodes, is_input
        self._number: Any
        self._number, self._input = edge

    def take(self) -> Tensor | None:
        gradient = self.gradient
        if self._is_input:
            self.ours = False
        else:
            self.gradient = None  # so that the next sums find its memory, still in the caches
        return gradient

    def add(self, gradient: Tensor, new: bool) -> None:
        """As the engine does: summed over the axes that broadcasting had added or stretched, in the edge's dtype.
        `new`: nobody else sees the gradient's memory."""
        shape = self.measured()
        if self._shape_of(gradient) != shape:
            gradient, new = self.sum_to(gradient, shape), True
        if gradient.dtype != self._dtype:
            gradient, new = gradient.to(self._dtype), True
        self.add_fitting(gradient, new)

    def add_fitting(self, gradient: Tensor, new: bool) -> None:
        """Of the edge's shape and dtype already."""
        before = self.gradient
        if before is None:
            self.gradient, self.ours = gradient, new
        elif self.ours:
            before.add_(gradient)
        else:
            self.gradient, self.ours = gradient.add_(before) if new else gradient + before, True

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """`a @ b`, of the edge's shape and dtype."""
        before = self.gradient
        if before is None:
            self.gradient, self.ours = torch.mm(a, b), True
        elif self.ours:
            before.addmm_(a, b)
        else:
            self.gradient, self.ours = torch.addmm(before, a, b), True

    def measured(self) -> torch.Size:
        if self.shape is None:
            data = self._nodes[self._number]._input_metadata[self._input]
            self.shape, self._dtype = torch.Size(data.shape), data.dtype
        return self.shape

    def sum_to(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        first = self._FIRST_AXIS
        added = [*range(first, gradient.dim() - len(shape))]
        gradient = gradient.sum(added) if added else gradient
        return gradient if gradient.shape[first:] == shape else gradient.sum_to_size(*gradient.shape[:first], *shape)

    def transposed(self, gradient: Tensor) -> Tensor:
        return gradient.t()

    def _shape_of(self, gradient: Tensor) -> torch.Size:
        return gradient.shape


class BlockSum(Sum):
    """Of tensors whose first axis is that of several gradients. In a product one factor is a single matrix; there are
    no copies."""

    _FIRST_AXIS = 1

    def add_product(self, a: Tensor, b: Tensor) -> None:
        total = self.gradient if self.ours else None
        if a.dim() == 3 and a.is_contiguous() and (total is None or total.is_contiguous()):  # one large product
            k, n, m = a.shape
            if total is not None:
                total.view(k * n, b.shape[1]).addmm_(a.view(k * n, m), b)
            else:
                self.add_fitting(torch.mm(a.view(k * n, m), b).view(k, n, b.shape[1]), new=True)
            return
        a, b = (a.expand(b.shape[0], -1, -1), b) if a.dim() == 2 else (a, b.expand(a.shape[0], -1, -1))
        if total is not None:
            total.baddbmm_(a, b)
        else:
            self.add_fitting(torch.bmm(a, b), new=True)

    def transposed(self, gradient: Tensor) -> Tensor:
        return gradient.mT if gradient.dim() == 3 else gradient

    def _shape_of(self, gradient: Tensor) -> torch.Size:
        return gradient.shape[1:]


class Transposed:
    """The sum at the end of an edge to a node that only transposes, for gradients as they are at its beginning."""

    def __init__(self, of: Sum) -> None:
        self.of = of

    def add(self, gradient: Tensor, new: bool) -> None:
        shape = self.of.measured()[::-1]
        if self.of._shape_of(gradient) != shape:
            gradient, new = self.of.sum_to(gradient, shape), True
        self.of.add(self.of.transposed(gradient), new)

    def add_fitting(self, gradient: Tensor, new: bool) -> None:
        self.of.add_fitting(self.of.transposed(gradient), new)

    def add_product(self, a: Tensor, b: Tensor) -> None:
        self.of.add_product(b.mT, a.mT)


Target = Sum | Transposed
Targets = Mapping[int, Target]
