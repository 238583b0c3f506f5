"""What the nodes of a recorded graph do in a `GraphPass`, with one gradient or with several at once.

Tied to torch's names for its nodes and what they save. With one gradient, nodes that are not named here are called as
autograd's engine calls them; with several, tensors whose first axis is that of the gradients, by the rules of
`torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd.function import BackwardCFunction

from auxfast.autograd.gradient_sums import Sum, Targets

_threshold_backward: Any = torch.ops.aten.threshold_backward.grad_input


class Step:
    """What a node does with the gradients that come in.

    Args:
        source: where the first of them comes from.
        targets: for the gradients of those of its inputs that lead on, by number.
    """

    bound: Any
    """What `bind` returned for the node of the graph at hand."""
    __call__: Callable[..., None]
    """With the gradients that came in, not all of them `None`."""

    def __init__(self, source: Sum, targets: Targets) -> None:
        self.source, self.targets = source, targets

    def bind(self, node: Any, saved: list[Tensor]) -> Any:
        """Reads what the node saved, once for many passes, and appends to `saved` what must not be written to."""
        return node

    def add(self, results: Sequence[Tensor | None]) -> None:
        for i, target in self.targets.items():
            result = results[i]
            if result is not None and not result._is_zerotensor():  # adding one takes 100 us
                target.add(result, new=False)


def step_of(node: Any, block: bool) -> Callable[[Sum, Targets], Step]:
    found = (_STEPS_OF_SEVERAL if block else _STEPS).get(node.name())
    if found is not None:
        return found
    if not isinstance(node, BackwardCFunction):
        return _Mapped if block else _Called
    if hasattr(getattr(type(node), "_forward_cls", None), "backward_outside"):
        return _OwnOfSeveral if block else _Own
    return _MappedPython if block else _CalledPython


class _Mm(Step):
    """Of `a @ b`."""

    A, B = 0, 1  # the numbers of its inputs
    SAVED = "_saved_self", "_saved_mat2"

    def __init__(self, source: Sum, targets: Targets) -> None:
        super().__init__(source, targets)
        self.to_a, self.to_b = targets.get(self.A), targets.get(self.B)

    def bind(self, node: Any, saved: list[Tensor]) -> Any:
        a = b = None
        if self.to_b is not None:
            a = getattr(node, self.SAVED[0]).mH
            saved.append(a)
        if self.to_a is not None:
            b = getattr(node, self.SAVED[1]).mH
            saved.append(b)
        return a, b

    def __call__(self, gradient: Tensor) -> None:
        self.add_products(gradient, *self.bound)

    def add_products(self, gradient: Tensor, a: Tensor, b: Tensor) -> None:
        if self.to_a is not None:
            self.to_a.add_product(gradient, b)
        if self.to_b is not None:
            self.to_b.add_product(a, gradient)


class _Addmm(_Mm):
    """Of `beta c + alpha a @ b`."""

    A, B = 1, 2
    SAVED = "_saved_mat1", "_saved_mat2"

    def bind(self, node: Any, saved: list[Tensor]) -> Any:
        return node._saved_alpha, node._saved_beta, *super().bind(node, saved)

    def __call__(self, gradient: Tensor) -> None:
        alpha, beta, a, b = self.bound
        self.add_products(gradient if alpha == 1 else gradient * alpha, a, b)
        if 0 in self.targets:
            self.targets[0].add(gradient if beta == 1 else gradient * beta, new=beta != 1)


class _Threshold(Step):
    """`gradient` where x > threshold, written over it, or over a copy if others see it."""

    def bind(self, node: Any, saved: list[Tensor]) -> Any:
        saved.append(node._saved_self)
        return saved[-1], node._saved_threshold

    def __call__(self, gradient: Tensor) -> None:
        x, threshold = self.bound
        gradient = gradient if self.source.ours else gradient.clone()
        self.targets[0].add_fitting(_threshold_backward(gradient, x, threshold, grad_input=gradient), new=True)


class _Relu(_Threshold):
    def bind(self, node: Any, saved: list[Tensor]) -> Any:
        saved.append(node._saved_result)
        return saved[-1], 0


class _Called(Step):
    """Any node, with one gradient."""

    def __call__(self, *gradients: Tensor | None) -> None:
        results = self.bound(*gradients)
        self.add(results if isinstance(results, tuple) else (results,))


class _CalledUnary(Step):
    """A node of one input, whose gradient it returns in the input's shape and dtype."""

    def __call__(self, gradient: Tensor) -> None:
        self.targets[0].add_fitting(self.bound(gradient), new=False)


class _CalledPython(Step):
    """Any `torch.autograd.Function`, with one gradient."""

    def __call__(self, *gradients: Tensor | None) -> None:
        self.add(_results_of_python(self.bound, gradients))


