"""The operator of several problems at once: each right-hand side is multiplied by a matrix of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from auxfast.solvers.base import Matvec, batched_matvec, is_symmetric
from auxfast.solvers.space import LOCAL, VectorSpace


class BlockOperator:
    """The diagonal blocks of a block diagonal matrix H, one for each of `blocks` problems. One product with H is one
    with all of them.

    Args:
        matvec: H, for vectors whose tensors all have `blocks` entries along their first axis.
        blocks: the number of problems.

    Attributes:
        products: products with H or its transpose so far.
        symmetric, exact, space: see `LinearOperator`.
    """

    def __init__(self, matvec: Matvec, blocks: int) -> None:
        self._matvec, self._blocks = matvec, blocks
        self._count = [0]  # shared with the transpose
        self.symmetric = is_symmetric(matvec)
        self.exact = bool(getattr(matvec, "exact", False))
        self.space: VectorSpace = getattr(matvec, "space", LOCAL)

    @property
    def products(self) -> int:
        return self._count[0]

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """`H v` for the vector of one problem, where there is no other."""
        return [product[0] for product in self.batched([v[None] for v in vectors])]

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product of each vector with the block of its problem. All tensors have one more axis in front, of a
        multiple of `blocks` vectors: those of all problems in order, and so again."""
        count = len(vectors[0]) // self._blocks
        self._count[0] += count
        if count == 1:
            return [*self._matvec(vectors)]
        cut = [v.reshape(count, self._blocks, *v.shape[1:]) for v in vectors]
        return [p.reshape(v.shape) for p, v in zip(batched_matvec(self._matvec)(cut), vectors, strict=True)]

    @cached_property
    def transposed(self) -> BlockOperator | None:
        """The operator of the transposed blocks; None where there is none. Its products count with these."""
        transpose = getattr(self._matvec, "transposed", None)
        if transpose is None:
            return None
        operator = BlockOperator(transpose, self._blocks)
        operator._count = self._count
        return operator
