"""A backward pass through a recorded graph for several vectors at once.

`torch.vmap` around autograd's engine does that for any graph, and is hardly faster than one pass after another where
matrix products matter: its rule for `mm` copies transposed operands, and each sum of gradients is a new tensor, cold in
the caches. Here the nodes of the graph are called from Python, on tensors whose first axis is that of the vectors.
Matrix products need no copies, sums are taken in place, nodes that only transpose are not called at all, pointwise ones
take the longer tensors as they are, and all others have vmap's rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from auxfast.implicit.graph import graph_from

Gradients = Sequence[Tensor | None]
_Edge = tuple[Any, int]  # a node and the number of one of its inputs
_Wanted = Mapping[int, Tensor | None]
_Rule = Callable[..., Gradients]
"""`rule(node, wanted, *gradients)`: the gradients of the node's inputs, or `None`. `wanted` has the numbers of those
that will be used, with `None` or a sum to which a rule may add instead of returning it. A `torch.autograd.Function` may
bring its own rule, as `block_backward`."""


_TOGETHER_BYTES = 1 << 21  # of one tensor for all vectors


def vectors_together(gradients: Sequence[Tensor], params: Sequence[Tensor]) -> int:
    """How many vectors are best taken together through the graph of `gradients` in `params`; 1: one after another.

    Together they save most of the time that autograd and the dispatcher take, and lose to the caches. On a CPU, 8
    vectors were 1.4 to 5 times faster in networks in which no activation had more than 256 KiB, and 0.7 to 1.4 times as
    fast in networks of larger ones; large weights do no harm. A GPU's launches leave more room; not measured.
    """
    most = _TOGETHER_BYTES if gradients[0].device.type == "cpu" else 32 * _TOGETHER_BYTES
    weights = {shape for w in params for shape in (w.shape, w.shape[::-1])}
    nodes = graph_from(gradient.grad_fn for gradient in gradients)
    shapes = {torch.Size(data.shape) for node in nodes for data in node._input_metadata} - weights
    largest = max((shape.numel() for shape in shapes), default=0)
    together = most // max(1, largest * gradients[0].element_size())
    return together if together >= 8 else 1


class _Target(NamedTuple):
    """Where one of a node's results goes. A slot holds what has come in so far at one input of a node."""

    result: int
    shape: torch.Size  # for one vector
    dtype: torch.dtype
    slot: int
    transposed: bool


class _Step(NamedTuple):
    node: Any
    rule: _Rule
    sources: list[int]  # slots
    targets: list[_Target]


class BlockPass:
    """`vectors^T d outputs / d inputs` of a retained graph, for k lists of vectors at once.

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
            return edge[0].name() == "TBackward0" and edge not in ends

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
                self._steps.append(_Step(node, _rule_of(node), [slots[edge] for edge in sources], targets))

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

        def take(node: Any, rule: _Rule, sources: list[int], targets: list[_Target]) -> None:
            incoming = [sums[slot] for slot in sources]
            first = incoming[0]
            if first is None and all(gradient is None for gradient in incoming):
                return
            for slot in sources:
                if slot in ends:
                    ours[slot] = False
                else:
                    sums[slot] = None
            results = rule(node, {target.result: sum_of_ours(target) for target in targets}, *incoming)
            new = rule in _IN_NEW_MEMORY or (rule in _VIEWS and ours[sources[0]])
            handed_on = [result is first for result in results]
            incoming.clear()
            first = None  # so that the sums find its memory, still in the caches
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
    zero = _ZERO.get(node.name())
    return [(None, 0) if i == zero else edge for i, edge in enumerate(node.next_functions)]


def _sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Over the axes that broadcasting had added or stretched, as the engine does."""
    added = [*range(1, gradient.dim() - len(shape))]
    gradient = gradient.sum(added) if added else gradient
    return gradient if gradient.shape[1:] == shape else gradient.sum_to_size(gradient.shape[0], *shape)


def _rule_of(node: Any) -> _Rule:
    own: _Rule | None = getattr(getattr(type(node), "_forward_cls", None), "block_backward", None)
    return own or _RULES.get(node.name(), _mapped)


def _mapped(node: Any, wanted: _Wanted, *gradients: Tensor | None) -> Gradients:
    """`torch.vmap` of any node. Its own frames of Python take 60 us a call."""
    size = next(gradient.shape[0] for gradient in gradients if gradient is not None)
    level = _functorch._vmap_increment_nesting(size, "error")
    try:
        given = [None if g is None else _functorch._add_batch_dim(g, 0, level) for g in gradients]
        in_python = isinstance(node, BackwardCFunction)
        results = node.apply(*map(_or_zeros, given, node._input_metadata)) if in_python else node(*given)
        results = results if isinstance(results, tuple) else (results,)
        return [None if r is None else _functorch._remove_batch_dim(r, level, size, 0) for r in results]
    finally:
        _functorch._vmap_decrement_nesting()


