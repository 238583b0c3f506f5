"""Hooks of the user, found where they are: what they watch or change must run as torch runs it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from auxfast.autograd.engine import vjp
from auxfast.autograd.graph import function_class, functions_of


def has_hook(tensor: Tensor) -> bool:
    """Whether a hook is registered on the tensor, `retain_grad()` included; also where torch does not tell. Autograd's
    engine runs the hooks of every tensor of a graph, and the graph leads to few of its tensors: `HookDetector` finds
    hooks on the others."""
    return bool(getattr(tensor, "_backward_hooks", True)) or tensor.retains_grad


def through_hooks(tensor: Tensor, gradient: Tensor) -> Tensor:
    """What the hooks on the tensor, which requires gradients, make of a gradient in it."""
    with torch.enable_grad():
        alias = tensor.view_as(tensor)
    (result,) = vjp([alias], [tensor], [gradient], retain_graph=False)
    return gradient if result is None else result


# Python that torch itself runs for a few operators, such as sums with tensors that it knows to be zero.
_OPERATORS_IN_PYTHON = ("torch._prims_common.", "torch._refs.", "torch._decomp.", "torch._meta_registrations")

_HOOKS_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def module_has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes through the module; also where torch does not tell."""
    return any(getattr(module, name, True) for name in _HOOKS_OF_MODULES)


class HookDetector(TorchFunctionMode):
    """Finds out whether hooks compute something while the engine runs: hooks on tensors and on nodes, before a node and
    after it, whether or not the tensor is still alive.

    Autograd's own nodes are C++, so that Python code which calls torch during a pass is a hook, or the backward pass of
    a `torch.autograd.Function`; the latter is known by its code. A hook that calls nothing of torch is not found: it
    can look on, or replace a gradient by a tensor that it has from elsewhere.

    The engine is to be called by one function, which the body of the `with` calls.

    Args:
        nodes: those of the graph that the engine will go through.

    Attributes:
        found: whether a hook has called torch.
    """

    def __init__(self, nodes: Iterable[Any]) -> None:
        super().__init__()
        self.found = False
        self._backward = set(_code_of_backward(functions_of(nodes)))
        self._caller: FrameType | None = None

    def __enter__(self) -> HookDetector:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._caller = sys._getframe(1)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._caller = None  # the frame holds this object, and a cycle would keep the graph
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.found = self.found or self._called_by_a_hook()
        return func(*args, **(kwargs or {}))

    def _called_by_a_hook(self) -> bool:
        entered = None  # the frame that the engine has called
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_back is not self._caller:  # below is the frame that has called the engine
            if frame.f_code in self._backward:
                return False
            entered, frame = frame, frame.f_back
        return entered is None or not entered.f_globals.get("__name__", "").startswith(_OPERATORS_IN_PYTHON)


def _code_of_backward(functions: Iterable[Any]) -> Iterable[CodeType]:
    for function in map(function_class, functions):
        for name in ("backward", "vjp"):
            # A decorator's own code is shared with everything else that it decorates.
            code = getattr(inspect.unwrap(getattr(function, name, None)), "__code__", None)  # type: ignore[arg-type]
            if code is not None:
                yield code
