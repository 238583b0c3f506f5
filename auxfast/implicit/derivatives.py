"""The second derivatives of the inner loss, by the name of the curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from auxfast.implicit.batch_curvature import FreshCurvature, MeanCurvature, Record
from auxfast.implicit.curvature import GaussNewton, Hessian
from auxfast.implicit.finite_difference import FiniteDifference
from auxfast.implicit.forward_over_reverse import ForwardOverReverse
from auxfast.implicit.losses import CheckedLoss, LossFn, LossGraph
from auxfast.implicit.sharded_curvature import ShardedCurvature
from auxfast.implicit.sharded_params import Shards
from auxfast.implicit.summed_curvature import SummedCurvature

CurvatureName = Literal["hessian", "gauss-newton", "hessian-jvp", "finite-difference"]
LossDerivatives = Hessian | MeanCurvature | FreshCurvature | FiniteDifference | SummedCurvature
_RECORDED: dict[str, type[Hessian]] = {"hessian": Hessian, "gauss-newton": GaussNewton}
COMPUTED_ANEW = ("hessian-jvp", "finite-difference")  # they need functions for inner_loss


def check_curvature(curvature: str) -> None:
    """Raises ValueError where `curvature` is none that there is."""
    names = [*_RECORDED, *COMPUTED_ANEW]
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
    if curvature == "finite-difference" and inner.kind != "tensor":
        if inner.kind == "fresh":
            raise ValueError(
                "curvature='finite-difference' compares gradients of the same loss: inner_loss must not be FreshBatches"
            )
        assert not isinstance(inner, LossGraph)
        return FiniteDifference(inner, params, outer_params)
    if inner.ranks is not None:
        part = inner.ranks.attempt(lambda: _recorded(curvature, inner, params, outer_params, retain_graph), None)
        share = 1.0 if isinstance(part, MeanCurvature) else _share(inner)
        if shards is not None:
            return ShardedCurvature(part, share, params, shards)
        return SummedCurvature(part, share, params, inner.ranks)
    part = _recorded(curvature, inner, params, outer_params, retain_graph)
    assert part is not None  # a loss of one process is not empty
    return part


def _recorded(
    curvature: str,
    inner: CheckedLoss,
    params: Sequence[Tensor],
    outer_params: Sequence[Tensor],
    retain_graph: bool,
) -> Hessian | MeanCurvature | FreshCurvature | None:
    """That of this process's part of the loss, `None` if it is empty: a mean with the share of each micro-batch, a
    single one without its share."""
    if isinstance(inner, LossGraph):
        return _RECORDED[curvature](inner, params, retain_graph)
    if not inner:
        return None
    if len(inner) == 1 and inner.kind != "fresh" and curvature in _RECORDED:
        return _RECORDED[curvature](inner[0](), params, retain_graph)
    is_fresh = inner.kind == "fresh"
    records = [_recorder(curvature, loss_fn, params, outer_params, is_fresh) for loss_fn in inner]
    if is_fresh:
        return FreshCurvature(records[0], params)
    return MeanCurvature(records, [loss_fn.share for loss_fn in inner], params)


def _share(inner: CheckedLoss) -> float:
    """That of a part that is one."""
    return inner.share if isinstance(inner, LossGraph) else inner[0].share if inner else 0.0


def _recorder(
    curvature: str, loss_fn: LossFn, params: Sequence[Tensor], outer_params: Sequence[Tensor], is_fresh: bool
) -> Record:
    if curvature == "hessian-jvp":
        return ForwardOverReverse(loss_fn, params, outer_params, is_fresh).record
    kind = _RECORDED[curvature]
    return lambda params: kind(loss_fn(), params)
