"""A backward pass through a recorded graph, from Python, for one vector or for several at once.

In each of its passes autograd's engine asks the nodes anew for what they saved, turns matrices, and puts most sums of
gradients in new memory; `torch.vmap` around it copies the turned operands besides. Here matrix products need no copies,
sums are taken in place and within the products, and nodes that only transpose are not called at all. A pass is planned
once for all graphs of a structure, such as those of a training's next steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from auxfast.autograd.gradient_sums import BlockSum, Edge, Sum, Target, Transposed
from auxfast.autograd.node_steps import ONE_INPUT, ZERO, Step, step_of


class Graph:
    """That of `outputs`, with numbers for its nodes."""

    nodes: list[Any]
    outputs: tuple[Edge, ...]
    structure: Hashable
    """Equal for graphs of the same nodes, edges and outputs, whatever the tensors are."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        nodes: list[Any] = [*dict.fromkeys(t.grad_fn or get_gradient_edge(t).node for t in outputs)]
        numbers = {node: number for number, node in enumerate(nodes)}
        structure: list[str | int | None] = []
        self.nodes, self._numbers = nodes, numbers
        self._leaves: dict[int, int] = {}
        for node in nodes:  # which grows
            name = node.name()
            structure.append(name)
            for after, i in node.next_functions:
                number = numbers.get(after)
                if number is None and after is not None:
                    number = numbers[after] = len(nodes)
                    nodes.append(after)
                structure.append(number)
                structure.append(i)
            if name == "torch::autograd::AccumulateGrad":
                self._leaves[id(node.variable)] = numbers[node]
        self.outputs = tuple(map(self.edge_to, outputs))
        self.structure = tuple(structure), self.outputs

    def edge_to(self, tensor: Tensor) -> Edge:
        """Where the gradients of the tensor come together."""
        if tensor.is_leaf:
            return self._leaves.get(id(tensor)), 0
        return self._numbers.get(tensor.grad_fn), tensor.output_nr

    def edges(self) -> list[list[Edge]]:
        """Of each node. Those along which nothing but zeros can go lead to `None`."""
        found = []
        for node in self.nodes:
            zero = ZERO.get(node.name())
            edges = enumerate(node.next_functions)
            found.append([(None if i == zero else self._numbers.get(after), nr) for i, (after, nr) in edges])
        return found


class GraphPass:
    """`vectors^T d outputs / d inputs` of a retained graph.

    The nodes run on the current stream, and hooks that were registered on tensors of the graph do not run.

    Args:
        graph: a graph of the structure that the pass is for; the vectors belong to its outputs.
        inputs: the edges to what these are differentiated in.
        block: take k lists of vectors at once: tensors with one more axis of size k in front, in a graph of real
            numbers.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Edge], block: bool) -> None:
        self._block = block
        self._nodes: list[Any] = []  # of the graph at hand
        self._sums: dict[Edge, Sum] = {}
        self._steps: list[tuple[int, Sum, list[Sum], Step]] = []  # a node, the sum of its first input, the others', ...
        self._saved: list[Tensor] = []
        self._versions: list[int] = []
        names, following = [node.name() for node in graph.nodes], graph.edges()
        ends = {edge for edge in inputs if edge[0] is not None}
        leading = {number for number, _ in ends if number is not None and not following[number]}
        order = _order(following)

        def leads_on(edge: Edge) -> bool:
            return edge in ends or edge[0] in leading

        def sum_at(edge: Edge) -> Sum:
            if edge not in self._sums:
                self._sums[edge] = (BlockSum if block else Sum)(self._nodes, edge, edge in ends)
            return self._sums[edge]

        def target(edge: Edge) -> Target:
            if edge[0] is None or edge in ends or names[edge[0]] != "TBackward0":
                return sum_at(edge)
            after = target(following[edge[0]][0])
            return Transposed(after) if isinstance(after, Sum) else after.of

        for number in reversed(order):
            if any(map(leads_on, following[number])):
                leading.add(number)
        self._ends = [sum_at(edge) for edge in inputs]
        self._starts = [target(edge) if leads_on(edge) else None for edge in graph.outputs]
        for number in order:
            name, edges = names[number], following[number]
            if number not in leading or not edges or (name == "TBackward0" and (number, 0) not in ends):
                continue
            node = graph.nodes[number]
            count = 1 if name in ONE_INPUT else len(node._input_metadata)
            first, *others = [sum_at((number, i)) for i in range(count)]
            targets = {i: target(edge) for i, edge in enumerate(edges) if leads_on(edge)}
            self._steps.append((number, first, others, step_of(node, block)(first, targets)))

    def bind(self, graph: Graph) -> None:
        """To a graph of the structure."""
        self._nodes += graph.nodes
        for number, _, _, step in self._steps:
            step.bound = step.bind(self._nodes[number], self._saved)
        self._versions = [tensor._version for tensor in self._saved]

    def release(self) -> None:
        """What belongs to the graph."""
        self._nodes.clear()
        self._saved.clear()
        for _, _, _, step in self._steps:
            step.bound = None
        for total in self._sums.values():
            total.gradient = total.shape = None

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """Raises RuntimeError where the engine would: a tensor that was saved has been written to since."""
        if [tensor._version for tensor in self._saved] != self._versions:
            raise RuntimeError("a tensor that is needed for the pass has been modified by an inplace operation")
        with torch.no_grad():
            return self._run_quietly(vectors) if self._block else self._run(vectors)

    def _run_quietly(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        with warnings.catch_warnings():  # an operator that vmap has no rule for runs once for each vector, and warns
            warnings.filterwarnings("ignore", "There is a performance drop")
            return self._run(vectors)

    def _run(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        try:
            for target, vector in zip(self._starts, vectors, strict=True):
                if target is not None:
                    target.add_fitting(vector, new=False)
            for _, first, others, step in self._steps:
                gradient = first.take()
                if others:
                    gradients = [gradient, *[other.take() for other in others]]
                    if any(gradient is not None for gradient in gradients):
                        step(*gradients)
                elif gradient is not None:
                    step(gradient)
            return [end.gradient for end in self._ends]
        except BaseException:
            for total in self._sums.values():
                total.gradient = None
            raise
        finally:
            for end in self._ends:
                end.gradient = None


def _order(following: Sequence[Sequence[Edge]]) -> list[int]:
    """The nodes, each before all that are behind it."""
    before = [0] * len(following)  # edges that lead to a node
    for edges in following:
        for after, _ in edges:
            if after is not None:
                before[after] += 1
    order = [number for number, count in enumerate(before) if not count]
    for number in order:  # which grows
        for after, _ in following[number]:
            if after is not None:
                before[after] -= 1
                if not before[after]:
                    order.append(after)
    return order
