"""Networks that are spread over processes: hypergradients cannot be taken through them yet, and say so."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, distributed, nn

from auxfast.autograd.fsdp import is_plain

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_FSDP1 = "FullyShardedDataParallel (FSDP1), which is not supported: apply torch.distributed.fsdp.fully_shard (FSDP2)"
_WHY = (
    "which joins gradients of all processes in backward() and not in the derivatives that a hypergradient is made of: "
    "it would be that of this process's data alone. auxfast does not work across processes yet: a process group will "
    "come."
)


class SpreadOverProcesses(RuntimeError):
    """A module that was called within a loss is spread over processes."""


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without the import of its module, which takes long and is not always there."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "device_mesh")


def refuse_calls(module: nn.Module) -> None:
    """Raises SpreadOverProcesses if the module, which is called, joins gradients of several processes."""
    kind: Any = type(module)
    if _is_wrapper(kind) and distributed.is_initialized() and distributed.get_world_size() > 1:
        way_out = " If that is what you want, call the module that it wraps." if hasattr(module, "module") else ""
        raise SpreadOverProcesses(f"{type(module).__name__}, {_WHY}{way_out}")


def refuse_calls_of_rank(module: nn.Module) -> None:
    """The same where hypergradients are summed over ranks, of modules in pieces that no inner parameter belongs to."""
    kind: Any = type(module)
    names = _names_of(kind)
    if "FullyShardedDataParallel" in names:
        raise SpreadOverProcesses(_FSDP1)
    if "FSDPModule" in names and not is_plain(module):
        raise SpreadOverProcesses(
            f"{type(module).__name__}, a module of fully_shard of which inner_params has no parameter: its ranks would "
            "wait for each other's forward passes. Leave fully_shard out for it"
        )


def refuse_flat(name: str, params: Sequence[Tensor]) -> None:
    """Raises RuntimeError if parameters are pieces of the flat ones of FSDP1."""
    ids = {id(param) for param in params}
    for module in _wrappers():
        if type(module).__name__ == "FullyShardedDataParallel" and ids & {id(param) for param in module.parameters()}:
            raise RuntimeError(f"{name} are of {_FSDP1}")


def refuse_params(name: str, params: Sequence[Tensor]) -> None:
    """Raises RuntimeError if parameters belong to a module that joins their gradients of several processes.

    The graph of a loss does not show whether it went through such a module. Python's garbage collector knows all that
    there are; it is asked, for some 10 ms, only by programs of several processes.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    wrapped = {id(param) for module in _wrappers() for param in module.parameters()}
    if any(id(param) in wrapped for param in params):
        raise RuntimeError(
            f"{name} belong to a DistributedDataParallel or FSDP module, {_WHY} If that is what you want, pass the "
            "losses as functions that call the module that DistributedDataParallel wraps."
        )


def _wrappers() -> list[Any]:
    classes = [kind for kind in _all_subclasses(nn.Module) if _is_wrapper(kind)]
    return [found for found in gc.get_referrers(*classes) if isinstance(found, tuple(classes))]


def _all_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_all_subclasses, kind.__subclasses__()))


@cache
def _is_wrapper(kind: type) -> bool:
    return not _names_of(kind).isdisjoint(_WRAPPERS)


@cache
def _names_of(kind: Any) -> set[str]:
    """The names of those of its bases that are torch's."""
    return {base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch.")}
