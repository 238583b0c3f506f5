"""Backward passes through one recorded graph, again and again: by autograd's engine, or by our own pass where that is
faster and the engine agrees."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.gradient_sums import Edge
from auxfast.autograd.graph import filled, vjp
from auxfast.autograd.graph_pass import Graph, GraphPass

Gradients = Sequence[Tensor | None]
_FEWEST_NUMBERS = 1 << 13  # in outputs and inputs; with fewer, three products do not make up for looking at the graph
_FEWEST_TOGETHER = 4  # vectors; preparing fewer for one pass costs more than it saves
_TOGETHER_BYTES = 1 << 21  # of one tensor for all vectors
_MOST_STRUCTURES = 128  # of which plans are kept: 1 KB a node


class _Plan:
    """Passes through graphs of one structure to the same inputs."""

    agrees: bool | None = None
    """Whether the engine does; not known yet."""

    def __init__(self) -> None:
        self.idle: list[GraphPass] = []


_Plans = dict[tuple[bool, tuple[Edge, ...]], _Plan]  # by whether it is for several vectors, and inputs
_known: dict[Hashable, _Plans] = {}  # by structure


class OneAtATime(Exception):
    """The graph is not to be gone through for several vectors at once."""


class Pullback:
    """`vectors^T d outputs / d inputs` of a retained graph; `None` for an input that plays no part.

    Our own pass (`GraphPass`) takes about 0.7 of the engine's time in MLPs, and less with large weights. It is compared
    with the engine's in the first graph of each structure. Hooks that change gradients are one reason why they may
    differ; the engine is then asked about all graphs of that structure. (A hook that does so only at times, and leaves
    no trace in the graph of a gradient, may go unnoticed.)

    Args:
        outputs, inputs: tensors of the graph.
        other: a pullback from the same outputs, which has looked through the graph.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], other: Pullback | None = None) -> None:
        self._outputs, self._inputs, self._other = outputs, inputs, other

    def __call__(self, vectors: Sequence[Tensor]) -> Gradients:
        if not self._outputs:
            return [None] * len(self._inputs)
        if self._single is not None:
            gradients = self._single(vectors)
            if gradients is not None:
                return gradients
            self._single = None
        return vjp(self._outputs, self._inputs, vectors)

    def together(self, block: Sequence[Tensor]) -> Gradients:
        """For k lists of vectors: the tensors have one more axis of size k in front.

        Raises:
            OneAtATime: that would not be faster, or the engine does not agree.
        """
        if not self._outputs:
            return [None] * len(self._inputs)
        if len(block[0]) < _FEWEST_TOGETHER or self._block is None:
            raise OneAtATime
        parts = []
        for piece in zip(*(tensor.split(self._at_once) for tensor in block), strict=True):
            gradients = self._block(piece)
            if gradients is None:
                self._block = None
                raise OneAtATime
            parts.append(gradients)
        if len(parts) == 1:
            return parts[0]
        return [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]

    @cached_property
    def _single(self) -> _CheckedPass | None:
        """`None`: the engine is faster, or not slower. Convolutions, whose weights have more than two axes, take so
        long that nothing else counts. Not measured on GPUs."""
        if self._other is not None:
            if self._other._single is None:
                return None
        else:
            numbers = 0
            for tensor in (*self._outputs, *self._inputs):
                if tensor.dim() > 2 or not tensor.is_cpu:
                    return None
                numbers += tensor.numel()
            if numbers < _FEWEST_NUMBERS or torch.is_autocast_enabled("cpu"):
                return None
        return _CheckedPass(self._plans, self._graph, self._outputs, self._inputs, block=False)

    @cached_property
    def _block(self) -> _CheckedPass | None:
        if self._at_once < 8 or torch.is_autocast_enabled(self._inputs[0].device.type):
            return None
        return _CheckedPass(self._plans, self._graph, self._outputs, self._inputs, block=True)

    @cached_property
    def _graph(self) -> Graph:
        return Graph(self._outputs) if self._other is None else self._other._graph

    @cached_property
    def _plans(self) -> _Plans:
        if self._other is not None:
            return self._other._plans
        if len(_known) >= _MOST_STRUCTURES:
            _known.clear()
        return _known.setdefault(self._graph.structure, {})

    @cached_property
    def _at_once(self) -> int:
        """How many vectors are best taken together through the graph.

        Together they save most of the time that autograd and the dispatcher take, and lose to the caches. On a CPU, 8
        vectors were 1.4 to 5 times faster in networks in which no activation had more than 256 KiB, and 0.7 to 1.4
        times as fast in networks of larger ones; large weights do no harm. A GPU's launches leave more room; not
        measured.
        """
        ends = [*self._outputs, *self._inputs]
        weights = {shape for tensor in ends for shape in (tensor.shape, tensor.shape[::-1])}
        shapes = {torch.Size(data.shape) for node in self._graph.nodes for data in node._input_metadata} - weights
        largest = max((shape.numel() for shape in shapes), default=0)
        most = _TOGETHER_BYTES if ends[0].device.type == "cpu" else 32 * _TOGETHER_BYTES
        return most // max(1, largest * ends[0].element_size())


