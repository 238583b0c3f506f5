"""The curvature of a loss whose data are spread over ranks: the sum of those of their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.engine import spread
from auxfast.implicit.batch_curvature import FreshCurvature, MeanCurvature
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.losses import times
from auxfast.implicit.ranks import Ranks, Replicated
from auxfast.solvers.space import VectorSpace


class SummedCurvature:
    """`sum_r share_r H_r` over ranks r, each product by one all-reduce.

    Args:
        part: H_r, the curvature of this rank's part; `None` for a rank without data.
        share: what it is multiplied by.
        params: tensors that the loss is differentiated in, the same on all ranks.
        ranks: those that take part.

    Attributes:
        whole_params: those in the system.
        unproven: see `Hessian`; of this rank's part, and not empty where another has any.
        kinked: see `Hessian`; of the parts of all ranks, as far as they are in `params`.
        has_slope: whether all parts have a recorded gradient.
        exact, space: see `LinearOperator`.
    """

    def __init__(
        self,
        part: Hessian | MeanCurvature | FreshCurvature | None,
        share: float,
        params: Sequence[Tensor],
        ranks: Ranks,
    ) -> None:
        self._part, self._share, self._ranks = part, share, ranks
        count = len(params)
        inside = [False] * count if part is None else part.in_system
        kinks = {id(tensor) for tensor in getattr(part, "kinked", [])}
        unproven: list[str] = getattr(part, "unproven", [])
        flags = [
            *inside,
            *(id(w) in kinks for w in params),
            bool(unproven),
            not (part is None or getattr(part, "exact", False)),
            not (part is None or isinstance(part, Hessian)),
        ]
        *found, some_unproven, some_inexact, some_anew = ranks.any(flags)
        self.in_system = found[:count]
        self.whole_params = list(compress(params, self.in_system))
        self.params = self.whole_params
        self._inside = list(compress(inside, self.in_system))
        self.unproven = unproven or (["a Function on another rank"] if some_unproven else [])
        self.kinked = list(compress(params, found[count:]))
        self.has_slope = not some_anew
        self.exact = not some_inexact
        self.space: VectorSpace = Replicated(ranks)

    def slope(self, vectors: Sequence[Tensor]) -> Tensor:
        """`<v, d inner / d params>`, where `has_slope`."""
        part, own = self._part, 0.0
        if isinstance(part, Hessian) and part.params:
            own = self._share * float(part.slope(self._chosen(self.join(vectors))))
        return vectors[0].new_tensor(self._ranks.totals([own])[0])

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._product(vectors, lambda part, chosen: part(chosen))

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._product(vectors, lambda part, chosen: part.batched(chosen))

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        """This rank's term of the mixed product, for the caller to sum."""
        whole = self.join(vectors)

        def compute() -> list[Tensor | None]:
            assert self._part is not None
            return times(self._share, self._part.mixed(self._chosen(whole), outer_params))

        nothing: list[Tensor | None] = [None] * len(outer_params)
        return nothing if self._part is None else self._ranks.attempt(compute, nothing)

    def with_mixed(
        self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """`H v`, and this rank's term of the mixed product."""
        mixed: list[Tensor | None] = [None] * len(outer_params)

        def product(part: Any, chosen: Sequence[Tensor]) -> list[Tensor]:
            found, terms = part.with_mixed(chosen, outer_params)
            mixed[:] = times(self._share, terms)
            products: list[Tensor] = found
            return products

        return self._product(vectors, product), mixed

    @torch.no_grad()
    def _product(self, vectors: Sequence[Tensor], product: Callable[..., list[Tensor]]) -> list[Tensor]:
        whole = self.join(vectors)
        part, terms = self._part, list[Tensor | None]([None] * len(vectors))
        if part is not None:
            own = self._ranks.attempt(lambda: product(part, self._chosen(whole)), None)
            terms = terms if own is None else list(spread(times(self._share, own), self._inside))
        return self._sum(terms, vectors)

    def join(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The vectors as the curvature of this rank's part takes them."""
        return vectors

    def _sum(self, terms: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks, of the shapes of `like`, as the solver takes them."""
        return self._ranks.sum(terms, like)

    def _chosen(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Those of the parameters that this rank's part depends on."""
        return list(compress(vectors, self._inside))
