"""Parts of a gradient that depend entry by entry on one parameter, such as that of a weight decay: their derivative is
a diagonal, and a product with it one operation, where autograd runs a handful of nodes for each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from auxfast.autograd.batched_backward import Edge, edge_to, result_of, summands
from auxfast.autograd.engine import Output, run_engine
from auxfast.autograd.graph import graph_from
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


class _Inputs:
    """The inputs, as nodes and edges of a graph."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = inputs
        self._leaves = {id(tensor): i for i, tensor in enumerate(inputs) if tensor.grad_fn is None}
        self._results = {edge_to(tensor): i for i, tensor in enumerate(inputs) if tensor.grad_fn is not None}
        self._nodes = {node for node, _ in self._results}

    def only_input(self, edge: Edge, output: Tensor) -> int | None:
        """Index of the one input that the result at `edge`, a term of `output`, depends on, and that entry by entry;
        `None` where it is not so, or not seen to be."""
        if type(edge[0]).__name__ not in _ELEMENTWISE:
            return None
        places: set[int] = set()
        pending, others = [edge[0]], []
        for node in pending:  # the list grows while the loop runs
            if type(node).__name__ not in _ELEMENTWISE:
                others.append(node)
                continue
            for following in node.next_functions:
                place = self._place(following)
                if place is not None:
                    places.add(place)
                elif following[0] is not None and following[0] not in pending:
                    pending.append(following[0])
        if len(places) != 1:
            return None
        (place,) = places
        like = self._inputs[place]
        is_like = (output.shape, output.dtype) == (like.shape, like.dtype) == result_of(edge)
        return place if is_like and not self._are_reached(others) else None

    def _place(self, edge: Edge) -> int | None:
        leaf = self._leaves.get(id(getattr(edge[0], "variable", None)))
        return self._results.get(edge) if leaf is None else leaf

    def _are_reached(self, nodes: Sequence[object]) -> bool:
        return any(
            node in self._nodes or id(getattr(node, "variable", None)) in self._leaves for node in graph_from(nodes)
        )
