"""Checks of the arguments of `hypergradient`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.graph import graph_from


def as_tuple(name: str, params: Iterable[Tensor]) -> tuple[Tensor, ...]:
    given: Any = params
    if isinstance(given, (Tensor, torch.nn.Module)) or not isinstance(given, Iterable):
        hint = "module.parameters()" if isinstance(given, torch.nn.Module) else "a list"
        raise TypeError(f"{name} must be an iterable of tensors, not a {type(given).__name__}: pass {hint}")
    items = tuple(given)
    for i, item in enumerate(items):
        if not isinstance(item, Tensor):
            raise TypeError(f"{name} must hold tensors, but number {i} is a {type(item).__name__}")
        if item.is_complex():
            raise ValueError(f"{name} must hold real tensors, but number {i} is {item.dtype}")
    if not items:
        raise ValueError(f"{name} is empty (a generator that was used up before also is)")
    return items


def check_independent(**lists: Sequence[Tensor]) -> None:
    """Raises ValueError where a tensor of the named lists is given twice, or computed from another: that would count a
    dependence twice."""
    places: dict[int, str] = {}
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if id(tensor) in places:
                raise ValueError(f"{name}[{i}] is the same tensor as {places[id(tensor)]}: each may be given once")
            places[id(tensor)] = f"{name}[{i}]"
    nodes = {t.grad_fn: places[id(t)] for tensors in lists.values() for t in tensors if t.grad_fn is not None}
    for node, place in nodes.items():
        for above in graph_from(following for following, _ in node.next_functions):
            origin = nodes.get(above) or places.get(id(getattr(above, "variable", None)))
            if origin is not None:
                raise ValueError(f"{place} is computed from {origin}: they must be independent")


def check_uniform(inner: Sequence[Tensor]) -> None:
    for what in ("dtype", "device"):
        values = {getattr(param, what) for param in inner}
        if len(values) > 1:
            listed = " and ".join(sorted(map(str, values)))
            raise ValueError(f"inner_params must be of one {what}, not of {listed}")
