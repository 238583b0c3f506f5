"""Backward passes through one recorded graph for a batch of vectors at once, or for one vector without the engine.

`torch.autograd.grad(..., is_grads_batched=True)` runs the engine under `torch.vmap`, which copies every transposed
operand. Here Python walks the recorded nodes itself: matrix products need no copies, gradients are summed in place and
within the products, and nodes that only transpose do not run at all. A vector alone takes fewer operations than the
engine needs, and no way to the thread of a device and back: on a GPU, the host's work is what small products wait for.

This is the only file that reads what autograd's nodes save (`_saved_*`), which torch may change in any release. It is
an optimisation and no more: whoever uses it compares all of its results with the engine's (see pullback.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from auxfast.autograd.engine import Output
from auxfast.autograd.graph import function_class
from auxfast.autograd.hooks import has_hook

Edge = tuple[Any, int]
"""A node, and the index of the one of its outputs that the gradient belongs to; `None` stands for a constant."""

_enter_vmap: Any
_leave_vmap: Any
_add_batch_axis: Any
_remove_batch_axis: Any
_enter_vmap, _leave_vmap, _add_batch_axis, _remove_batch_axis = (
    getattr(_functorch, name, None)
    for name in ("_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim", "_remove_batch_dim")
)
_warn_of_slow_vmap: Callable[[bool], None] = getattr(
    _functorch, "_set_vmap_fallback_warning_enabled", lambda enabled: None
)
_is_zero: Callable[[Tensor], bool] = getattr(Tensor, "_is_zerotensor", lambda gradient: False)


class BatchingUnsupported(Exception):
    """Why a graph is left to the engine."""


class Accumulator:
    """Sum of the gradients that reach one output of a node.

    Args:
        shape, dtype: of one gradient.
        axes: how many axes they have in front: 1, that of the batch, or 0 in a pass for one vector.
        is_result: whether the sum is one of the pass's results, which stays when it is taken.

    Attributes:
        owned: whether nobody else sees the memory of `value`, so that it may be written to.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, axes: int, is_result: bool) -> None:
        self.shape, self.dtype, self.axes, self.is_result = shape, dtype, axes, is_result
        self.value: Tensor | None = None
        self.owned = False

    def take(self) -> Tensor | None:
        value = self.value
        if self.is_result:
            self.owned = False
        else:
            self.value = None  # so that the next sums find its memory, still in the caches
        return value

    def add(self, gradient: Tensor, owned: bool = False) -> None:
        """Adds `gradient`, in the sum's dtype and summed over the axes that broadcasting had added, as the engine
        does."""
        if gradient.shape[self.axes :] != self.shape:
            gradient, owned = _summed(gradient, self.shape, self.axes), True
        if gradient.dtype != self.dtype:
            gradient, owned = gradient.to(self.dtype), True
        if self.value is None:
            self.value, self.owned = gradient, owned
        elif self.owned:
            self.value.add_(gradient)
        else:
            self.value, self.owned = (gradient.add_(self.value) if owned else gradient + self.value), True

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Adds `a @ b`. One factor is batched, (k, n, m), and the other a matrix, of which there are no copies; in a
        pass for one vector, both are matrices."""
        if not self.axes:
            self._add_product_of_matrices(a, b)
            return
        total = self.value if self.owned else None
        if a.dim() == 3 and a.is_contiguous() and (total is None or total.is_contiguous()):  # one large product
            k, n, m = a.shape
            if total is not None:
                total.view(k * n, b.shape[1]).addmm_(a.view(k * n, m), b)
            else:
                self.add(torch.mm(a.view(k * n, m), b).view(k, n, b.shape[1]), owned=True)
            return
        a, b = (a.expand(len(b), -1, -1), b) if a.dim() == 2 else (a, b.expand(len(a), -1, -1))
        if total is not None:
            total.baddbmm_(a, b)
        else:
            self.add(torch.bmm(a, b), owned=True)

    def _add_product_of_matrices(self, a: Tensor, b: Tensor) -> None:
        if self.value is None:
            self.add(torch.mm(a, b), owned=True)
        elif self.owned:
            self.value.addmm_(a, b)
        else:  # a bias, one row that is repeated, is added by the product's own kernel if it is given as that row
            is_repeated = len(self.value) > 0 and self.value.stride(0) == 0
            total = self.value[0] if is_repeated else self.value
            self.value, self.owned = torch.addmm(total, a, b), True


class TransposedAccumulator:
    """The accumulator behind a node that only transposes. Gradients come as they are before the node, which need not
    run."""

    def __init__(self, transposed: Accumulator) -> None:
        self.transposed = transposed

    def add(self, gradient: Tensor, owned: bool = False) -> None:
        shape, axes = self.transposed.shape[::-1], self.transposed.axes
        if gradient.shape[axes:] != shape:
            gradient, owned = _summed(gradient, shape, axes), True
        self.transposed.add(_transposed(gradient, axes), owned)

    def add_product(self, a: Tensor, b: Tensor) -> None:
        self.transposed.add_product(b.mT, a.mT)


Target = Accumulator | TransposedAccumulator
Targets = Mapping[int, Target]
"""The accumulator of each input of a node that needs a gradient, by the input's index."""
Backward = Callable[..., None]
"""Takes the gradients of a node's outputs, not all of them `None`, and adds to the node's targets."""
Rule = Callable[[Any, Targets, Accumulator], Backward]
"""Makes the backward of a node from the node, its targets, and the accumulator of its first output."""


