"""Calls into torch that are faster, or rounded otherwise, by a private name than by the public one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def without_frame(overload: Any) -> Any:
    """`overload` of an op of `torch.ops`, callable without the overload's own frame of Python."""
    return getattr(overload, "_op", overload)


def weight_norm(v: Tensor, g: Tensor) -> Tensor:
    """`g * v / |v|`, the norm taken over all axes of v but the first. v: (out, ...), g: (out, 1, ...)."""
    fused: Any = getattr(torch, "_weight_norm", None)
    normalized: Tensor = v * (g / torch.norm_except_dim(v, 2, 0)) if fused is None else fused(v, g, 0)
    return normalized


def own_parameter(module: nn.Module, name: str) -> Tensor | None:
    """`module.name`, without `Module.__getattr__`; `None` where that is no parameter of the module itself."""
    parameters: dict[str, Tensor | None] = module.__dict__.get("_parameters", {})
    return parameters.get(name)
