"""Masks of free entries: where some entries stay at a kink or a bound, the theorem is about the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from auxfast.implicit.curvature import Curvature
from auxfast.solvers.space import LOCAL

Free = Iterable[Tensor | None]
"""One tensor of torch.bool for each of `inner_params`, of its shape, True where an entry moves with the outer
parameters; or `None`, where all do."""

Masks = Sequence[Tensor | None]


def free_masks(free: Free | None, inner: Sequence[Tensor], name: str = "inner_params") -> list[Tensor | None]:
    """The masks of those `inner` parameters, an argument of this name, that have `requires_grad`.

    Raises:
        TypeError: `free` is no iterable of tensors and None.
        ValueError: masks of another number, shape, dtype or device than `inner` asks for, or none that is free.
    """
    if free is None:
        return [None for param in inner if param.requires_grad]
    given: Any = free
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(f"free must be a list, one mask or None for each of {name}, not a {type(given).__name__}")
    masks = list(given)
    if len(masks) != len(inner):
        raise ValueError(f"free must have one mask or None for each of the {len(inner)} {name}, not {len(masks)}")
    for i, (mask, param) in enumerate(zip(masks, inner, strict=True)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise TypeError(f"free[{i}] must be a tensor of torch.bool or None, not a {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise ValueError(f"free[{i}] must be of torch.bool, not {mask.dtype}: compare, as in w != 0")
        if mask.shape != param.shape:
            raise ValueError(
                f"free[{i}] must have the shape of {name}[{i}], {tuple(param.shape)}, not {tuple(mask.shape)}"
            )
        if mask.device != param.device:
            raise ValueError(f"free[{i}] must be on the device of {name}[{i}], {param.device}, not {mask.device}")
    active = [mask for mask, param in zip(masks, inner, strict=True) if param.requires_grad]
    if active and not any(mask is None or bool(mask.any()) for mask in active):
        raise ValueError(
            f"free holds no free entry: all of {name} would be held fixed, and nothing of them move with the outer "
            "parameters"
        )
    return active


def project(tensors: Sequence[Any], masks: Masks) -> list[Any]:
    """The tensors with zeros where an entry is not free, whatever stands there, NaN included. Those without a mask are
    returned as they are, and so is `None`. They may have more axes in front than the masks."""
    return [
        tensor if tensor is None or mask is None else tensor.masked_fill(~mask, 0)
        for tensor, mask in zip(tensors, masks, strict=True)
    ]


class FreeCurvature:
    """The curvature `P H P`, where the projection `P` zeroes the entries that are held fixed: as if those were
    constants, so the solution of `P H P x = P b` is that of the smaller system of the free entries, and 0 elsewhere.

    Args:
        curvature: H.
        masks: one for each tensor that `curvature` was given, in the system or not.
    """

    def __init__(self, curvature: Curvature, masks: Masks) -> None:
        self.in_system = curvature.in_system
        self.params = curvature.params
        self.exact = getattr(curvature, "exact", False)  # see `LinearOperator`
        self.space = getattr(curvature, "space", LOCAL)
        self._curvature = curvature
        self._masks = list(compress(masks, curvature.in_system))

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return project(self._curvature(project(vectors, self._masks)), self._masks)

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return project(self._curvature.batched(project(vectors, self._masks)), self._masks)

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        return self._curvature.mixed(project(vectors, self._masks), outer_params)