class BatchedBackward:
    """Products `vectors^T d outputs / d inputs` for a batch of vectors, through a retained graph of real numbers.

    Nodes run on the current stream, and hooks do not run.

    Args:
        outputs, inputs: tensors of the graph.

    Attributes:
        nodes: those of the graph, each before all that its gradients go to.
        activation_size: elements of the largest gradient of a node that has not the shape of an output or an input,
            nor of one transposed; 0 where there is none.

    Raises:
        BatchingUnsupported: complex numbers; a hook that can be seen; saved tensors that are unpacked by hooks, as in
            torch.utils.checkpoint; a torch that lacks what is needed here.
    """

    _axes = 1
    """The axes in front of each gradient."""

    def __init__(self, outputs: Sequence[Output], inputs: Sequence[Tensor]) -> None:
        if not _torch_is_known():
            raise BatchingUnsupported("this torch lacks private names that batched passes need")
        starts, ends = [*map(edge_to, outputs)], [*map(edge_to, inputs)]
        results = set(ends)
        following = _following([node for node, _ in starts])
        self.nodes = _topological(following)
        leading: set[Any] = set()  # the nodes on a path to an input
        for node in reversed(self.nodes):
            for edge in following[node]:
                if edge[0] in leading or edge in results:
                    leading.add(node)
                    break
        metadata = {node: _metadata(node) for node in self.nodes if node in leading}
        metadata.update({node: _metadata(node) for node, _ in ends if node in following and node not in metadata})
        tensors = [tensor for tensor in (*outputs, *inputs) if isinstance(tensor, Tensor)]
        _refuse_hooks(tensors)
        weights = {shape for tensor in tensors for shape in (tensor.shape, tensor.shape[::-1])}
        shapes = {shape for each in metadata.values() for shape, _ in each} - weights
        self.activation_size = max((shape.numel() for shape in shapes), default=0)
        accumulators: dict[Edge, Accumulator] = {}

        def accumulator(edge: Edge) -> Accumulator:
            if edge not in accumulators:
                accumulators[edge] = Accumulator(*metadata[edge[0]][edge[1]], self._axes, edge in results)
            return accumulators[edge]

        def target(edge: Edge) -> Target:  # not recursive: that would be a cycle of references, and keep the graph
            transposed = False
            while edge not in results and type(edge[0]).__name__ == "TBackward0":
                edge, transposed = following[edge[0]][0], not transposed
            return TransposedAccumulator(accumulator(edge)) if transposed else accumulator(edge)

        def targets(edges: Sequence[Edge]) -> dict[int, Target]:
            return {i: target(edge) for i, edge in enumerate(edges) if edge[0] in leading or edge in results}

        self._starts = targets(starts)
        self._steps: list[tuple[Accumulator, list[Accumulator], Backward]] = []
        for node in self.nodes:
            if node in leading and (type(node).__name__ != "TBackward0" or (node, 0) in results):
                _refuse_saved_hooks(node)
                first, *others = [accumulator((node, i)) for i in range(len(metadata[node]))]
                rule = _rule_of(node, 1 + len(others), self._axes)
                self._steps.append((first, others, rule(node, targets(following[node]), first)))
        self._results = [accumulators.get(edge) for edge in ends]
        self._accumulators = [*accumulators.values()]

    @torch.no_grad()
    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """vectors: (k, *shape) for each output. Returns (k, *shape) for each input, `None` for one that plays no
        part."""
        _warn_of_slow_vmap(False)  # an operator that vmap has no rule for runs once for each vector, which is no harm
        try:
            for i, start in self._starts.items():
                start.add(vectors[i])
            for first, others, backward in self._steps:  # few nodes have others, and this is done for every product
                gradient = first.take()
                more = [each.take() for each in others]
                if gradient is not None or any(each is not None for each in more):
                    backward(gradient, *more)
            return [None if result is None else result.value for result in self._results]
        finally:
            _warn_of_slow_vmap(True)
            for each in self._accumulators:
                each.value = None


