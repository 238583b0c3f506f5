"""Operators of a graph that have a gradient and no second derivative."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from auxfast.autograd.data_parallel import is_sink
from auxfast.autograd.forward_mode import tangent_of
from auxfast.autograd.graph import function_class, graph_from, reaches

_MISSING = ("::NotImplemented", "::Error")  # the nodes that autograd records in place of a missing derivative
# The second derivatives of this node take the norms that its forward pass saves for constants.
_WRONG = ("WeightNormInterfaceBackward0",)
# The backward passes of these nodes take another way where no graph is recorded: through what the forward pass saves
# for constants, as the factors of a matrix, or, in products, through other branches.
_WRONG_IN_FORWARD_MODE = (
    "CholeskyInverseBackward0",
    "CumprodBackward0",
    "LinalgDetBackward0",
    "LinalgSlogdetBackward0",
    "LinalgSolveExBackward0",
    "ScatterReduceBackward0",
    "TriangularSolveBackward0",
)
_ONCE = once_differentiable(lambda ctx: None).__code__  # the code of every function that this decorator has made


def unproven_functions(functions: Iterable[Any]) -> list[Any]:
    """The nodes of those Functions whose class does not say `twice_differentiable = True`, nor is known to be."""
    return [
        node
        for node in functions
        if not (getattr(function_class(node), "twice_differentiable", False) or is_sink(node))
    ]


def wrong_double_backward(nodes: Iterable[Any], params: Sequence[Tensor]) -> list[str]:
    """Names of the nodes on the way to `params` whose second derivatives torch is known to get wrong, without an
    error. First derivatives, as those in outer parameters, are right."""
    return _named(_WRONG, nodes, params)


def wrong_forward_over_backward(nodes: Iterable[Any], params: Sequence[Tensor]) -> list[str]:
    """Names of the nodes on the way to `params` through whose backward passes torch is known to lose tangents, without
    an error."""
    return _named(_WRONG_IN_FORWARD_MODE, nodes, params)


def _named(kinds: Sequence[str], nodes: Iterable[Any], params: Sequence[Tensor]) -> list[str]:
    found = [node for node in nodes if type(node).__name__ in kinds]
    return sorted({node.name() for node in found if reaches(node, params)})


class DetachedFunctionDetector:
    """Finds the `torch.autograd.Function`s that drop out of the graph while a gradient is recorded: second derivatives
    through them would be zeros without a word.

    Either `once_differentiable` says so (autograd's own error is met only by those who ask for every input), or it
    shows: a backward pass is linear in what comes in, so if that has a graph and what goes out is not zero and has
    none, it was computed outside of autograd. A Function whose class says `twice_differentiable = True` is believed.
    Where torch does not tell the class, every nonzero gradient without a graph counts, and every one that ends in an
    error.

    Attributes:
        names: of the nodes that were found.
    """

    def __init__(self, functions: Iterable[Any]) -> None:
        self.names: list[str] = []
        self._handles = [node.register_hook(self._hook(node)) for node in unproven_functions(functions)]

    def __enter__(self) -> DetachedFunctionDetector:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, node: Any) -> Callable[..., None]:
        name, function = node.name(), function_class(node)
        once = function is not None and getattr(function.backward, "__code__", None) is _ONCE

        def hook(outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> None:
            if function is None:
                found = any(map(_is_detached, outgoing)) or any(map(_ends_in_an_error, outgoing))
            else:
                has_graph = any(grad is not None and grad.requires_grad for grad in incoming)
                found = once or (has_graph and any(map(_is_detached, outgoing)))
            if found:
                self.names.append(name)

        return hook


class LostTangentDetector:
    """Finds the `torch.autograd.Function`s whose backward passes lose the tangents of forward-mode AD: the gradient
    that comes in has one, and what goes out is not zero and has none.

    Attributes:
        names: of the nodes that were found.
    """

    def __init__(self, functions: Iterable[Any]) -> None:
        self.names: list[str] = []
        self._handles = [node.register_hook(self._hook(node.name())) for node in unproven_functions(functions)]

    def __enter__(self) -> LostTangentDetector:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> None:
            has_tangent = any(tangent_of(grad) is not None for grad in incoming)
            if has_tangent and any(map(_has_lost_its_tangent, outgoing)):
                self.names.append(name)

        return hook


def _is_detached(gradient: Tensor | None) -> bool:
    return gradient is not None and not gradient.requires_grad and bool(gradient.any())


def _has_lost_its_tangent(gradient: Tensor | None) -> bool:
    return gradient is not None and tangent_of(gradient) is None and bool(gradient.any())


def _ends_in_an_error(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.grad_fn is not None and gradient.grad_fn.name().endswith(_MISSING)


def without_double_backward(loss: Tensor, params: Sequence[Tensor], error: RuntimeError) -> list[str]:
    """Names of the nodes of `loss`'s graph (retained) that have a gradient and no second derivative, for which a pass
    has raised `error`. Empty where they cannot be found."""
    missing = re.search(r"derivative for '?(?:aten::)?(\w+)'? is not implemented", str(error))
    words = missing[1].split("_") if missing else ()
    raising = "".join(word.capitalize() for word in words) + "Backward0"  # autograd's name for the node that has raised
    names: set[str] = set()

    def hook_of(name: str) -> Callable[..., None]:
        def hook(outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> None:
            passed_on = {grad.grad_fn for grad in incoming if grad is not None}
            made = [grad for grad in outgoing if grad is not None and grad.grad_fn not in passed_on]
            if any(_ends_in_an_error(grad) or (grad.grad_fn and grad.grad_fn.name() == raising) for grad in made):
                names.add(name)

        return hook

    handles = [node.register_hook(hook_of(node.name())) for node in graph_from([loss.grad_fn]) if node.next_functions]
    try:
        torch.autograd.grad(loss, params, retain_graph=True, create_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(names)
