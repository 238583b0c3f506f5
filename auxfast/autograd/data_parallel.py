"""DistributedDataParallel in the graphs and calls of losses: what it does beside calling the module that it wraps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_SWITCH = "_use_python_reducer"  # torch's own way to leave gradients to others than the reducer


def pass_by(ddp: nn.Module) -> bool:
    """Makes the call of a DistributedDataParallel that has begun that of the module that it wraps: its reducer is not
    prepared for a backward pass, and no buffers are broadcast. The next call is as ever. False, and nothing done, where
    torch has no switch for it.

    Call it in a forward pre-hook.
    """
    state = getattr(ddp, _SWITCH, None)
    if state is not False:
        return bool(state)  # the user has set it

    def put_back(*call: Any) -> None:
        setattr(ddp, _SWITCH, False)
        handle.remove()

    setattr(ddp, _SWITCH, True)
    handle = ddp.register_forward_hook(put_back, always_call=True)
    return True


def is_sink(node: Any) -> bool:
    """Whether a node of a graph is where DistributedDataParallel has its outputs pass, with find_unused_parameters or
    static_graph: the identity, forward and backward."""
    return hasattr(node, "ddp_weakref")


def wakes_reducer(nodes: Iterable[Any]) -> bool:
    """Whether a backward pass through one of the nodes is taken for one of training: a DistributedDataParallel with
    static_graph joins the gradients at the end of the first."""
    ddps = [node.ddp_weakref() for node in nodes if is_sink(node)]
    return any(ddp is None or ddp.static_graph for ddp in ddps)