class SingleBackward(BatchedBackward):
    """The same for one vector at a time, whose tensors have no axis in front. Nodes without a rule of their own run as
    the engine runs them."""

    _axes = 0


def _summed(gradient: Tensor, shape: torch.Size, axes: int) -> Tensor:
    """`gradient`, of `axes` axes and others, summed to `shape` behind them, over those that broadcasting had added or
    stretched."""
    added = [*range(axes, gradient.dim() - len(shape))]
    gradient = gradient.sum(added) if added else gradient
    return gradient if gradient.shape[axes:] == shape else gradient.sum_to_size(*gradient.shape[:axes], *shape)


def _transposed(gradient: Tensor, axes: int) -> Tensor:
    return gradient.mT if gradient.dim() == axes + 2 else gradient


# ----------------------------------------------------------------------------------------------------------- the graph


def edge_to(tensor: Output) -> Edge:
    """The edge at which the gradients of the tensor come together."""
    if isinstance(tensor, GradientEdge):
        return tensor.node, tensor.output_nr
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


# Nodes of which the gradient of one input is always zero, and the index of that input.
_ZERO_INPUT = {"NllLossBackwardBackward0": 1, "ThresholdBackwardBackward0": 1}


def _following(starts: Sequence[Any]) -> dict[Any, list[Edge]]:
    """The outgoing edges of each node; `(None, 0)` where the gradient is always zero."""
    found: dict[Any, list[Edge]] = {}
    pending = [*dict.fromkeys(starts)]
    for node in pending:  # the list grows while the loop runs
        if node in found:
            continue
        zero = _ZERO_INPUT.get(type(node).__name__)
        found[node] = [(None, 0) if i == zero else edge for i, edge in enumerate(node.next_functions)]
        pending += [after for after, _ in found[node] if after is not None]
    return found


def _topological(following: Mapping[Any, Sequence[Edge]]) -> list[Any]:
    """The nodes, each before all that its gradients go to."""
    missing = dict.fromkeys(following, 0)  # edges that lead to a node and were not walked yet
    for edges in following.values():
        for after, _ in edges:
            if after is not None:
                missing[after] += 1
    order = [node for node, count in missing.items() if not count]
    for node in order:  # the list grows while the loop runs
        for after, _ in following[node]:
            if after is not None:
                missing[after] -= 1
                if not missing[after]:
                    order.append(after)
    return order


