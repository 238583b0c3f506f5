"""Losses as `hypergradient` takes them: a tensor, a function that computes one, or functions of micro-batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from auxfast.autograd.engine import vjp
from auxfast.autograd.graph import function_class, functions_of, graph_from
from auxfast.autograd.transforms import in_transform_of_torch_func
from auxfast.implicit.distributed import SpreadOverProcesses, refuse_calls

Loss = Tensor | Callable[[], Any] | Sequence[Callable[[], Any]]
"""A scalar, a function of no arguments that computes it, or a sequence of such functions, whose mean it is. For
Gauss-Newton products the functions of the inner loss return `(loss, outputs)`."""


_REENTRANT = (
    "went through a reentrant torch.utils.checkpoint, which hides the parameters inside of it from "
    "torch.autograd.grad: pass use_reentrant=False to checkpoint()"
)
_CHANGED = "modified by an inplace operation"  # autograd's words


class LossGraph:
    """One computed loss with its graph.

    Raises:
        TypeError: it is not a tensor. ValueError: it has more than one element, or no graph. RuntimeError: a transform
            of torch.func is under way.
    """

    def __init__(self, name: str, loss: Loss, outputs: Tensor | Sequence[Tensor] | None = None) -> None:
        given: Any = loss
        if not isinstance(given, Tensor):
            kind = type(given).__name__
            if callable(given):
                raise TypeError(f"{name} must be a tensor of one element, not a {kind}: call it")
            hint = ": combine them into one" if _are_tensors(given) else ""
            raise TypeError(f"{name} must be a tensor, or a function that returns one, not a {kind}{hint}")
        if given.numel() != 1:
            raise ValueError(f"{name} must be a scalar, not of shape {tuple(given.shape)}: take its mean or sum")
        if in_transform_of_torch_func():
            raise RuntimeError(
                f"{name} cannot be used within a transform of torch.func (grad, jvp, ...), which hides its graph: "
                "hypergradients are taken outside of them, and have no derivatives of their own"
            )
        if not given.requires_grad:
            raise ValueError(
                f"{name} has no graph: it was computed under torch.no_grad() or torch.inference_mode(), detached, or "
                "from no parameter"
            )
        self.name = name
        self.loss: Tensor = given
        self.outputs = [outputs] if isinstance(outputs, Tensor) else outputs

    @cached_property
    def nodes(self) -> set[Any]:
        return graph_from([self.loss.grad_fn])

    @cached_property
    def functions(self) -> list[Any]:
        """The nodes that belong to a `torch.autograd.Function`."""
        return functions_of(self.nodes)

    def gradient(
        self, params: Sequence[Tensor], *, retain_graph: bool = False, create_graph: bool = False
    ) -> list[Tensor | None]:
        """Gradients of the loss in each of `params`, `None` where it does not depend on it."""
        if not params:
            return []
        try:
            ones = torch.ones_like(self.loss)
            return list(vjp([self.loss], params, [ones], retain_graph=retain_graph, create_graph=create_graph))
        except RuntimeError as error:
            self.explain(error)
            raise

    def explain(self, error: RuntimeError) -> None:
        """Raises RuntimeError with what is to be done about `error`, which autograd has raised in a pass through the
        graph, if that is known."""
        if "second time" in str(error):
            raise RuntimeError(
                f"The graph of {self.name} was freed before, by backward() or by an earlier hypergradient(). Compute "
                "the loss anew, or let the call that came before keep it with retain_graph=True."
            ) from error
        if _CHANGED in str(error) and "which is output" not in str(error):  # it is no result of an operation
            raise RuntimeError(
                f"{self.name} was computed before the inner step, or another change of parameters or buffers: one that "
                f"its graph needs was {_CHANGED}. Compute {self.name} anew after the step."
            ) from error
        if "add(sparse, dense)" in str(error):
            raise RuntimeError(
                f"{self.name} has a sparse and a dense gradient in the same parameter, which autograd cannot add where "
                "it records second derivatives: pass sparse=False to the embedding"
            ) from error

    def refuse_reentrant_checkpoints(self) -> None:
        """Raises RuntimeError where a part of the graph is a checkpoint whose inside autograd does not see: gradients
        in its parameters would be left out without a word."""
        if any(function_class(node) is CheckpointFunction for node in self.functions):
            raise RuntimeError(f"{self.name} {_REENTRANT}")


def check_connected(name: str, grads: Sequence[Tensor | None]) -> None:
    if all(grad is None for grad in grads):
        raise ValueError(
            f"{name} does not depend on any of inner_params: was something detached on the way, were they replaced "
            "since it was computed, or do all have requires_grad=False?"
        )


def check_call(module: nn.Module) -> None:
    """Raises RuntimeError where a loss calls a module whose gradients would be left out without a word."""
    refuse_calls(module)
    if not torch.is_grad_enabled():  # the graph does not show a reentrant checkpoint whose inputs need no gradient
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
            frame = frame.f_back
        if frame is not None:
            raise _ReentrantCheckpoint


class _ReentrantCheckpoint(RuntimeError):
    """A module was called within one."""


def _are_tensors(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(item, Tensor) for item in given)


LossFn = Callable[[], LossGraph]
"""Computes the loss of a micro-batch anew."""


def as_loss_fns(name: str, loss: Loss, replay: Callable[[Any], Any], with_outputs: bool = False) -> list[LossFn]:
    """Functions that compute the loss of each micro-batch anew. `loss` is not a tensor; `replay` wraps each function of
    the user.

    Raises:
        TypeError: `loss` is neither a function nor a sequence of functions. ValueError: the sequence is empty.
    """
    functions: Any = [loss] if callable(loss) else loss
    if not isinstance(functions, Sequence) or not all(callable(function) for function in functions):
        what = "list of tensors: combine them into one" if _are_tensors(functions) else type(loss).__name__
        raise TypeError(
            f"{name} must be a tensor, a function that returns one, or a list of such functions, not a {what}"
        )
    if not functions:
        raise ValueError(f"{name} is empty: it must hold a function for each micro-batch")
    names = [name if callable(loss) else f"{name}[{i}]" for i in range(len(functions))]
    return [_loss_fn(n, replay(f), with_outputs) for n, f in zip(names, functions, strict=True)]


def _loss_fn(name: str, function: Callable[[], Any], with_outputs: bool) -> LossFn:
    checked = False

    def compute() -> LossGraph:
        nonlocal checked
        torch.clear_autocast_cache()  # it may hold casts of the parameters as they were before they were moved
        try:
            with torch.enable_grad():
                result = function()
        except SpreadOverProcesses as error:
            raise RuntimeError(f"{name} went through {error}") from None
        except _ReentrantCheckpoint:
            raise RuntimeError(f"{name} {_REENTRANT}") from None
        if not with_outputs:
            result = (result, None)
        elif not isinstance(result, tuple) or len(result) != 2:
            what = type(result).__name__
            raise TypeError(f"{name} must return (loss, outputs) for curvature='gauss-newton', not a {what}")
        graph = LossGraph(name, *result)
        if not checked:  # once is enough, and a walk through the graph costs a few percent of its gradient
            graph.refuse_reentrant_checkpoints()
            checked = True
        return graph

    return compute


def mean_gradient(loss_fns: Sequence[LossFn], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradient of the mean loss, accumulated one micro-batch after the other."""
    if not params:
        return []
    total: list[Tensor | None] = [None] * len(params)
    for loss_fn in loss_fns:
        total = add(total, loss_fn().gradient(params))
    return total if len(loss_fns) == 1 else [grad if grad is None else grad / len(loss_fns) for grad in total]


def add(total: Sequence[Tensor | None], terms: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`total + terms`, where `None` is 0. Not in place: autograd may give one tensor to two parameters."""
    return [a if b is None else b if a is None else a + b for a, b in zip(total, terms, strict=True)]
