"""What is under way around a call: forward-mode AD, transforms of torch.func, batched gradients.

Ops ask for it at every call, so the functions are looked up once. Where torch does not tell, the answer is the one
that leads to operations of PyTorch instead of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_transforms_active: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
_is_legacy_batched: Callable[[Tensor], bool] | None = getattr(
    getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None
)
_enter_batch: Callable[[], int] | None = getattr(torch._C, "_vmapmode_increment_nesting", None)
_leave_batch: Callable[[], int] | None = getattr(torch._C, "_vmapmode_decrement_nesting", None)
_wrap: Any = getattr(torch, "_add_batch_dim", None)
_unwrap: Any = getattr(torch, "_remove_batch_dim", None)
_LEVEL = 1  # of the batch of `is_grads_batched`, which has none around it
_tells_forward_mode = hasattr(forward_ad, "_current_level")


def in_forward_mode() -> bool:
    """Whether a `torch.autograd.forward_ad.dual_level` is open."""
    return not _tells_forward_mode or forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether forward-mode AD or a transform of torch.func is under way."""
    return _transforms_active is None or _transforms_active() or in_forward_mode()


def in_transform_of_torch_func() -> bool:
    """Whether one is known to be under way."""
    return _transforms_active is not None and _transforms_active()


def has_tangent(tensors: Sequence[Tensor]) -> bool:
    """Whether forward-mode AD, outside of torch.func, follows one of the tensors."""
    return in_forward_mode() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def in_batch(gradient: Tensor) -> bool:
    """Whether a backward pass runs for several gradients at once: in a transform of torch.func, or because
    `torch.autograd.grad` was called with `is_grads_batched=True`."""
    return _is_batch(gradient) or _transforms_active is None or _transforms_active()


def rows_of_batch(gradients: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """The gradients of a pass with `is_grads_batched=True`, with the axis of the batch in front; `None` where it is
    another pass.

    Raises:
        NotImplementedError: torch does not show the batch.
    """
    batches = [gradient for gradient in gradients if gradient is not None and _is_batch(gradient)]
    if not batches:
        return None
    if None in (_enter_batch, _leave_batch, _wrap, _unwrap):
        raise NotImplementedError(
            "this version of torch does not show the batch of is_grads_batched=True: take a backward pass for each row"
        )
    size = len(_unwrap(batches[0], _LEVEL, 1, 0))
    return [None if each is None else _unwrap(each, _LEVEL, size, 0) for each in gradients]


def as_batch(rows: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `rows_of_batch`."""
    return [_wrap(tensor, 0, _LEVEL) for tensor in rows]


@contextmanager
def outside_of_batch() -> Iterator[None]:
    """Within this context no batch of `is_grads_batched=True` is under way, so that random numbers may be drawn."""
    if _enter_batch is None or _leave_batch is None:  # random numbers are then refused by torch
        yield
        return
    depth = _enter_batch()
    for _ in range(depth):
        _leave_batch()
    try:
        yield
    finally:
        for _ in range(depth - 1):
            _enter_batch()


def _is_batch(gradient: Tensor) -> bool:
    return _has_no_storage(gradient) if _is_legacy_batched is None else _is_legacy_batched(gradient)


def _has_no_storage(gradient: Tensor) -> bool:
    try:
        gradient.untyped_storage()
    except NotImplementedError:
        return True
    return False
