"""What is not finite in a hypergradient, told by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class NotFiniteError(FloatingPointError):
    """A part of the hypergradient holds NaN or inf; the message says which."""


def check_finite(what: str, tensors: Sequence[Tensor | None]) -> None:
    """Raises NotFiniteError, which says that `what` holds NaN, or inf."""
    given = [tensor for tensor in tensors if tensor is not None]
    if all_finite(given):
        return
    raise not_finite(what, "NaN" if any(bool(tensor.isnan().any()) for tensor in given) else "inf")


def not_finite(what: str, value: str) -> NotFiniteError:
    """The error that says that `what` holds the value."""
    return NotFiniteError(
        f"{what} hold {value}: has inner training diverged, by its learning rate or a loss weight that grew? If not, "
        "look for NaN or inf in the batch and in the parameters, for an operator without a derivative at these values "
        "(the norm of a zero vector, sqrt(0), log(0)), and for values too large for their dtype; a GradScaler's scale "
        "makes them larger: pass the loss without it"
    )


def all_finite(tensors: Sequence[Tensor]) -> bool:
    if len(tensors) > 1 and not tensors[0].is_cpu and len({tensor.device for tensor in tensors}) == 1:
        sums = torch.stack([tensor.sum() for tensor in tensors]).tolist()  # each reading waits for a GPU
    else:
        sums = [tensor.sum().item() for tensor in tensors]
    # Numbers may be finite and their sum not.
    return all(math.isfinite(s) or bool(t.isfinite().all()) for s, t in zip(sums, tensors, strict=True))
