"""How the nodes of a recorded graph take several gradients at once: tensors whose first axis is that of the gradients.

Tied to torch's names for its nodes and what they save. Nodes that are not named here have the rules of `torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd.function import BackwardCFunction

Gradients = Sequence[Tensor | None]
_Wanted = Mapping[int, Tensor | None]
Rule = Callable[..., Gradients]
"""`rule(node, wanted, *gradients)`: the gradients of the node's inputs, or `None`. `wanted` has the numbers of those
that will be used, with `None` or a sum to which a rule may add instead of returning it. A `torch.autograd.Function` may
bring its own rule, as `block_backward`."""


_threshold_backward: Any = torch.ops.aten.threshold_backward.grad_input


def rule_of(node: Any) -> Rule:
    own: Rule | None = getattr(getattr(type(node), "_forward_cls", None), "block_backward", None)
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
        if in_python:  # one for each argument, tensor or not; the graph has edges for tensors
            needed = compress(results, node.needs_input_grad)
            results = [None if edge[0] is None else next(needed) for edge in node.next_functions]
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


def _relu(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    return (_threshold_backward(gradient, node._saved_result, 0, grad_input=gradient),)


def _threshold(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    return (_threshold_backward(gradient, node._saved_self, node._saved_threshold, grad_input=gradient),)


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
    for axis in _axes(node._saved_dim or range(len(shape)), shape) if shape else ():  # no axes: over all
        kept[axis] = 1
    return (gradient.reshape(gradient.shape[0], *kept).expand(-1, *shape),)


def _axes(saved: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Counted from the last, so that one more in front makes no difference. Nodes save them as unsigned numbers."""
    return [axis - len(shape) if axis < len(shape) else axis - (1 << 64) for axis in saved]


def _view(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    return (gradient.reshape(gradient.shape[0], *node._saved_self_sym_sizes),)


def _transpose(node: Any, wanted: _Wanted, gradient: Tensor) -> Gradients:
    return (gradient.mT if gradient.dim() == 3 else gradient,)


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


_RULES: dict[str, Rule] = {
    "AddmmBackward0": _addmm,
    "LogSoftmaxBackward0": _log_softmax,
    "LogSoftmaxBackwardDataBackward0": _log_softmax_backward,
    "MmBackward0": _mm,
    "ReluBackward0": _relu,
    "SumBackward1": _sum,
    "TBackward0": _transpose,
    "ThresholdBackwardBackward0": _threshold,
    "ViewBackward0": _view,
} | dict.fromkeys(
    [
        *("AbsBackward0", "AddBackward0", "DivBackward0", "ExpBackward0", "LogBackward0", "MulBackward0"),
        *("NegBackward0", "SigmoidBackward0", "SigmoidBackwardBackward0", "SqrtBackward0"),
        *("SubBackward0", "TanhBackward0", "TanhBackwardBackward0"),
    ],
    _pointwise,
)
ZERO = {"NllLossBackwardBackward0": 1, "ThresholdBackwardBackward0": 1}  # the number of the result that always is
IN_PLACE = {_relu, _threshold}  # written over the gradient, of which these are given a copy if it is not ours
IN_NEW_MEMORY = {_addmm, _log_softmax, _log_softmax_backward, _mm, _pointwise}
VIEWS = {_transpose, _view}
