"""Losses that a `torch.amp.GradScaler` has multiplied by its scale."""

from __future__ import annotations

import gc
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.amp import GradScaler, grad_scaler
from torch.autograd import forward_ad

# Every scaler holds this function, so that the number of references to it tells whether there may be one. To look for
# scalers takes 20 ms in a process with 300,000 objects, and most processes have none.
_held_by_scalers: Any = getattr(grad_scaler, "_refresh_per_optimizer_state", None)
_without_tangents: Any = getattr(forward_ad, "_set_fwd_grad_enabled", nullcontext)
_num_namespaces = 0  # plain dicts of modules that hold it too, found when they were last counted
_known: WeakSet[GradScaler] = WeakSet()  # found before; what they hold is looked at each time


class UnknownScaleError(ValueError):
    """A scale is in a loss, and it is not known that it multiplies all of it, once."""


def scale_of(loss: Tensor) -> float:
    """The scale by which a `GradScaler` has multiplied the loss; 1 where none has.

    `GradScaler.scale` multiplies by a tensor of its own, which tells it from any number of a user. Where it is given a
    list of losses it takes a copy, of which only the value is known.

    Raises:
        UnknownScaleError: it is such a copy, or a number equal to it; or only a part of the loss was multiplied.
        RuntimeError: autograd's, where the graph was freed, or the scale has changed since.
    """
    if not (_known or _may_be_alive()):
        return 1.0
    scale = 1.0
    for node in _last_nodes(loss.grad_fn):
        factor = _factor(node)
        if factor is None or (scaler := _scaler_of(factor)) is None:
            continue
        if node is not loss.grad_fn or not _holds(scaler, factor):
            raise UnknownScaleError
        scale = scaler.get_scale()
    return scale


def _may_be_alive() -> bool:
    global _num_namespaces
    if _held_by_scalers is None:
        return True
    if sys.getrefcount(_held_by_scalers) <= _num_namespaces + 1:  # that of the argument
        return False
    holders = gc.get_referrers(_held_by_scalers)
    if any(isinstance(holder, defaultdict) for holder in holders):  # in which scalers hold it
        return True
    _num_namespaces = sum(type(holder) is dict for holder in holders)
    return False


def _last_nodes(start: Any) -> Iterator[Any]:
    """The nodes from `start` on whose results are single numbers, and the first of others, without those behind them;
    all nodes where torch does not tell."""
    found, seen = [] if start is None else [start], {start, None}
    for node in found:  # the list grows while the loop runs
        yield node
        for following, index in node.next_functions:
            metadata = getattr(following, "_input_metadata", ())[index : index + 1]
            if following in seen:
                continue
            seen.add(following)
            if not metadata or math.prod(metadata[0].shape) == 1:
                found.append(following)
            else:
                yield following


def _factor(node: Any) -> Tensor | None:
    """What the node multiplies by, if that is a tensor like a scale: a single number in float32 without a graph."""
    if node.name() != "MulBackward0":
        return None
    if not hasattr(node, "_saved_other"):
        (result,) = node._input_metadata
        with _without_tangents(False):
            gradient, _ = node(torch.ones(result.shape, dtype=result.dtype, device=result.device))
        factors = torch.empty(0) if gradient is None else gradient.detach().flatten()
        return factors[0] if len(factors) and bool((factors == factors[0]).all()) else None
    factor = node._saved_other
    is_like_a_scale = (
        factor is not None and not (factor.dim() or factor.requires_grad) and factor.dtype == torch.float32
    )
    return factor if is_like_a_scale else None


def _scaler_of(factor: Tensor) -> GradScaler | None:
    """The scaler whose scale the factor is, or else is equal to."""
    if (owner := _owner_of(factor)) is not None:
        return owner
    _known.update(_living())
    if (owner := _owner_of(factor)) is not None:
        return owner
    in_use = [each for each in _known if each.is_enabled() and getattr(each, "_scale", factor) is not None]
    return next((each for each in in_use if each.get_scale() == float(factor)), None)


def _owner_of(factor: Tensor) -> GradScaler | None:
    return next((each for each in _known if _holds(each, factor)), None)


def _holds(scaler: GradScaler, factor: Tensor) -> bool:
    kept = getattr(scaler, "_scale", None)
    return kept is not None and kept.data_ptr() == factor.data_ptr()  # hooks of saved tensors may detach it


def _living() -> list[GradScaler]:
    kinds: list[type[GradScaler]] = [GradScaler]
    for kind in kinds:  # the list grows while the loop runs
        kinds.extend(kind.__subclasses__())
    return [each for each in gc.get_referrers(*kinds) if isinstance(each, GradScaler)]