def _metadata(node: Any) -> list[tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each output of the node."""
    found = []
    for data in node._input_metadata:
        if data.dtype.is_complex:
            raise BatchingUnsupported(f"{node.name()} has complex numbers, which not all rules conjugate")
        found.append((torch.Size(data.shape), data.dtype))
    return found


def result_of(edge: Edge) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and dtype of the result at the edge; `None` where torch does not tell."""
    metadata = getattr(edge[0], "_input_metadata", ())[edge[1] : edge[1] + 1]
    return (torch.Size(metadata[0].shape), metadata[0].dtype) if metadata else None


def summands(edge: Edge) -> list[Edge]:
    """The edges of the terms, where the result at `edge` is a plain sum, or a sum of such; else this edge alone.
    Constants are left out. A sum that occurs again is a term: sums of sums may have 2^depth of them."""
    terms, pending, seen = [], [edge], set()
    while pending:
        edge = pending.pop()
        is_sum = type(edge[0]).__name__ == "AddBackward0" and getattr(edge[0], "_saved_alpha", None) == 1
        if is_sum and edge not in seen:
            seen.add(edge)
            pending += [part for part in edge[0].next_functions if part[0] is not None]
        else:
            terms.append(edge)
    return terms


def _refuse_hooks(tensors: Iterable[Tensor]) -> None:
    if any(map(has_hook, tensors)):
        raise BatchingUnsupported("a tensor of the graph has a hook")


def _refuse_saved_hooks(node: Any) -> None:
    """Refuses saved tensors that hooks unpack. Those of torch.utils.checkpoint ask which pass of the engine they are
    in; outside of one they compute the segment anew for every tensor, and keep it as long as the graph lives."""
    kind: Any = type(node)
    for name in _names_of_raw_saved(kind):
        saved = getattr(node, name)
        for item in saved if isinstance(saved, tuple) else (saved,):
            if item is not None and item.unpack_hook is not None:
                raise BatchingUnsupported(f"{node.name()} has saved tensors that are unpacked by hooks")


@cache
def _names_of_raw_saved(kind: Any) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


@cache
def _torch_is_known() -> bool:
    """Whether this torch has the private names without which a batched pass is not possible, or not safe."""
    with torch.inference_mode(False), torch.enable_grad():
        node = torch.ones((), requires_grad=True).exp().grad_fn
    names = "_input_metadata", "_raw_saved_result", "_saved_result"
    functions = _enter_vmap, _leave_vmap, _add_batch_axis, _remove_batch_axis
    return all(hasattr(node, name) for name in names) and None not in functions


# ------------------------------------------------------------------------------------------------------------ the rules

_RULES: tuple[dict[str, Rule], dict[str, Rule]] = {}, {}
"""The rules of a pass for one vector, and of one for batches, by the name of the node."""


def _register(*names: str, batches_only: bool = False) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for rules in _RULES[batches_only:]:
            rules.update(dict.fromkeys(names, rule))
        return rule

    return register


def _rule_of(node: Any, outputs: int, axes: int) -> Rule:
    if hasattr(function_class(node), "batched_backward"):
        rule: Rule = _own_function if axes else _own_function_of_one
    elif type(node).__name__ in _RULES[axes] and not _is_function(node):
        rule = _RULES[axes][type(node).__name__]
    else:
        return _any_node
    if outputs != 1:
        raise BatchingUnsupported(f"{node.name()} has {outputs} outputs, and its rule is for one")
    return rule


def _saved(node: Any, name: str) -> Any:
    tensor = getattr(node, name)
    _refuse_hooks([tensor])
    return tensor


def _as_tuple(results: Any) -> Sequence[Tensor | None]:
    return results if isinstance(results, (tuple, list)) else (results,)


def _add_all(targets: Targets, results: Sequence[Tensor | None]) -> None:
    for i, target in targets.items():
        result = results[i]
        if result is not None and not _is_zero(result):  # to add a tensor that torch knows to be zero takes 100 us
            target.add(result)


def _any_node(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """A node that has no rule of its own."""
    if not source.axes:
        return _as_it_is(node, targets, source)
    return (_one_by_one if _is_function(node) else _vmapped)(node, targets, source)


def _vmapped(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """Any node of autograd's own, under `torch.vmap` without its frames of Python, which take 60 us a call."""

    def backward(*gradients: Tensor | None) -> None:
        size = next(len(gradient) for gradient in gradients if gradient is not None)
        level = _enter_vmap(size, "error")
        try:
            given = [None if g is None else _add_batch_axis(g, 0, level) for g in gradients]
            results = [None if r is None else _remove_batch_axis(r, level, size, 0) for r in _as_tuple(node(*given))]
        finally:
            _leave_vmap()
        _add_all(targets, results)

    return backward


def _as_it_is(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """A node, or a Function of the user, in a pass for one vector."""
    return lambda *gradients: _add_all(targets, _results_of(node, gradients))


@_register(
    *("NllLossBackward0", "NllLossBackwardBackward0", "NllLoss2DBackward0", "NllLoss2DBackwardBackward0"),
    *("CdistBackward0", "RollBackward0"),
    batches_only=True,
)
def _one_by_one(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """A node that runs once for each vector: the operators that vmap has no rule for, or a wrong one (cdist; roll of a
    number), and Functions of the user, whose Python may keep what it is given."""

    def backward(*gradients: Tensor | None) -> None:
        size = next(len(gradient) for gradient in gradients if gradient is not None)
        rows = [_results_of(node, [None if g is None else g[i] for g in gradients]) for i in range(size)]
        for i, target in targets.items():
            of_input = [row[i] for row in rows]
            present = [result for result in of_input if result is not None]
            if present:
                filled = [torch.zeros_like(present[0]) if result is None else result for result in of_input]
                target.add(torch.stack(filled), owned=True)

    return backward


def _is_function(node: Any) -> bool:
    return isinstance(node, BackwardCFunction)


def _results_of(node: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """What the node returns for each of its edges. A Function gets zeros for `None`, as from the engine, and returns a
    result for each argument, tensor or not, while the graph has edges for tensors."""
    if not _is_function(node):
        return _as_tuple(node(*gradients))
    given = [
        torch.zeros(tuple(data.shape), dtype=data.dtype, device=data.device) if gradient is None else gradient
        for gradient, data in zip(gradients, node._input_metadata, strict=True)
    ]
    needed = [*compress(_as_tuple(node.apply(*given)), node.needs_input_grad)]
    edges = [after is not None for after, _ in node.next_functions]
    if len(needed) != sum(edges):
        raise BatchingUnsupported(f"{node.name()} returned {len(needed)} gradients for {sum(edges)} inputs")
    results = iter(needed)
    return [next(results) if leads_on else None for leads_on in edges]


def _own_function(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """A `torch.autograd.Function` that brings `batched_backward(node, wanted, gradient)`, where `wanted` holds the
    indices of the results that will be used."""
    batched_backward = function_class(node).batched_backward
    return lambda gradient: _add_all(targets, batched_backward(node, targets, gradient))


def _own_function_of_one(node: Any, targets: Targets, source: Accumulator) -> Backward:
    batched_backward = function_class(node).batched_backward

    def backward(gradient: Tensor) -> None:
        results = batched_backward(node, targets, gradient[None])
        _add_all(targets, [None if result is None else result[0] for result in results])

    return backward


@_register("MmBackward0")
def _mm(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """`y = a @ b`: `grad_a = grad @ b^T`, `grad_b = a^T @ grad`."""
    to_a, to_b = targets.get(0), targets.get(1)
    a: Any = None if to_b is None else _saved(node, "_saved_self").mT
    b: Any = None if to_a is None else _saved(node, "_saved_mat2").mT

    def backward(gradient: Tensor) -> None:
        if to_a is not None:
            to_a.add_product(gradient, b)
        if to_b is not None:
            to_b.add_product(a, gradient)

    return backward


@_register("AddmmBackward0")
def _addmm(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """`y = beta c + alpha a @ b`: `grad_c = beta grad`, `grad_a = alpha grad @ b^T`, `grad_b = alpha a^T @ grad`."""
    to_c, to_a, to_b = (targets.get(i) for i in range(3))
    alpha, beta = node._saved_alpha, node._saved_beta
    a: Any = None if to_b is None else _saved(node, "_saved_mat1").mT
    b: Any = None if to_a is None else _saved(node, "_saved_mat2").mT

    def backward(gradient: Tensor) -> None:
        scaled = gradient if alpha == 1 else gradient * alpha
        if to_a is not None:
            to_a.add_product(scaled, b)
        if to_b is not None:
            to_b.add_product(a, scaled)
        if to_c is not None:
            to_c.add(gradient if beta == 1 else gradient * beta, owned=beta != 1)

    return backward


def _masked(x: Tensor, threshold: float, target: Target, source: Accumulator) -> Backward:
    """`grad` where `x > threshold`, written over `grad` unless others see its memory."""
    threshold_backward: Any = torch.ops.aten.threshold_backward

    def backward(gradient: Tensor) -> None:
        if source.owned:
            result = threshold_backward.grad_input(gradient, x, threshold, grad_input=gradient)
        else:
            result = threshold_backward.default(gradient, x, threshold)
        target.add(result, owned=True)

    return backward


@_register("ReluBackward0")
def _relu(node: Any, targets: Targets, source: Accumulator) -> Backward:
    return _masked(_saved(node, "_saved_result"), 0, targets[0], source)


@_register("ThresholdBackwardBackward0")
def _threshold_backward(node: Any, targets: Targets, source: Accumulator) -> Backward:
    return _masked(_saved(node, "_saved_self"), node._saved_threshold, targets[0], source)


@_register(
    *("AbsBackward0", "AddBackward0", "DivBackward0", "ExpBackward0", "LogBackward0", "MulBackward0", "NegBackward0"),
    *("SigmoidBackward0", "SigmoidBackwardBackward0", "SqrtBackward0", "SubBackward0", "TanhBackward0"),
    "TanhBackwardBackward0",
)
def _pointwise(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """Nodes that broadcast over one more axis in front as they are."""

    def backward(gradient: Tensor) -> None:
        results = _as_tuple(node(gradient))
        for i, target in targets.items():
            result = results[i]
            if result is not None:
                target.add(result, owned=result is not gradient)

    return backward


@_register("LogSoftmaxBackward0", batches_only=True)
def _log_softmax(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """`y = log_softmax(x)`: `grad_x = grad - exp(y) sum(grad)`."""
    y = _saved(node, "_saved_result")
    if not y.dim():  # a number has no axis to count from
        return _one_by_one(node, targets, source)
    (axis,) = _from_the_end([node._saved_dim], y.shape)
    softmax = y.detach().exp()
    return lambda grad: targets[0].add(torch.addcmul(grad, softmax, grad.sum(axis, keepdim=True), value=-1), owned=True)


@_register("LogSoftmaxBackwardDataBackward0")
def _log_softmax_backward(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """`r = h - exp(y) sum(h)`: `grad_h = grad - sum(grad exp(y))`, `grad_y = -grad exp(y) sum(h)`."""
    h, y = _saved(node, "_saved_grad_output"), _saved(node, "_saved_output")
    if not y.dim():
        return (_one_by_one if source.axes else _as_it_is)(node, targets, source)
    (axis,) = _from_the_end([node._saved_dim], y.shape)
    softmax, minus_sum = y.detach().exp(), -h.detach().sum(axis, keepdim=True)

    def backward(gradient: Tensor) -> None:
        weighted = gradient * softmax
        if 0 in targets:
            targets[0].add(gradient - weighted.sum(axis, keepdim=True), owned=True)
        if 1 in targets:
            targets[1].add(weighted.mul_(minus_sum), owned=True)

    return backward


@_register("PowBackward0")
def _power(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """`y = x^n`: `grad_x = grad n x^(n - 1)`. Squares, of which losses are made, and what is left of them in the
    gradient are one operation and none."""
    exponent = node._saved_exponent
    if exponent == 1:
        return lambda grad: targets[0].add(grad, owned=source.owned)
    if exponent != 2:
        return _any_node(node, targets, source)
    x = _saved(node, "_saved_self").detach()
    zero = x.new_zeros(())
    return lambda grad: targets[0].add(torch.addcmul(zero, grad, x, value=2), owned=True)


@_register("SumBackward1", batches_only=True)
def _sum(node: Any, targets: Targets, source: Accumulator) -> Backward:
    """`y = sum(x)` over some axes, or over all if none are saved: `grad` is repeated along them."""
    shape = [*node._saved_self_sym_sizes]
    kept = shape[:]
    for axis in _from_the_end(node._saved_dim or range(len(shape)), shape) if shape else ():
        kept[axis] = 1
    return lambda grad: targets[0].add(grad.reshape(len(grad), *kept).expand(-1, *shape))


@_register("ViewBackward0", batches_only=True)
def _view(node: Any, targets: Targets, source: Accumulator) -> Backward:
    shape = node._saved_self_sym_sizes
    return lambda grad: targets[0].add(grad.reshape(len(grad), *shape), owned=source.owned)


@_register("TBackward0")
def _transpose(node: Any, targets: Targets, source: Accumulator) -> Backward:
    return lambda grad: targets[0].add(_transposed(grad, source.axes), owned=source.owned)


def _from_the_end(axes: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Axes counted from the last, so that one more in front makes no difference. Nodes save them as unsigned
    numbers."""
    return [axis - len(shape) if axis < len(shape) else axis - (1 << 64) for axis in axes]
