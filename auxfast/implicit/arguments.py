"""Checks of the arguments of `hypergradient`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.graph import graph_from
from auxfast.implicit.distributed import is_distributed
from auxfast.implicit.ranks import Ranks, attempt


def as_tuple(name: str, params: Iterable[Tensor], may_be_sharded: bool = False) -> tuple[Tensor, ...]:
    """The tensors of an argument, DTensors too where it `may_be_sharded`.

    Raises:
        TypeError: it is no iterable of tensors. ValueError: it is empty, or holds a tensor that cannot be one of the
            parameters: complex, made under `torch.inference_mode()`, or distributed over processes.
    """
    given: Any = params
    if isinstance(given, (Tensor, torch.nn.Module)) or not isinstance(given, Iterable):
        hint = "module.parameters()" if isinstance(given, torch.nn.Module) else "a list"
        raise TypeError(f"{name} must be an iterable of tensors, not a {type(given).__name__}: pass {hint}")
    if isinstance(given, Mapping):
        raise TypeError(f"{name} must be an iterable of tensors, not a {type(given).__name__}: pass its values()")
    items = tuple(given)
    for i, item in enumerate(items):
        if not isinstance(item, Tensor):
            hint = ": pass parameters(), not named_parameters()" if isinstance(item, tuple) else ""
            raise TypeError(f"{name} must hold tensors, but number {i} is a {type(item).__name__}{hint}")
        if item.is_complex():
            raise ValueError(f"{name} must hold real tensors, but number {i} is {item.dtype}")
        if item.is_inference():
            raise ValueError(
                f"{name} must hold tensors that autograd can use, but number {i} was made under "
                "torch.inference_mode(): make it outside of it, or take a clone()"
            )
        if is_distributed(item) and not may_be_sharded:
            raise ValueError(
                f"{name} must hold tensors that this process has whole, but number {i} is a {type(item).__name__}, a "
                "piece of a parameter that is spread over processes. Parameters of fully_shard are taken as the "
                "inner_params of hypergradient and HyperOptimizer alone, with their process_group; else take a network "
                "that is not sharded"
            )
    if not items:
        raise ValueError(f"{name} is empty (a generator that was used up before also is)")
    return items


def check_independent(**lists: Sequence[Tensor]) -> None:
    """Raises ValueError where a tensor of the named lists is given twice, or computed from another: that would count a
    dependence twice."""
    given = [tensor for tensors in lists.values() for tensor in tensors]
    results = [tensor for tensor in given if tensor.grad_fn is not None]
    if not results and len({*map(id, given)}) == len(given):  # the usual case, in which no place need have a name
        return
    places: dict[int, str] = {}
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if id(tensor) in places:
                raise ValueError(f"{name}[{i}] is the same tensor as {places[id(tensor)]}: each may be given once")
            places[id(tensor)] = f"{name}[{i}]"
    nodes: dict[Any, str] = {tensor.grad_fn: places[id(tensor)] for tensor in results}
    for node, place in nodes.items():
        for above in graph_from(following for following, _ in node.next_functions):
            origin = nodes.get(above) or places.get(id(getattr(above, "variable", None)))
            if origin is not None:
                raise ValueError(f"{place} is computed from {origin}: they must be independent")


def check_one_device(name: str, params: Sequence[Tensor]) -> None:
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise ValueError(f"{name} must be of one device, not of {' and '.join(sorted(map(str, devices)))}")


def shares_of(name: str, weights: Sequence[Any], ranks: Ranks | None = None) -> list[float]:
    """The weights divided by their sum, over all ranks where there are several.

    Raises:
        TypeError: one is no number.
        ValueError: one is negative or not finite, or all are 0.
    """
    total = attempt(ranks, lambda: _total(name, weights), 0.0)
    if ranks is not None:
        (total,) = ranks.totals([total])
    if not total:
        raise ValueError(f"{name} must not all be 0: there is no mean of nothing")
    return attempt(ranks, lambda: [float(weight) / total for weight in weights], [0.0] * len(weights))


def _total(name: str, weights: Sequence[Any]) -> float:
    for i, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"{name} must be numbers, but number {i} is a {type(weight).__name__}")
        if not 0 <= float(weight) < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, but number {i} is {weight}")
    return math.fsum(weights)
