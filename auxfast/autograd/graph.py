"""What a recorded autograd graph tells: its nodes, and which of them has no second derivative."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

_engine: Any = torch.autograd.Variable._execution_engine
_MISSING = ("::NotImplemented", "::Error")  # the nodes that autograd records in place of a missing derivative
_ONCE = once_differentiable(lambda ctx: None).__code__  # what that decorator makes of any function


def graph_from(start: Iterable[Any], until: Collection[tuple[Any, int]] = ()) -> set[Any]:
    """The nodes of a recorded graph from `start` to the leaves, or to the edges (node, input's index) in `until`."""
    seen = {node for node in start if node is not None}
    found = [*seen]
    for node in found:  # which grows
        for edge in node.next_functions:
            if edge[0] is not None and edge[0] not in seen and edge not in until:
                seen.add(edge[0])
                found.append(edge[0])
    return seen


def vjp(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """`vectors^T d outputs / d inputs`: what `torch.autograd.grad` with `allow_unused=True` hands to the engine after
    checks in Python that take an eighth of a small Hessian product. The engine checks shapes and devices itself."""
    gradients: tuple[Tensor | None, ...] = _engine.run_backward(
        tuple(outputs), tuple(vectors), retain_graph, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return gradients


def filled(gradients: Iterable[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """With zeros for `None`."""
    return [torch.zeros_like(t) if grad is None else grad for grad, t in zip(gradients, like, strict=True)]


def functions_of(nodes: Iterable[Any]) -> list[Any]:
    """Those that are `torch.autograd.Function`s."""
    return [node for node in nodes if isinstance(node, BackwardCFunction)]


def is_compiled(function: Any) -> bool:
    return "CompiledFunction" in type(function).__name__


class SilentBreaks:
    """Finds the `torch.autograd.Function`s that drop out of the graph while a gradient is recorded: second derivatives
    through them would be zeros without a word.

    Either `once_differentiable` says so (autograd's own error is met only by those who ask for every input), or it
    shows: a backward pass is linear in what comes in, so if that has a graph and what goes out is not zero and has
    none, it was computed outside of autograd.
    """

    def __init__(self, functions: Iterable[Any]) -> None:
        self.names: list[str] = []
        unknown = [node for node in functions if not getattr(type(node)._forward_cls, "twice_differentiable", False)]
        self._handles = [node.register_hook(self._watch(node)) for node in unknown]

    def __enter__(self) -> SilentBreaks:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, node: Any) -> Any:
        name, once = node.name(), getattr(type(node)._forward_cls.backward, "__code__", None) is _ONCE

        def hook(outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> None:
            if once or (
                any(grad is not None and grad.requires_grad for grad in incoming)
                and any(grad is not None and not grad.requires_grad and bool(grad.any()) for grad in outgoing)
            ):
                self.names.append(name)

        return hook


def without_double_backward(loss: Tensor, params: Sequence[Tensor]) -> list[str]:
    """The names of the nodes of `loss`'s graph (retained) that have a gradient and no second derivative."""
    names: list[str] = []

    def watch(name: str) -> Any:
        def hook(outgoing: Sequence[Tensor | None], incoming: Any) -> None:
            nodes = [grad.grad_fn for grad in outgoing if grad is not None and grad.grad_fn is not None]
            if any(node.name().endswith(_MISSING) for node in nodes):
                names.append(name)

        return hook

    handles = [node.register_hook(watch(node.name())) for node in graph_from([loss.grad_fn]) if node.next_functions]
    try:
        torch.autograd.grad(loss, params, retain_graph=True, create_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(set(names))
