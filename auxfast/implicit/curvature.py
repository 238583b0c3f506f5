"""Products with the second derivatives of the inner loss, from recorded graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import compress
from typing import Any, Protocol

import torch
from torch import Tensor

from auxfast.autograd.double_backward import (
    DetachedFunctionDetector,
    unproven_functions,
    without_double_backward,
    wrong_double_backward,
)
from auxfast.autograd.engine import vjp, zeros_for_none
from auxfast.autograd.graph import graph_from, is_compiled, leaves_into
from auxfast.autograd.pullback import Gradients, Pullback
from auxfast.implicit.arguments import check_independent
from auxfast.implicit.losses import LossGraph, check_connected, times
from auxfast.solvers.space import LOCAL

_WAYS_OUT = {  # by a part of the name of autograd's node
    "Attention": "compute attention within torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    "CudnnRnn": "compute the RNN within torch.backends.cudnn.flags(enabled=False)",
    "EmbeddingBag": "take torch.nn.Embedding, and the sum or mean of its rows, for EmbeddingBag",
    "Cdist": "compute distances as (a[:, None] - b[None]).norm(dim=-1)",
}
KINKS = ("AbsBackward0", "ReluBackward0")
_LAST_WAY_OUT = "pass inner_loss as a function and curvature='finite-difference'"

_Pull = Callable[[Pullback, Sequence[Tensor]], Gradients]
"""`Pullback.__call__`, or `Pullback.batched`."""


class Curvature(Protocol):
    """A symmetric matrix H (n, n), the second derivative of the inner loss or a stand-in for it, as an operator."""

    in_system: list[bool]
    """True for each given parameter that the gradient of the loss depends on. H has only the rows of these."""
    params: list[Tensor]
    """The parameters that are in the system."""

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """`H v`. `vectors` and the result have one tensor for each of `params`, of its shape."""
        ...

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """`H v` for a batch of k vectors: all tensors have one more axis of size k in front."""
        ...

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradient of `<v, d inner / d params>` in each of `outer_params`; `None` where there is no dependence. Call
        this last: it may free the graph."""
        ...


