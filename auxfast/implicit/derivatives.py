"""The second derivatives of the inner loss, by the name of the curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from auxfast.implicit.batch_curvature import FreshCurvature, MeanCurvature, Record
from auxfast.implicit.curvature import GaussNewton, Hessian
from auxfast.implicit.finite_difference import FiniteDifference
from auxfast.implicit.losses import CheckedLoss, LossFn, LossGraph
from auxfast.implicit.sharded_curvature import ShardedCurvature
from auxfast.implicit.sharded_params import Shards
from auxfast.implicit.summed_curvature import SummedCurvature

CurvatureName = Literal["hessian", "gauss-newton", "finite-difference"]
LossDerivatives = Hessian | MeanCurvature | FreshCurvature | FiniteDifference | SummedCurvature
_RECORDED: dict[str, type[Hessian]] = {"hessian": Hessian, "gauss-newton": GaussNewton}


def check_curvature(curvature: str) -> None:
    """Raises ValueError where `curvature` is none that there is."""
    names = [*_RECORDED, "finite-difference"]
    if curvature not in names:
        raise ValueError(f"curvature must be one of {', '.join(names)}, not {curvature!r}")


def derivatives_of(
    curvature: str,
    inner: CheckedLoss,
    params: Sequence[Tensor],
    outer_params: Sequence[Tensor],
    retain_graph: bool,
    shards: Shards | None = None,
) -> LossDerivatives:
    """The second derivatives of the inner loss that `curvature` names.

    Args:
        retain_graph: whether to keep the graph of a loss that is a tensor.
        shards: how the parameters are cut, which are whole here; `None`: they are not.

    Raises:
        ValueError: finite differences of `FreshBatches`. RuntimeError: see `Hessian`.
    """
    is_fresh = not isinstance(inner, LossGraph) and any(loss_fn.is_fresh for loss_fn in inner)
    if curvature == "finite-difference" and not isinstance(inner, LossGraph):
        if is_fresh:
            raise ValueError(
                "curvature='finite-difference' compares gradients of the same loss: inner_loss must not be FreshBatches"
            )
        return FiniteDifference(inner, params, outer_params)
    share = 1.0
    part: Hessian | MeanCurvature | FreshCurvature | None = None
    if isinstance(inner, LossGraph):
        share, part = inner.share, _RECORDED[curvature](inner, params, retain_graph)
    elif is_fresh:
        share, part = inner[0].share, FreshCurvature(_recorder(_RECORDED[curvature], inner[0]), params)
    elif len(inner) == 1:
        share, part = inner[0].share, _RECORDED[curvature](inner[0](), params, retain_graph)
    elif inner:
        records = [_recorder(_RECORDED[curvature], loss_fn) for loss_fn in inner]
        part = MeanCurvature(records, [loss_fn.share for loss_fn in inner], params)
    if shards is not None:
        return ShardedCurvature(part, share, params, shards)
    if inner.ranks is not None:
        return SummedCurvature(part, share, params, inner.ranks)
    assert part is not None  # a loss of one process is not empty
    return part


def _recorder(kind: type[Hessian], loss_fn: LossFn) -> Record:
    return lambda params: kind(loss_fn(), params)