def _or_zeros(gradient: Tensor | None, data: Any) -> Tensor:
    """As the engine fills in for a node that was written in Python."""
    if gradient is not None:
        return gradient
    return torch.zeros(tuple(data.shape), dtype=data.dtype, device=data.device)


def _pointwise(node: Any, wanted: _Wanted, *gradients: Tensor | None) -> Gradients:
    results = node(*gradients)
    return results if isinstance(results, tuple) else (results,)


def _threshold(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    return (torch.ops.aten.threshold_backward(gradient, node._saved_self, node._saved_threshold),)


def _log_softmax(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    y = node._saved_result
    axis = _axes([node._saved_dim], y.shape)
    return (gradient - y.exp() * gradient.sum(axis, keepdim=True),)


def _log_softmax_backward(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    """Of `h - exp(y) sum(h)` in h and y."""
    h, y = node._saved_grad_output, node._saved_output
    axis, weighted = _axes([node._saved_dim], y.shape), gradient * y.exp()
    return (
        gradient - weighted.sum(axis, keepdim=True) if 0 in wanted else None,
        -weighted * h.sum(axis, keepdim=True) if 1 in wanted else None,
    )


def _sum(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    shape = [*node._saved_self_sym_sizes]
    kept = shape[:]
    for axis in _axes(node._saved_dim, shape):
        kept[axis] = 1
    return (gradient.reshape(gradient.shape[0], *kept).expand(-1, *shape),)


def _axes(saved: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Counted from the last, so that one more in front makes no difference. Nodes save them as unsigned numbers."""
    return [axis - len(shape) if axis < len(shape) else axis - (1 << 64) for axis in saved]


def _view(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    return (gradient.reshape(gradient.shape[0], *node._saved_self_sym_sizes),)


def _transpose(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    return (gradient.mT,)


def _mm(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    """Of `a @ b`."""
    a_columns, b_columns = map(_by_columns, (node._saved_self_sym_strides, node._saved_mat2_sym_strides))
    return (
        _product(gradient, node._saved_mat2.mT, a_columns, wanted[0]) if 0 in wanted else None,
        _product(node._saved_self.mT, gradient, b_columns, wanted[1]) if 1 in wanted else None,
    )


def _addmm(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    """Of `beta c + alpha a @ b`."""
    alpha, beta = node._saved_alpha, node._saved_beta
    scaled = gradient if alpha == 1 else gradient * alpha
    a_columns, b_columns = map(_by_columns, (node._saved_mat1_sym_strides, node._saved_mat2_sym_strides))
    return (
        gradient if beta == 1 else gradient * beta,
        _product(scaled, node._saved_mat2.mT, a_columns, wanted[1]) if 1 in wanted else None,
        _product(node._saved_mat1.mT, scaled, b_columns, wanted[2]) if 2 in wanted else None,
    )


def _by_columns(strides: Sequence[int]) -> bool:
    """A matrix by columns is the transpose of one by rows, and its gradient goes on to that one."""
    return len(strides) > 0 and strides[0] == 1


def _product(a: Tensor, b: Tensor, by_columns: bool, total: Tensor | None) -> Tensor | None:
    """`a @ b` of a matrix and k matrices, without copies; added to `total` if there is one."""
    if by_columns:
        product = _product(b.mT, a.mT, False, None if total is None else total.mT)
        return None if product is None else product.mT
    if a.dim() == 3 and a.is_contiguous() and (total is None or total.is_contiguous()):  # one large product
        k, n, m = a.shape
        if total is None:
            return torch.mm(a.view(k * n, m), b).view(k, n, b.shape[1])
        total.view(k * n, b.shape[1]).addmm_(a.view(k * n, m), b)
        return None
    a, b = (a.expand(b.shape[0], -1, -1), b) if a.dim() == 2 else (a, b.expand(a.shape[0], -1, -1))
    if total is None:
        return torch.bmm(a, b)
    total.baddbmm_(a, b)
    return None


_RULES: dict[str, _Rule] = {
    "AddmmBackward0": _addmm,
    "LogSoftmaxBackward0": _log_softmax,
    "LogSoftmaxBackwardDataBackward0": _log_softmax_backward,
    "MmBackward0": _mm,
    "SumBackward1": _sum,
    "TBackward0": _transpose,
    "ThresholdBackwardBackward0": _threshold,
    "ViewBackward0": _view,
} | dict.fromkeys(
    [
        *("AbsBackward0", "AddBackward0", "DivBackward0", "ExpBackward0", "LogBackward0", "MulBackward0"),
        *("NegBackward0", "ReluBackward0", "SigmoidBackward0", "SigmoidBackwardBackward0", "SqrtBackward0"),
        *("SubBackward0", "TanhBackward0", "TanhBackwardBackward0"),
    ],
    _pointwise,
)
_ZERO = {"NllLossBackwardBackward0": 1, "ThresholdBackwardBackward0": 1}  # the number of the result that always is
_IN_NEW_MEMORY = {_addmm, _log_softmax, _log_softmax_backward, _mm, _pointwise, _threshold}
_VIEWS = {_transpose, _view}
