"""Networks that are spread over processes: which calls and graphs give the derivatives of this process's part of a
loss, and which are refused."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, distributed, nn

from auxfast.autograd.data_parallel import pass_by, wakes_reducer
from auxfast.autograd.fsdp import is_plain
from auxfast.autograd.graph import function_class

_ROLES = {
    "DistributedDataParallel": "data parallel",
    "FullyShardedDataParallel": "FSDP1",
    "FSDPModule": "fully_shard",
    "SyncBatchNorm": "sync batch norm",
    "OptimizedModule": "compiled",
}
"""What classes of torch do, by their names: they need not be imported, nor be there."""
_WRAPPERS = {"data parallel", "FSDP1", "fully_shard"}
_JOINS = (
    "which joins gradients of all processes in backward() and not in the derivatives that a hypergradient is made of: "
    "it would be that of this process's data alone."
)
_REMEDY = (
    "hypergradient, implicit_minimum and HyperOptimizer take process_group=torch.distributed.group.WORLD, and give the "
    "hypergradient of all data."
)
_SYNC_BATCH_NORM = (
    "SyncBatchNorm in training mode, whose statistics join the processes, so that no loss is the sum of their parts, "
    "and which has no second derivatives: call its eval(), or take BatchNorm, for the losses of a hypergradient"
)
_MIXED_PRECISION = (
    "DistributedDataParallel with mixed_precision, which exchanges the parameters within its calls: take "
    "torch.autocast, or call the module that it wraps"
)
_COMPILED = (
    "torch.compile of a module that holds a DistributedDataParallel: call what was compiled, or compile the module "
    "that DistributedDataParallel wraps"
)
_FSDP1 = "FullyShardedDataParallel (FSDP1), which is not supported: apply torch.distributed.fsdp.fully_shard (FSDP2)"
_NO_SWITCH = "DistributedDataParallel, which this torch does not let pass by: call the module that it wraps"
_STATIC_GRAPH = (
    "was computed by DistributedDataParallel with static_graph, which takes the first backward pass, and so that of a "
    "hypergradient, for one of training: pass it as a function"
)


class SpreadOverProcesses(RuntimeError):
    """A module that was called within a loss is spread over processes."""


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without the import of its module, which takes long and is not always there."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "device_mesh")


def refuse_calls(module: nn.Module) -> None:
    """Raises SpreadOverProcesses if the module, which is called, joins gradients of several processes."""
    roles = _roles_of(module)
    if not roles:
        return
    if not _is_of_several():
        if "data parallel" in roles:
            pass_by(module)
        return
    _refuse_sync_batch_norm(module, roles)
    if roles & _WRAPPERS or _is_compiled_around_wrapper(module, roles):
        way_out = " If that is what you want, call the module that it wraps." if hasattr(module, "module") else ""
        raise SpreadOverProcesses(f"{type(module).__name__}, {_JOINS} {_REMEDY}{way_out}")


def refuse_calls_of_rank(module: nn.Module) -> None:
    """Raises SpreadOverProcesses if the module, which is called, leaves a rank no term of its own to be summed over
    ranks. A call of DistributedDataParallel becomes that of the module that it wraps, so that what training asks of it
    stays as it is."""
    roles = _roles_of(module)
    if not roles:
        return
    _refuse_sync_batch_norm(module, roles)
    if "FSDP1" in roles:
        raise SpreadOverProcesses(_FSDP1)
    if "fully_shard" in roles and not is_plain(module):
        raise SpreadOverProcesses(
            f"{type(module).__name__}, a module of fully_shard of which inner_params has no parameter: its ranks would "
            "wait for each other's forward passes. Leave fully_shard out for it"
        )
    if _is_compiled_around_wrapper(module, roles):
        raise SpreadOverProcesses(_COMPILED)
    if "data parallel" in roles:
        if getattr(module, "mixed_precision", None) is not None:
            raise SpreadOverProcesses(_MIXED_PRECISION)
        if not pass_by(module):
            raise SpreadOverProcesses(_NO_SWITCH)


def fault_of(functions: Sequence[Any]) -> str | None:
    """What makes a graph unfit whose nodes that belong to a `torch.autograd.Function` are given; `None`: nothing."""
    if any("sync batch norm" in _roles(function_class(node)) for node in functions):
        return f"went through {_SYNC_BATCH_NORM}"
    return _STATIC_GRAPH if wakes_reducer(functions) else None


def refuse_flat(name: str, params: Sequence[Tensor]) -> None:
    """Raises RuntimeError if parameters are pieces of the flat ones of FSDP1."""
    ids = {id(param) for param in params}
    for module in _wrappers():
        if "FSDP1" in _roles_of(module) and ids & {id(param) for param in module.parameters()}:
            raise RuntimeError(f"{name} are of {_FSDP1}")


def refuse_params(name: str, params: Sequence[Tensor]) -> None:
    """Raises RuntimeError if parameters belong to a module that joins their gradients of several processes.

    The graph of a loss does not show whether it went through such a module. Python's garbage collector knows all that
    there are; it is asked, for some 10 ms, only by programs of several processes.
    """
    if not _is_of_several():
        return
    wrapped = {id(param) for module in _wrappers() for param in module.parameters()}
    if any(id(param) in wrapped for param in params):
        raise RuntimeError(
            f"{name} belong to a DistributedDataParallel or FSDP module, {_JOINS} {_REMEDY} If that of this process's "
            "data is what you want, pass the losses as functions that call the module that DistributedDataParallel "
            "wraps."
        )


def _is_of_several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _refuse_sync_batch_norm(module: nn.Module, roles: frozenset[str]) -> None:
    if "sync batch norm" in roles and module.training:
        raise SpreadOverProcesses(_SYNC_BATCH_NORM)


def _is_compiled_around_wrapper(module: nn.Module, roles: frozenset[str]) -> bool:
    return "compiled" in roles and any(_roles_of(part) & _WRAPPERS for part in module.modules())


def _wrappers() -> list[Any]:
    classes = [kind for kind in _all_subclasses(nn.Module) if _roles(kind) & _WRAPPERS]
    return [found for found in gc.get_referrers(*classes) if isinstance(found, tuple(classes))]


def _all_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_all_subclasses, kind.__subclasses__()))


def _roles_of(module: nn.Module) -> frozenset[str]:
    kind: Any = type(module)
    return _roles(kind)


@cache
def _roles(kind: Any) -> frozenset[str]:
    bases = [base for base in getattr(kind, "__mro__", ()) if base.__module__.startswith("torch.")]
    return frozenset(_ROLES[base.__name__] for base in bases if base.__name__ in _ROLES)
