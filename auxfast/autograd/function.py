"""Shorter ways into and out of a `torch.autograd.Function`.

At small batches most of an op's time is Python's, and in a training step, where code has left the caches, all of it
costs several times what a loop of its own shows. Where torch has no such name any more, the usual way is taken.

A Function may tell the rest of this room two things: `twice_differentiable = True`, so that nobody need find out
(double_backward.py), and `batched_backward`, a backward pass for a batch of gradients outside of the engine
(batched_backward.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

_will_execute: Callable[[Any], bool] | None = getattr(torch._C, "_will_engine_execute_node", None)


def reaches(node: Any) -> bool:
    """Whether the pass of the engine that is under way goes on to `node`. `ctx.needs_input_grad` cannot tell: it says
    what requires grad, and a Hessian product, which asks for the inner parameters only, would pay for phi.

    True where torch does not tell: a result that nobody asked for is dropped.
    """
    return _will_execute is None or _will_execute(node)


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its preparations for torch.func, which take 3.5 us, and which the caller has ruled
    out."""
    apply: Callable[..., Any] = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return apply


def call_backward_directly(function: type[torch.autograd.Function]) -> None:
    """Lets the engine call `function.backward` itself: without two frames that look for a `vjp` first, 3 us each, 6 to
    13% of a combiner's gradient and product at small batches.

    Changes the node class that torch has made for `function`, and no other. Does nothing if torch's own method is not
    there, or takes other arguments than the known ones.
    """
    node_class = getattr(function, "_backward_cls", None)
    known = getattr(BackwardCFunction, "apply", None)
    if node_class is None or known is None or node_class.apply is not known:
        return
    if [*inspect.signature(known).parameters] == ["self", "args"]:
        node_class.apply = function.backward
