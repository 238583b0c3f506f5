"""Central differences of gradients along a direction: what is moved, how far, and what the differences tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Grads = list[Tensor | None]


@dataclass(eq=False)
class Block:
    """Parameters that are moved together.

    Attributes:
        members: their indices.
        size: root mean square of the elements of the largest of them, or a guess where all are 0.
        is_zero: whether all are 0.
        numel: how many elements they have.
        distance: the most that a move may have in norm; infinite until `is_ready`.
        relative_distance: the same, with each parameter measured by its own size.
        rounding: norm of the change that rounding makes in the gradient.
        was_compared: whether the distance of the largest block was tried.
    """

    members: list[int]
    size: float
    is_zero: bool
    numel: int = 0
    distance: float = math.inf
    relative_distance: float = math.inf
    rounding: float = 0.0
    is_ready: bool = False
    was_compared: bool = False

    def select(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in self.members]


@dataclass(frozen=True)
class Direction:
    """The part of a vector in a block.

    Attributes:
        unit: that part at norm 1.
        norm: its norm.
        relative: norm of `unit` with each parameter measured by its own size.
    """

    block: Block
    unit: list[Tensor]
    norm: float
    relative: float

    def distance(self, step: float) -> float:
        """How far to move; until the block is ready, by about `step` times the size of each element."""
        if not self.block.is_ready:
            return step * math.sqrt(self.block.numel) / self.relative
        return min(self.block.distance, self.block.relative_distance / self.relative)


@dataclass(frozen=True)
class Difference:
    """Derivatives along a direction of norm 1, by a central difference.

    Attributes:
        block: the parameters that are moved.
        distance: by how much, in both directions.
        product: the derivative of the gradient in the parameters.
        mixed: the derivative of the gradient in the outer parameters.
        length: norm of the difference of the gradient in the parameters.
        second: norm of the second difference: the difference ahead without the one behind.
        outer_norm: norm of the gradient in the outer parameters.
    """

    block: Block
    distance: float
    product: Grads
    mixed: Grads
    length: float
    second: float
    outer_norm: float

    @property
    def bend(self) -> float:
        """The second difference, relative. For a smooth gradient it is of the order of the step; if it comes from kinks
        or rounding, of the relative error; infinite if not finite."""
        return quotient(self.second, self.length) if math.isfinite(self.second) else math.inf

    @property
    def rounding(self) -> float:
        """What rounding may make of `product`, relative to it; 0 where that is 0 or not finite."""
        return self.block.rounding / self.length if 0 < self.length < math.inf else 0.0

    def differs_from(self, other: Difference) -> float:
        """Distance of the products, relative to the other one."""
        return quotient(norm_of(minus(self.product, other.product)), norm_of(other.product))


@contextmanager
def moved_by(params: Sequence[Tensor], directions: Sequence[Tensor], step: float) -> Iterator[None]:
    """Moves `params` to `params + step * directions`, through `.data`, so that graphs that the user made before stay
    valid, and back."""
    data = [w.data for w in params]
    saved = [tensor.clone() for tensor in data]
    try:
        torch._foreach_add_(data, list(directions), alpha=step)
        yield
    finally:
        torch._foreach_copy_(data, saved)
        torch.clear_autocast_cache()  # of casts of what was moved, which the user's next forward pass would take


def minus(tensors: Grads, others: Grads) -> Grads:
    return [None if a is None or b is None else a - b for a, b in zip(tensors, others, strict=True)]


def quotient(part: float, whole: float) -> float:
    """`part / whole`, where 0 / 0 is 0."""
    return part and (part / whole if whole else math.inf)


def norm_of(tensors: Sequence[Tensor | None]) -> float:
    """Euclidean norm of all elements together; `None` has none."""
    return math.hypot(*norms_of([t for t in tensors if t is not None]))


@torch.no_grad()
def norms_of(tensors: Sequence[Tensor]) -> list[float]:
    """Euclidean norms, brought to one device to wait for all at once. Squares that may leave the range of their dtype
    are added in float64, which takes longer."""
    if not tensors:
        return []
    kinds = {(t.dtype, t.device) for t in tensors}

    def norms(dtype: torch.dtype | None) -> list[float]:
        found = torch._foreach_norm(list(tensors), 2, dtype)
        return torch.stack(found if len(kinds) == 1 else [norm.to(found[0]) for norm in found]).tolist()

    narrow = any(dtype.itemsize < 4 for dtype, _ in kinds)
    found = norms(torch.float64 if narrow else None)
    return found if all(1e-15 < norm < 1e15 for norm in found) else norms(torch.float64)
