"""A backward pass through a recorded graph for several vectors at once.

`torch.vmap` around autograd's engine does that for any graph, and is hardly faster than one pass after another where
matrix products matter: its rule for `mm` copies transposed operands, and each sum of gradients is a new tensor, cold in
the caches. Here the nodes of the graph are called from Python, on tensors whose first axis is that of the vectors.
Matrix products need no copies, sums are taken in place, nodes that only transpose are not called at all, pointwise ones
take the longer tensors as they are, and all others have vmap's rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from auxfast.implicit.block_rules import IN_NEW_MEMORY, IN_PLACE, VIEWS, ZERO, Rule, rule_of
from auxfast.implicit.graph import graph_from

_Edge = tuple[Any, int]  # a node and the number of one of its inputs
_TOGETHER_BYTES = 1 << 21  # of one tensor for all vectors


def vectors_together(gradients: Sequence[Tensor], params: Sequence[Tensor]) -> int:
    """How many vectors are best taken together through the graph of `gradients` in `params`; 1: one after another.

    Together they save most of the time that autograd and the dispatcher take, and lose to the caches. On a CPU, 8
    vectors were 1.4 to 5 times faster in networks in which no activation had more than 256 KiB, and 0.7 to 1.4 times as
    fast in networks of larger ones; large weights do no harm. A GPU's launches leave more room; not measured.
    """
    nodes = graph_from(gradient.grad_fn for gradient in gradients)
    metadata = [data for node in nodes for data in node._input_metadata]
    if any(data.dtype.is_complex for data in metadata):  # which the rules of nodes do not conjugate
        return 1
    if any(map(_unpacks, nodes)):
        return 1
    most = _TOGETHER_BYTES if gradients[0].device.type == "cpu" else 32 * _TOGETHER_BYTES
    weights = {shape for w in params for shape in (w.shape, w.shape[::-1])}
    shapes = {torch.Size(data.shape) for data in metadata} - weights
    largest = max((shape.numel() for shape in shapes), default=0)
    together = most // max(1, largest * gradients[0].element_size())
    return together if together >= 8 else 1


def _unpacks(node: Any) -> bool:
    """Whether hooks unpack what the node saved. Those of torch.utils.checkpoint ask which pass of the engine they are
    in; outside of one they compute the segment anew for every tensor, and keep it as long as the graph lives."""
    saved = [getattr(node, name) for name in _raw_saved(type(node))]  # type: ignore[arg-type]
    tensors = [item for each in saved for item in (each if isinstance(each, tuple) else (each,))]
    return any(tensor is not None and tensor.unpack_hook is not None for tensor in tensors)


@cache
def _raw_saved(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


class _Target(NamedTuple):
    """Where one of a node's results goes. A slot holds what has come in so far at one input of a node."""

    result: int
    shape: torch.Size  # for one vector
    dtype: torch.dtype
    slot: int
    transposed: bool


class _Step(NamedTuple):
    node: Any
    rule: Rule
    sources: list[int]  # slots
    targets: list[_Target]