class Hessian:
    """Second derivatives by double backward: the graph of the gradient is recorded once, and every product is one
    backward pass through it.

    Args:
        inner: the loss and its graph.
        params: tensors that it is differentiated in.
        retain_graph: whether to keep the graph when `mixed` is done.
        is_known: whether a graph of the same function was looked at before: what would wait for the device is left out.

    Attributes:
        gradient: that of the loss in each of the given `params`, with its graph; `None` where it does not depend on it.
        pullback: the backward pass through the graph of the gradient; it tells how many vectors went in batches.
        unproven: names of the user's `torch.autograd.Function`s in the graph, whose backward passes need not be the
            derivatives of their forward passes.
        kinked: the leaves that go straight into a function with a kink at 0.
        exact: see `LinearOperator`; all products go through one recorded graph.

    Raises:
        ValueError: the loss depends on none of `params`.
        RuntimeError: the graph was freed, or holds something without second derivatives: code that went through
            `torch.compile`, a Function that is only once differentiable, an operator without a double backward or with
            one that torch gets wrong; or it went through a reentrant checkpoint.
    """

    exact = True

    def __init__(
        self, inner: LossGraph, params: Sequence[Tensor], retain_graph: bool = False, is_known: bool = False
    ) -> None:
        inner.refuse_functions()
        self.unproven = sorted({node.name() for node in unproven_functions(inner.functions)})
        self.kinked = leaves_into(inner.nodes, KINKS)
        if any(map(is_compiled, inner.functions)):
            raise RuntimeError(
                f"{inner.name} was computed with torch.compile, which has no second derivatives: compute it without, "
                "for the outer steps at least (the outer loss may stay compiled), or pass it as a function and "
                "curvature='finite-difference'"
            )
        if wrong := wrong_double_backward(inner.nodes, params):
            raise RuntimeError(
                f"{inner.name} went through {wrong[0]}, torch's weight_norm, whose second derivatives are wrong. "
                f"Compute the weight as g * v / v.norm(dim=1, keepdim=True), or {_LAST_WAY_OUT}."
            )
        with DetachedFunctionDetector(() if is_known else inner.functions) as detached:
            grads = inner.scaled_gradient(params, retain_graph=True, create_graph=True)
        if detached.names:
            raise _missing_derivative(inner.name, detached.names)
        check_connected(inner.name, grads)
        self.in_system = [grad is not None and grad.requires_grad for grad in grads]
        self.params = list(compress(params, self.in_system))
        self._unscaled = partial(times, 1 / inner.scale)
        self.gradient = self._unscaled(grads)
        self._grads = [grad for grad in grads if grad is not None and grad.requires_grad]
        self._inner = inner
        self._retain_graph = retain_graph
        self.pullback = Pullback(self._grads, self.params, symmetric=True)

    def slope(self, vectors: Sequence[Tensor]) -> Tensor:
        """`<v, d inner / d params>`."""
        return slope(vectors, self._grads) / self._inner.scale

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._product(vectors, Pullback.__call__)

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._product(vectors, Pullback.batched)

    def _product(self, vectors: Sequence[Tensor], pull: _Pull) -> list[Tensor]:
        return zeros_for_none(self._unscaled(self._named(pull, self.pullback, vectors)), vectors)

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        if not outer_params or not self._grads:
            return [None] * len(outer_params)
        return self._unscaled(self._named(vjp, self._grads, outer_params, vectors, retain_graph=self._retain_graph))

    def with_mixed(
        self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """`H v` and the mixed product with v, by one backward pass. It keeps the graph."""
        found = self._unscaled(self._named(vjp, self._grads, [*self.params, *outer_params], vectors))
        count = len(self.params)
        return zeros_for_none(found[:count], vectors), found[count:]

    def _named(self, pass_back: Callable[..., Gradients], *args: Any, **options: Any) -> Gradients:
        """What `pass_back` returns. Where an operator has no second derivatives, the error names it."""
        try:
            return pass_back(*args, **options)
        except RuntimeError as error:
            self._inner.explain(error)
            if "not implemented" not in str(error):
                raise
            names = without_double_backward(self._inner.loss, self.params, error)
            raise _missing_derivative(self._inner.name, names or ["an operator"]) from error


class GaussNewton(Hessian):
    """The generalised Gauss-Newton matrix: the Hessian without the second derivatives of the outputs.

    The loss is taken as a function l(z, W) of the outputs z(W) of the network, and of the parameters W where they
    enter it otherwise, as in a weight decay. With J = d (z, W) / d W,

        G = J^T (second derivatives of l in (z, W)) J,

    positive semi-definite if l is convex in (z, W) together (Schraudolph 2002, section 3). A product is a
    Jacobian-vector product `J v`, by double backward through a cotangent, and one backward pass through
    `d l / d (z, W)` and the network. The mixed product is exact, that of the Hessian.

    Raises:
        ValueError: as for `Hessian`; outputs that are none, not in the loss's graph, or computed from one another.
    """

    def __init__(
        self, inner: LossGraph, params: Sequence[Tensor], retain_graph: bool = False, is_known: bool = False
    ) -> None:
        outputs = _check_outputs(inner)
        super().__init__(inner, params, retain_graph, is_known)
        self._cotangents = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        pulled = torch.autograd.grad(
            outputs, self.params, self._cotangents, create_graph=True, retain_graph=True, allow_unused=True
        )
        self._reaches = [grad is not None for grad in pulled]
        self._jacobian = Pullback([grad for grad in pulled if grad is not None], self._cotangents)
        head = inner.scaled_gradient(outputs, retain_graph=True, create_graph=True)
        partial = [*head, *_direct_gradient(inner, outputs, self.params)]
        self._curved = [grad is not None and grad.requires_grad for grad in partial]
        self.pullback = Pullback([grad for grad in partial if grad is not None and grad.requires_grad], self.params)

    def _product(self, vectors: Sequence[Tensor], pull: _Pull) -> list[Tensor]:
        if not any(self._curved):
            return [torch.zeros_like(v) for v in vectors]
        pulled = self._named(pull, self._jacobian, list(compress(vectors, self._reaches)))
        batch = vectors[0].shape[: vectors[0].dim() - self.params[0].dim()]
        tangents = [*zeros_for_none(pulled, [z.expand((*batch, *z.shape)) for z in self._cotangents]), *vectors]
        found = self._named(pull, self.pullback, list(compress(tangents, self._curved)))
        return zeros_for_none(self._unscaled(found), vectors)

    def with_mixed(
        self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        return self(vectors), self._unscaled(self._named(vjp, self._grads, outer_params, vectors))


def _direct_gradient(inner: LossGraph, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor | None]:
    """`d l / d W` with the outputs held fixed: the backward pass ends at them."""
    ends: dict[Any, set[int]] = {}
    for z in outputs:
        ends.setdefault(z.grad_fn, set()).add(z.output_nr)
    nodes = graph_from([inner.loss.grad_fn], {(node, i) for node, indices in ends.items() for i in indices})
    leaves = {id(node.variable) for node in nodes if hasattr(node, "variable")}
    if not any(id(w) in leaves if w.grad_fn is None else w.grad_fn in nodes for w in params):
        return [None] * len(params)

    def stop_at(indices: set[int]) -> Any:
        return lambda grads: tuple(None if i in indices else grad for i, grad in enumerate(grads))

    handles = [node.register_prehook(stop_at(indices)) for node, indices in ends.items()]
    try:
        return inner.scaled_gradient(params, retain_graph=True, create_graph=True)
    finally:
        for handle in handles:
            handle.remove()


def _check_outputs(inner: LossGraph) -> Sequence[Tensor]:
    given: Any = inner.outputs
    if given is None:
        raise ValueError(
            "outputs must be given for curvature='gauss-newton': the tensors of inner_loss's graph where the network "
            "ends and the loss begins, such as the logits"
        )
    if not isinstance(given, Sequence) or not given or not all(isinstance(z, Tensor) for z in given):
        raise TypeError(f"outputs must be a tensor or a list of tensors, not {given!r:.60}")
    for i, z in enumerate(given):
        if z.grad_fn not in inner.nodes:
            raise ValueError(f"outputs[{i}] is not a result in the graph of {inner.name}: was it computed anew?")
    check_independent(outputs=given)
    return given


class _InWidestDtype:
    """A curvature in parameters of several floating dtypes, for vectors of the widest of them: products are taken in
    each parameter's own."""

    def __init__(self, curvature: Curvature) -> None:
        self._curvature = curvature
        self.in_system, self.params = curvature.in_system, curvature.params
        self.space = getattr(curvature, "space", LOCAL)

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return in_widest_dtype(self._curvature(in_dtypes_of(self.params, vectors)))

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return in_widest_dtype(self._curvature.batched(in_dtypes_of(self.params, vectors)))

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        return self._curvature.mixed(in_dtypes_of(self.params, vectors), outer_params)


def on_one_dtype(curvature: Curvature) -> Curvature:
    """`curvature`, for vectors of one dtype, the widest of its parameters."""
    return _InWidestDtype(curvature) if len({w.dtype for w in curvature.params}) > 1 else curvature


def in_widest_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    dtypes = {tensor.dtype for tensor in tensors}
    return [*tensors] if len(dtypes) == 1 else [tensor.to(reduce(torch.promote_types, dtypes)) for tensor in tensors]


def in_dtypes_of(params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    return [vector.to(w.dtype) for w, vector in zip(params, vectors, strict=True)]


def one_by_one(curvature: Curvature, vectors: Sequence[Tensor]) -> list[Tensor]:
    """`Curvature.batched` by a product for each vector."""
    products = [torch.empty_like(tensor) for tensor in vectors]
    for i, row in enumerate(zip(*(tensor.unbind() for tensor in vectors), strict=True)):
        for of_all, of_one in zip(products, curvature(row), strict=True):
            of_all[i] = of_one
    return products


@torch.no_grad()
def slope(vectors: Sequence[Tensor], gradient: Sequence[Tensor]) -> Tensor:
    """`<v, gradient>`, where the gradient may have a graph, and its tensors narrower dtypes."""
    return torch.stack([product.sum() for product in torch._foreach_mul(list(vectors), list(gradient))]).sum()


def _missing_derivative(name: str, nodes: Sequence[str]) -> RuntimeError:
    nodes = [*dict.fromkeys(nodes)]
    ways_out = " and ".join(known_ways_out(nodes))
    ways_out = f"{ways_out}, or {_LAST_WAY_OUT}" if ways_out else _LAST_WAY_OUT
    verb = "have" if len(nodes) > 1 else "has"
    return RuntimeError(
        f"{name} went through {' and '.join(nodes)}, which {verb} no second derivatives. "
        f"{ways_out[0].upper()}{ways_out[1:]}."
    )


def known_ways_out(operators: Sequence[str]) -> list[str]:
    """What to do about those of the operators, named as autograd's nodes are, for which it is known."""
    return [way for operator, way in _WAYS_OUT.items() if any(operator in name for name in operators)]