def _results_of_python(node: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """A Function has one for each argument, tensor or not; the graph has edges for tensors."""
    results = node.apply(*map(_or_zeros, gradients, node._input_metadata))
    needed = compress(results if isinstance(results, tuple) else (results,), node.needs_input_grad)
    return [None if edge[0] is None else next(needed) for edge in node.next_functions]


def _or_zeros(gradient: Tensor | None, data: Any) -> Tensor:
    """As the engine fills in for a node that was written in Python."""
    if gradient is not None:
        return gradient
    return torch.zeros(tuple(data.shape), dtype=data.dtype, device=data.device)


class _Own(Step):
    """A Function that brings `backward_outside(node, wanted, gradient, several)`, for one gradient or several; `wanted`
    has the numbers of the results that will be used. It may ask the engine about the pass under way in `backward`."""

    SEVERAL = False

    def bind(self, node: Any, saved: list[Tensor]) -> Any:
        return node, type(node)._forward_cls.backward_outside

    def __call__(self, gradient: Tensor) -> None:
        node, backward = self.bound
        self.add(backward(node, self.targets, gradient, self.SEVERAL))


class _OwnOfSeveral(_Own):
    SEVERAL = True


class _Mapped(Step):
    """`torch.vmap` of any node. Its own frames of Python take 60 us a call."""

    def __call__(self, *gradients: Tensor | None) -> None:
        size = next(gradient.shape[0] for gradient in gradients if gradient is not None)
        level = _functorch._vmap_increment_nesting(size, "error")
        try:
            given = [None if g is None else _functorch._add_batch_dim(g, 0, level) for g in gradients]
            results = [None if r is None else _functorch._remove_batch_dim(r, level, size, 0) for r in self.call(given)]
        finally:
            _functorch._vmap_decrement_nesting()
        self.add(results)

    def call(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        results = self.bound(*gradients)
        return results if isinstance(results, tuple) else (results,)


class _MappedPython(_Mapped):
    def call(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return _results_of_python(self.bound, gradients)


class _Pointwise(Step):
    """Nodes that take tensors with one more axis as they are."""

    def __call__(self, gradient: Tensor) -> None:
        results = self.bound(gradient)
        results = results if isinstance(results, tuple) else (results,)
        for i, target in self.targets.items():
            if results[i] is not None:
                target.add(results[i], new=results[i] is not gradient)


class _LogSoftmax(Step):
    def bind(self, node: Any, saved: list[Tensor]) -> Any:
        saved.append(node._saved_result)
        return saved[-1], _axes([node._saved_dim], saved[-1].shape)

    def __call__(self, gradient: Tensor) -> None:
        y, axis = self.bound
        self.targets[0].add(gradient - y.exp() * gradient.sum(axis, keepdim=True), new=True)


class _LogSoftmaxBackward(Step):
    """Of `h - exp(y) sum(h)` in h and y."""

    def bind(self, node: Any, saved: list[Tensor]) -> Any:
        h, y = node._saved_grad_output, node._saved_output
        saved += h, y
        return h, y, _axes([node._saved_dim], y.shape)

    def __call__(self, gradient: Tensor) -> None:
        h, y, axis = self.bound
        weighted = gradient * y.exp()
        if 0 in self.targets:
            self.targets[0].add(gradient - weighted.sum(axis, keepdim=True), new=True)
        if 1 in self.targets:
            self.targets[1].add(-weighted * h.sum(axis, keepdim=True), new=True)


class _Sum(Step):
    def bind(self, node: Any, saved: list[Tensor]) -> Any:
        shape = [*node._saved_self_sym_sizes]
        kept = shape[:]
        for axis in _axes(node._saved_dim or range(len(shape)), shape) if shape else ():  # no axes: over all
            kept[axis] = 1
        return shape, kept

    def __call__(self, gradient: Tensor) -> None:
        shape, kept = self.bound
        self.targets[0].add(gradient.reshape(gradient.shape[0], *kept).expand(-1, *shape), new=False)


def _axes(saved: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Counted from the last, so that one more in front makes no difference. Nodes save them as unsigned numbers."""
    return [axis - len(shape) if axis < len(shape) else axis - (1 << 64) for axis in saved]


class _View(Step):
    def bind(self, node: Any, saved: list[Tensor]) -> Any:
        return node._saved_self_sym_sizes

    def __call__(self, gradient: Tensor) -> None:
        self.targets[0].add(gradient.reshape(gradient.shape[0], *self.bound), new=self.source.ours)


class _Transpose(Step):
    def __call__(self, gradient: Tensor) -> None:
        self.targets[0].add(gradient.mT if gradient.dim() == 3 else gradient, new=self.source.ours)


_PRODUCTS: dict[str, type[Step]] = {
    "AddmmBackward0": _Addmm,
    "MmBackward0": _Mm,
    "ReluBackward0": _Relu,
    "ThresholdBackwardBackward0": _Threshold,
}
_UNARY = [
    *("AbsBackward0", "DivBackward1", "ExpBackward0", "LogBackward0", "MulBackward1", "NegBackward0", "PowBackward0"),
    *("SigmoidBackward0", "SqrtBackward0", "TanhBackward0"),
]
_STEPS = _PRODUCTS | {"ViewBackward0": _CalledUnary} | dict.fromkeys(_UNARY, _CalledUnary)
_STEPS_OF_SEVERAL: dict[str, type[Step]] = {
    **_PRODUCTS,
    "LogSoftmaxBackward0": _LogSoftmax,
    "LogSoftmaxBackwardDataBackward0": _LogSoftmaxBackward,
    "SumBackward1": _Sum,
    "TBackward0": _Transpose,
    "ViewBackward0": _View,
} | dict.fromkeys(
    [
        *("AbsBackward0", "AddBackward0", "DivBackward0", "ExpBackward0", "LogBackward0", "MulBackward0"),
        *("NegBackward0", "SigmoidBackward0", "SigmoidBackwardBackward0", "SqrtBackward0"),
        *("SubBackward0", "TanhBackward0", "TanhBackwardBackward0"),
    ],
    _Pointwise,
)
ZERO = {"NllLossBackwardBackward0": 1, "ThresholdBackwardBackward0": 1}  # the number of the result that always is
ONE_INPUT = {*_STEPS, *_STEPS_OF_SEVERAL}  # nodes of one result, of which one gradient comes in: they need not be asked
