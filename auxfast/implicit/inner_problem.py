"""The inner problem as it is given, checked: what `hypergradient` and `implicit_minimum` share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit.arguments import as_tuple, check_independent, check_one_device, shares_of
from auxfast.implicit.derivatives import COMPUTED_ANEW
from auxfast.implicit.distributed import refuse_flat
from auxfast.implicit.free_entries import Free, Masks, free_masks
from auxfast.implicit.losses import CheckedLoss, Loss, LossFns, LossGraph, agreed_kind, as_loss_fns
from auxfast.implicit.ranks import Ranks, attempt
from auxfast.solvers.base import Solver, SolverState


@dataclass(frozen=True)
class GivenParams:
    """Inner and outer parameters: all that were given, and the active ones, which require gradients.

    Attributes:
        masks: the free entries of `active_inner`; `None`: all are.
    """

    inner: tuple[Tensor, ...]
    outer: tuple[Tensor, ...]
    active_inner: list[Tensor]
    active_outer: list[Tensor]
    masks: Masks | None


def given_params(
    inner_params: Iterable[Tensor], outer_params: Iterable[Tensor], free: Free | None, may_be_sharded: bool = False
) -> GivenParams:
    """The parameters, checked; see `hypergradient` for what is raised.

    Args:
        may_be_sharded: whether the inner ones may be DTensors.
    """
    inner = as_tuple("inner_params", inner_params, may_be_sharded)
    outer = as_tuple("outer_params", outer_params)
    check_independent(inner_params=inner, outer_params=outer)
    check_one_device("inner_params", inner)
    return GivenParams(
        inner,
        outer,
        [w for w in inner if w.requires_grad],
        [phi for phi in outer if phi.requires_grad],
        None if free is None else free_masks(free, inner),
    )


def check_same_call(
    ranks: Ranks,
    params: GivenParams,
    solver: Solver,
    curvature: str,
    state: SolverState | None,
    is_sharded: bool = False,
) -> None:
    """Raises ValueError, on all ranks, where they have passed what must be the same. Of inner parameters in pieces each
    has another."""
    setting = repr(solver)
    facts = {
        "solver": setting if " at 0x" not in setting else type(solver).__name__,
        "curvature": curvature,
        "state": "None" if state is None else state.summary(),
        "free": "None" if params.masks is None else str([_positions(mask) for mask in params.masks]),
    }
    inner = {} if is_sharded else {"inner_params": params.inner}
    try:
        ranks.check_same(facts, {**inner, "outer_params": params.outer})
    except ValueError:
        refuse_flat("inner_params", params.inner)
        raise


def check_call_of_shards(outer_loss: Loss, inner_loss: Loss, free: Free | None, solver: Solver, curvature: str) -> None:
    """Raises TypeError or NotImplementedError for what does not go with inner parameters of `fully_shard`."""
    for name, loss in (("outer_loss", outer_loss), ("inner_loss", inner_loss)):
        if isinstance(loss, Tensor):
            raise TypeError(
                f"{name} must be a function for inner_params of fully_shard, which are whole within the call alone, "
                "not a tensor"
            )
    if curvature == "finite-difference" or getattr(solver, "mixed", "exact") == "difference":
        raise NotImplementedError(
            "finite differences do not take inner_params of fully_shard: take curvature='hessian' or 'gauss-newton', "
            "and mixed='exact' for OneStep and SAMA"
        )
    if free is not None:
        raise NotImplementedError("free must be None for inner_params of fully_shard: all their entries are free")


def _positions(mask: Tensor | None) -> str:
    """A text that differs between most masks."""
    if mask is None:
        return "all"
    places = mask.flatten().nonzero()
    return f"{len(places)} entries of {mask.numel()}, a sum of {int(places.square().sum())} of their squared places"


def check_inner_loss(inner_loss: Loss, curvature: str, outputs: Any) -> None:
    """Raises ValueError or TypeError where the three do not fit together."""
    if curvature in COMPUTED_ANEW and isinstance(inner_loss, Tensor):
        raise TypeError(f"inner_loss must be a function for curvature={curvature!r}, which evaluates it again")
    if outputs is not None and curvature != "gauss-newton":
        raise ValueError(f"outputs are for curvature='gauss-newton', not for {curvature!r}")
    if outputs is not None and not isinstance(inner_loss, Tensor):
        raise ValueError("outputs must be None where inner_loss is made of functions: they return (loss, outputs)")


def given_loss(
    name: str,
    loss: Loss,
    guard: preserved_state | None,
    outputs: Tensor | Sequence[Tensor] | None = None,
    with_outputs: bool = False,
    ranks: Ranks | None = None,
) -> CheckedLoss:
    """A loss with its graph, or functions that compute it anew and leave no trace.

    Args:
        guard: `None` where there are no functions.
        ranks: those that have the other parts of the loss; `None`: it is whole.
    """
    if isinstance(loss, Tensor) or guard is None:
        (share,) = shares_of(name, [1], ranks)
        kind = agreed_kind(name, "tensor", ranks)
        failed: CheckedLoss = LossFns((), ranks, kind)
        # LossGraph checks what it is given, whatever that is.
        return attempt(ranks, lambda: LossGraph(name, loss, outputs, ranks, share), failed)
    return as_loss_fns(name, loss, guard.replay, with_outputs, ranks)
