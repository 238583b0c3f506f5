"""What is under way around a call: forward-mode AD, transforms of torch.func, batched gradients.

Ops ask for it at every call, so the functions are looked up once. Where torch does not tell, the answer is the one
that leads to operations of PyTorch instead of kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_transforms_active: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
_is_legacy_batched: Callable[[Tensor], bool] | None = getattr(
    getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None
)
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


def in_batch(gradient: Tensor) -> bool:
    """Whether a backward pass runs for several gradients at once: in a transform of torch.func, or because
    `torch.autograd.grad` was called with `is_grads_batched=True`."""
    batched = _has_no_storage(gradient) if _is_legacy_batched is None else _is_legacy_batched(gradient)
    return batched or _transforms_active is None or _transforms_active()


def _has_no_storage(gradient: Tensor) -> bool:
    try:
        gradient.untyped_storage()
    except NotImplementedError:
        return True
    return False
