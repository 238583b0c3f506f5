"""Parts of a gradient that depend entry by entry on one parameter, such as that of a weight decay: their derivative is
a diagonal, and a product with it one operation, where autograd runs a handful of nodes for each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from auxfast.autograd.batched_backward import Edge, edge_to, result_of, summands
from auxfast.autograd.engine import Output, run_engine
from auxfast.autograd.hooks import HookDetector, has_hook

# Nodes whose results are made entry by entry. Where no others lie between a result and the parameter that it depends
# on, and both have one shape, an entry depends on its own alone: a node that broadcasts makes the shape larger, and
# none of these makes it smaller again.
_ELEMENTWISE = frozenset(
    f"{name}Backward{i}" for name in ("Abs", "Add", "Mul", "Neg", "Pow", "Sgn", "Sub") for i in (0, 1)
)


class Diagonal(NamedTuple):
    """The derivative of a part of an output in an input, of the shape of both."""

    output: int
    input: int
    entries: Tensor


class Split(NamedTuple):
    """Outputs as sums.

    Attributes:
        parts: what is left to the engine.
        outputs: the index of the output that each of them is a part of.
        diagonals: the derivatives of the separable parts.
    """

    parts: Sequence[Output]
    outputs: Sequence[int]
    diagonals: Sequence[Diagonal]


def split(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Split:
    """The `outputs` as their graph shows them. Costs a pass through the separable parts, if there are any: a diagonal
    is its product with ones. Where a hook may act in that pass, all is left to the engine."""
    if not any(type(output.grad_fn).__name__ in _ELEMENTWISE for output in outputs):  # no sums either
        return whole(outputs)
    found = _Inputs(inputs)
    parts: list[tuple[int, Output]] = []
    separable: list[tuple[int, int, GradientEdge]] = []
    for i, output in enumerate(outputs):
        terms = summands(edge_to(output))
        places = [found.only_input(term, output) for term in terms]
        if all(place is None for place in places):
            parts.append((i, output))
            continue
        for term, place in zip(terms, places, strict=True):
            if place is None:
                parts.append((i, GradientEdge(*term)))
            else:
                separable.append((i, place, GradientEdge(*term)))
    diagonals = _diagonals(separable, inputs) if separable else []
    if diagonals is None:
        return whole(outputs)
    return Split([part for _, part in parts], [i for i, _ in parts], diagonals)


def whole(outputs: Sequence[Tensor]) -> Split:
    """The `outputs`, left to the engine."""
    return Split(outputs, range(len(outputs)), ())


def _diagonals(parts: Sequence[tuple[int, int, GradientEdge]], inputs: Sequence[Tensor]) -> list[Diagonal] | None:
    """`None` where a hook acts, and where one pass does not tell them apart."""
    output_of = {place: i for i, place, _ in parts}
    if any(output_of[place] != i for i, place, _ in parts) or any(has_hook(inputs[place]) for place in output_of):
        return None
    ones = [torch.ones_like(inputs[place]) for _, place, _ in parts]
    with HookDetector(()) as hooks:  # no Function of Python runs, since all nodes on the way are autograd's own
        found = run_engine([edge for _, _, edge in parts], [inputs[place] for place in output_of], ones)
    if hooks.found:
        return None
    pairs = zip(output_of.items(), found, strict=True)
    return [Diagonal(i, place, entries) for (place, i), entries in pairs if entries is not None]


_NOTHING, _MORE = -1, -2
"""What is not one input: none of them, and several, or one in another way than entry by entry."""


class _Inputs:
    """The inputs, and which of them the nodes of a graph depend on. Terms share most of their graphs, so each node is
    visited once for all of them."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = inputs
        self._leaves = {id(tensor): i for i, tensor in enumerate(inputs) if tensor.grad_fn is None}
        self._results = {edge_to(tensor): i for i, tensor in enumerate(inputs) if tensor.grad_fn is not None}
        self._known: dict[Any, int] = {}

    def only_input(self, edge: Edge, output: Tensor) -> int | None:
        """Index of the one input that the result at `edge`, a term of `output`, depends on, and that entry by entry;
        `None` where it is not so, or not seen to be."""
        if type(edge[0]).__name__ not in _ELEMENTWISE:
            return None
        if edge[0] not in self._known:
            self._visit(edge[0])
        place = self._known[edge[0]]
        if place in (_NOTHING, _MORE):
            return None
        like = self._inputs[place]
        is_like = (output.shape, output.dtype) == (like.shape, like.dtype) == result_of(edge)
        return place if is_like else None

    def _visit(self, start: Any) -> None:
        """Finds what `start` depends on, depth first, up to the first node that tells that it is `_MORE`."""
        self._known[start] = _NOTHING
        path = [(start, iter(start.next_functions))]  # from `start` on, each node depends on the next
        while path:
            node, edges = path[-1]
            for edge in edges:
                place = self._place(edge)
                if place is None:
                    if edge[0] not in self._known:
                        self._known[edge[0]] = _NOTHING
                        path.append((edge[0], iter(edge[0].next_functions)))
                        break
                    place = self._known[edge[0]]
                self._note(node, place)
            else:
                path.pop()
                if path:
                    self._note(path[-1][0], self._known[node])
            if self._known[node] == _MORE:
                self._known.update((above, _MORE) for above, _ in path)
                return

    def _note(self, node: Any, place: int) -> None:
        """Adds what an edge of `node` leads to."""
        if place != _NOTHING and self._known[node] != place:
            alone = type(node).__name__ in _ELEMENTWISE and self._known[node] == _NOTHING
            self._known[node] = place if alone else _MORE

    def _place(self, edge: Edge) -> int | None:
        """Index of the input at the edge; `_NOTHING` where the edge leads nowhere, `None` where a node is."""
        if edge[0] is None:
            return _NOTHING
        leaf = self._leaves.get(id(getattr(edge[0], "variable", None)))
        return self._results.get(edge) if leaf is None else leaf
