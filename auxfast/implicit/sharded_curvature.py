"""The curvature of a loss in parameters of `fully_shard`, for vectors of which each rank has a piece."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from auxfast.implicit.batch_curvature import FreshCurvature, MeanCurvature
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.sharded_params import Shards
from auxfast.implicit.summed_curvature import SummedCurvature


class ShardedCurvature(SummedCurvature):
    """`sum_r share_r H_r` as `SummedCurvature` has it, with a reduce-scatter of each product in the place of an
    all-reduce, after an all-gather of the vector.

    Args:
        part, share: see `SummedCurvature`.
        params: whole tensors that the loss is differentiated in.
        shards: how they are cut.

    Attributes:
        params: the parameters in the system as they were given, DTensors.
        whole_params: these parameters, whole.
    """

    def __init__(
        self,
        part: Hessian | MeanCurvature | FreshCurvature | None,
        share: float,
        params: Sequence[Tensor],
        shards: Shards,
    ) -> None:
        super().__init__(part, share, params, shards.ranks)
        self._shards = shards.only(self.in_system)
        self.params = list(self._shards.params)
        self.space = self._shards.space

    def join(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        return self._shards.join(pieces)

    def _sum(self, terms: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        return self._shards.sum(terms, like)