class BlockPass:
    """`vectors^T d outputs / d inputs` of a retained graph of real numbers, for k lists of vectors at once.

    The nodes run on the current stream, and hooks that were registered on tensors of the graph do not run.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        starts, ends = ([_edge(tensor) for tensor in tensors] for tensors in (outputs, inputs))
        following = {node: _following(node) for node in graph_from(node for node, _ in starts)}
        sorter: TopologicalSorter[Any] = TopologicalSorter()
        for node, edges in following.items():
            sorter.add(node)
            for successor, _ in edges:
                if successor is not None:
                    sorter.add(successor, node)
        order = [*sorter.static_order()]
        leads_on = {node for node, _ in ends}
        for node in reversed(order):
            if any(successor in leads_on for successor, _ in following[node]):
                leads_on.add(node)
        metadata = {(node, i): data for node in order for i, data in enumerate(node._input_metadata)}
        slots = {edge: slot for slot, edge in enumerate(metadata)}

        def only_transposes(edge: _Edge) -> bool:
            return edge[0].name() == "TBackward0" and len(metadata[edge].shape) == 2 and edge not in ends

        def target(result: int, edge: _Edge) -> _Target:
            data, transposed = metadata[edge], False
            while only_transposes(edge):
                edge, transposed = following[edge[0]][0], not transposed
            return _Target(result, torch.Size(data.shape), data.dtype, slots[edge], transposed)

        self._slots = len(slots)
        self._starts = [target(i, edge) for i, edge in enumerate(starts)]
        self._ends = [slots.get(edge, -1) for edge in ends]  # -1: nothing leads there
        self._steps = []
        for node in order:
            targets = [target(i, edge) for i, edge in enumerate(following[node]) if edge[0] in leads_on]
            sources = [(node, i) for i in range(len(node._input_metadata))]
            if targets and not only_transposes(sources[0]):
                self._steps.append(_Step(node, rule_of(node), [slots[edge] for edge in sources], targets))

    @torch.no_grad()
    def __call__(self, block: Sequence[Tensor]) -> list[Tensor | None]:
        """The tensors have one more axis in front, of size k."""
        sums: list[Tensor | None] = [None] * (self._slots + 1)  # one more, for -1
        ends = {*self._ends}
        ours = [False] * self._slots  # nobody else sees this sum's memory: it may be written to

        def add(target: _Target, gradient: Tensor, new: bool) -> None:
            slot = target.slot
            gradient, before = gradient.mT if target.transposed else gradient, sums[slot]
            if before is None:
                sums[slot], ours[slot] = gradient, new
            elif ours[slot]:
                before.add_(gradient)
            else:
                sums[slot], ours[slot] = gradient.add_(before) if new else gradient + before, True

        def sum_of_ours(target: _Target) -> Tensor | None:
            total = sums[target.slot] if ours[target.slot] else None
            return total if total is None or not target.transposed else total.mT

        def take(node: Any, rule: Rule, sources: list[int], targets: list[_Target]) -> None:
            incoming = [sums[slot] for slot in sources]
            first = incoming[0]
            if first is None and all(gradient is None for gradient in incoming):
                return
            for slot in sources:
                if slot in ends:
                    ours[slot] = False
                else:
                    sums[slot] = None
            if rule in IN_PLACE and first is not None:
                incoming[0], first = first if ours[sources[0]] else first.clone(), None
            results = rule(node, {target.result: sum_of_ours(target) for target in targets}, *incoming)
            new = rule in IN_PLACE or rule in IN_NEW_MEMORY or (rule in VIEWS and ours[sources[0]])
            handed_on = [result is first for result in results]
            incoming.clear()  # so that the sums find its memory, still in the caches
            first = None
            for target in targets:
                result = results[target.result]
                if result is not None:
                    summed = result if result.shape[1:] == target.shape else _sum_to(result, target.shape)
                    summed = summed if summed.dtype == target.dtype else summed.to(target.dtype)
                    add(target, summed, summed is not result or (new and not handed_on[target.result]))

        for target, vectors in zip(self._starts, block, strict=True):
            add(target, vectors, new=False)
        with warnings.catch_warnings():  # an operator that vmap has no rule for runs once for each vector, and warns
            warnings.filterwarnings("ignore", "There is a performance drop")
            for step in self._steps:
                take(*step)
        return [sums[slot] for slot in self._ends]


def _edge(tensor: Tensor) -> _Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _following(node: Any) -> list[_Edge]:
    """Without the edge along which nothing but zeros can go."""
    zero = ZERO.get(node.name())
    return [(None, 0) if i == zero else edge for i, edge in enumerate(node.next_functions)]


def _sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Over the axes that broadcasting had added or stretched, as the engine does."""
    added = [*range(1, gradient.dim() - len(shape))]
    gradient = gradient.sum(added) if added else gradient
    return gradient if gradient.shape[1:] == shape else gradient.sum_to_size(gradient.shape[0], *shape)