class _CheckedPass:
    """A `GraphPass` of which the engine approves, bound to a graph as long as this object lives."""

    def __init__(
        self, plans: _Plans, graph: Graph, outputs: Sequence[Tensor], inputs: Sequence[Tensor], block: bool
    ) -> None:
        self._outputs, self._inputs, self._block = outputs, inputs, block
        self._pass: GraphPass | None = None
        ends = tuple(map(graph.edge_to, inputs))
        self._plan = plans.setdefault((block, ends), _Plan())
        if self._plan.agrees is None and any(map(_unusual, graph.nodes)):
            self._plan.agrees = False
        if self._plan.agrees is not False:
            try:
                planned = self._idle() or GraphPass(graph, ends, block)
                planned.bind(graph)
                self._pass = planned
            except Exception:  # a graph that was freed, say: the engine will tell
                return

    def _idle(self) -> GraphPass | None:
        try:
            return self._plan.idle.pop()
        except IndexError:
            return None

    def __del__(self) -> None:
        if self._pass is not None:
            self._pass.release()
            self._plan.idle.append(self._pass)

    def __call__(self, vectors: Sequence[Tensor]) -> Gradients | None:
        """`None`: the engine is to be asked."""
        if self._pass is None:
            return None
        try:
            gradients = self._pass(vectors)
        except Exception:  # of somebody's Function under vmap, say. If the graph is to blame, the engine says it again
            self._plan.agrees = bool(self._plan.agrees)  # not known: no
            return None
        return gradients if self._plan.agrees or self._confirmed(vectors, gradients) else None

    def _confirmed(self, vectors: Sequence[Tensor], gradients: Gradients) -> bool:
        """Whether the engine agrees; of several vectors, on a combination. It is asked until vectors that are not zero
        have something to say about every part of the graph."""
        if self._block:
            weights = torch.arange(1, len(vectors[0]) + 1, dtype=vectors[0].dtype, device=vectors[0].device)
            vectors = [torch.tensordot(weights, rows, dims=1) for rows in vectors]
            gradients = [None if rows is None else torch.tensordot(weights, rows, dims=1) for rows in gradients]
        found, expected = (
            filled(each, self._inputs) for each in (gradients, vjp(self._outputs, self._inputs, vectors))
        )
        norms = torch.stack(torch._foreach_norm(expected))
        errors = torch.stack(torch._foreach_norm(torch._foreach_sub(found, expected)))
        agrees = bool((errors <= torch.finfo(norms.dtype).eps ** 0.5 * norms.clamp(min=1e-3 * norms.max())).all())
        if 0 < norms.max() < torch.inf and not (agrees and any(not vector.any() for vector in vectors)):
            self._plan.agrees = agrees
        return agrees


def _unusual(node: Any) -> bool:
    """What is left to the engine: complex numbers, which not all rules conjugate, and nodes whose saved tensors are
    unpacked by hooks. Those of torch.utils.checkpoint ask which pass of the engine they are in; outside of one they
    compute the segment anew for every tensor, and keep it as long as the graph lives."""
    if any(data.dtype.is_complex for data in node._input_metadata):
        return True
    saved = [getattr(node, name) for name in _raw_saved(type(node))]  # type: ignore[arg-type]
    tensors = [item for each in saved for item in (each if isinstance(each, tuple) else (each,))]
    return any(tensor is not None and tensor.unpack_hook is not None for tensor in tensors)


@cache
def _raw_saved(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]
