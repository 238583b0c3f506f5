"""The curvature of a loss whose data are spread over ranks: the sum of those of their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

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
        part: as given.
        whole_params: those in the system.
        unproven, kinked: see `Hessian`; of this rank's part, and the first also says whether another has any.
        exact, space: see `LinearOperator`.
    """

    def __init__(
        self,
        part: Hessian | MeanCurvature | FreshCurvature | None,
        share: float,
        params: Sequence[Tensor],
        ranks: Ranks,
    ) -> None:
        self.part = part
        self._share, self._ranks = share, ranks
        inside = [False] * len(params) if part is None else part.in_system
        unproven: list[str] = getattr(part, "unproven", [])
        inexact = part is not None and not getattr(part, "exact", False)
        *self.in_system, some_unproven, some_inexact = ranks.any([*inside, bool(unproven), inexact])
        self.whole_params = list(compress(params, self.in_system))
        self.params = self.whole_params
        self._inside = list(compress(inside, self.in_system))
        self.unproven = unproven or (["a Function on another rank"] if some_unproven else [])
        self.kinked: list[Tensor] = getattr(part, "kinked", [])
        self.exact = not some_inexact
        self.space: VectorSpace = Replicated(ranks)

    @property
    def gradient(self) -> list[Tensor | None]:
        """That of the whole loss in each of `params`; `None` where it does not depend on it. The part is a Hessian."""
        assert not isinstance(self.part, (MeanCurvature, FreshCurvature))
        inside = [] if self.part is None else [grad for grad in self.part.gradient if grad is not None]
        return list(self._ranks.sum(self._spread(times(self._share, inside)), self.whole_params))

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._product(vectors, lambda part, chosen: part(chosen))

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._product(vectors, lambda part, chosen: part.batched(chosen))

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        """This rank's term of the mixed product, for the caller to sum."""
        whole = self.join(vectors)
        if self.part is None:
            return [None] * len(outer_params)
        return times(self._share, self.part.mixed(list(compress(whole, self._inside)), outer_params))

    def with_mixed(
        self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """`H v`, and this rank's term of the mixed product."""
        whole = self.join(vectors)
        if self.part is None:
            return self._sum([None] * len(vectors), vectors), [None] * len(outer_params)
        assert not isinstance(self.part, FreshCurvature)
        product, mixed = self.part.with_mixed(list(compress(whole, self._inside)), outer_params)
        return self._sum(self._spread(times(self._share, product)), vectors), times(self._share, mixed)

    @torch.no_grad()
    def _product(self, vectors: Sequence[Tensor], product: Callable[..., list[Tensor]]) -> list[Tensor]:
        whole = self.join(vectors)
        terms = [] if self.part is None else product(self.part, list(compress(whole, self._inside)))
        return self._sum(self._spread(times(self._share, terms)), vectors)

    def join(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The vectors as the curvature of this rank's part takes them."""
        return vectors

    def _sum(self, terms: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks, of the shapes of `like`, as the solver takes them."""
        return self._ranks.sum(terms, like)

    def _spread(self, terms: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return spread(terms, self._inside)
