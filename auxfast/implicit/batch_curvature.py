"""Curvatures of losses that are computed anew for every product: the mean of micro-batches, and fresh batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.engine import spread, zeros_for_none
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.forward_over_reverse import ForwardOverReverse
from auxfast.implicit.losses import add, times
from auxfast.solvers import Neumann
from auxfast.solvers.base import Solver

Record = Callable[[Sequence[Tensor]], Hessian | ForwardOverReverse]
"""Records the curvature of a batch in the parameters that it is given."""


class MeanCurvature:
    """Mean of the curvatures of micro-batches, each recorded anew for every product, in the memory of one.

    Args:
        records: one for each micro-batch.
        shares: the part of each in the mean.
        params: tensors that the loss is differentiated in.

    Attributes:
        unproven, kinked: see `Hessian`.
    """

    def __init__(self, records: Sequence[Record], shares: Sequence[float], params: Sequence[Tensor]) -> None:
        self._records = records
        self._shares = shares
        self.unproven: list[str] = []
        self.kinked: list[Tensor] = []
        in_system = [self._inspect(record(params)) for record in records]
        self.in_system = [any(which) for which in zip(*in_system, strict=True)]
        self.params = list(compress(params, self.in_system))

    def _inspect(self, curvature: Hessian | ForwardOverReverse) -> list[bool]:
        self.unproven += [name for name in curvature.unproven if name not in self.unproven]
        self.kinked += curvature.kinked
        return curvature.in_system

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._products(vectors, lambda curvature, chosen: curvature(chosen))

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._products(vectors, lambda curvature, chosen: curvature.batched(chosen))

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        total: list[Tensor | None] = [None] * len(outer_params)
        for record, share in zip(self._records, self._shares, strict=True):
            terms = self._of_one(record, vectors, lambda c, chosen: c.mixed(chosen, outer_params))[1]
            total = add(total, times(share, terms))
        return total

    def with_mixed(
        self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        product = [torch.zeros_like(v) for v in vectors]
        mixed: list[Tensor | None] = [None] * len(outer_params)
        for record, share in zip(self._records, self._shares, strict=True):
            in_system, (terms, more) = self._of_one(record, vectors, lambda c, v: c.with_mixed(v, outer_params))
            torch._foreach_add_(list(compress(product, in_system)), terms, alpha=share)
            mixed = add(mixed, times(share, more))
        return product, mixed

    def _products(self, vectors: Sequence[Tensor], product: Callable[..., list[Tensor]]) -> list[Tensor]:
        total = [torch.zeros_like(v) for v in vectors]
        for record, share in zip(self._records, self._shares, strict=True):
            in_system, terms = self._of_one(record, vectors, product)
            torch._foreach_add_(list(compress(total, in_system)), terms, alpha=share)
        return total

    def _of_one(self, record: Record, vectors: Sequence[Tensor], product: Callable[..., Any]) -> tuple[list[bool], Any]:
        """Product with the curvature of one micro-batch. This is a function of its own so that its graph is gone before
        the next is made."""
        curvature = record(self.params)
        return curvature.in_system, product(curvature, list(compress(vectors, curvature.in_system)))


class FreshCurvature:
    """Curvatures of fresh batches, another one for every product, for solvers that want each only right on average.

    All parameters are in the system, since one batch does not tell which of them the others use.

    Args:
        record: records the curvature of the next batch.
        params: tensors that the loss is differentiated in.
    """

    def __init__(self, record: Record, params: Sequence[Tensor]) -> None:
        self._record = record
        self.params = list(params)
        self.in_system = [True] * len(self.params)

    @staticmethod
    def check(solver: Solver) -> None:
        """Raises ValueError where `solver` needs the same matrix in every product."""
        if not isinstance(solver, Neumann) or solver.certify:
            raise ValueError(
                "inner_loss of FreshBatches goes with Neumann(certify=False) alone, whose terms may each have a batch "
                f"of its own; {solver!r} needs the same matrix in every product: pass MicroBatches, or a function of "
                "one batch"
            )

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._of_next(vectors, lambda curvature, chosen: curvature(chosen))

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._of_next(vectors, lambda curvature, chosen: curvature.batched(chosen))

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        curvature = self._record(self.params)
        return curvature.mixed(list(compress(vectors, curvature.in_system)), outer_params)

    def _of_next(self, vectors: Sequence[Tensor], product: Callable[..., list[Tensor]]) -> list[Tensor]:
        curvature = self._record(self.params)
        terms = product(curvature, list(compress(vectors, curvature.in_system)))
        return zeros_for_none(spread(terms, curvature.in_system), vectors)
