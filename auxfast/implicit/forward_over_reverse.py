"""Products with the second derivatives of the inner loss without a graph of its gradient."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from itertools import compress

import torch
from torch import Tensor

from auxfast.autograd.double_backward import LostTangentDetector, unproven_functions, wrong_forward_over_backward
from auxfast.autograd.engine import zeros_for_none
from auxfast.autograd.forward_mode import function_without_tangents, graph_constants, tangent_of, tangents_on
from auxfast.autograd.graph import leaves_into
from auxfast.implicit.curvature import KINKS, known_ways_out, one_by_one
from auxfast.implicit.losses import LossFn, LossGraph, check_connected

_REFUSED = re.compile(r"forward AD with (\S+) that does not support it")  # torch's words


class ForwardOverReverse:
    """Second derivatives of a loss by forward-mode AD through its backward pass, the order of MixFlow-MG (Kemaev et al.
    2025).

    Tangents v are put on the parameters. The loss and its gradient are then computed anew, and the tangent of the
    gradient in W is `H v`, that in the outer parameters the mixed product. Nothing of a graph of the gradient is ever
    made: what is in memory are the activations and their tangents, and the backward pass frees them on its way.

    Args:
        loss_fn: computes the loss.
        params: tensors that it is differentiated in.
        outer_params: tensors that the gradient may depend on, too.
        is_fresh: whether every call takes a batch of its own, and else they give the same loss.

    Attributes:
        unproven, kinked: see `Hessian`.

    Raises:
        ValueError: the loss depends on none of `params`.
        RuntimeError: the loss holds code that went through `torch.compile`, or an operator or a Function without
            forward-mode derivatives, or with some that torch gets wrong.
    """

    def __init__(
        self, loss_fn: LossFn, params: Sequence[Tensor], outer_params: Sequence[Tensor], is_fresh: bool = False
    ) -> None:
        self._loss_fn = loss_fn
        self._outer_params = outer_params
        self._is_known = False
        self.unproven: list[str] = []
        self.kinked: list[Tensor] = []
        self.params = list(params)
        self.in_system = [True] * len(self.params)
        if not is_fresh:  # one batch does not tell of the others
            self._inspect([*params, *outer_params])

    def _inspect(self, moved: Sequence[Tensor]) -> None:
        """Finds the parameters that the gradient depends on: moving all of `moved` gives it a tangent there."""
        with tangents_on(moved, [torch.ones_like(tensor) for tensor in moved]):
            inner = self._computed()
            self.unproven = sorted({node.name() for node in unproven_functions(inner.functions)})
            self.kinked = leaves_into(inner.nodes, KINKS)
            grads = self._gradient(inner, self.params)
            check_connected(inner.name, grads)
            self.in_system = [tangent_of(grad) is not None for grad in grads]
        self.params = list(compress(self.params, self.in_system))

    def record(self, params: Sequence[Tensor]) -> ForwardOverReverse:
        """The same for some of the parameters, for `MeanCurvature` and `FreshCurvature`. It computes nothing."""
        own = {*map(id, self.params)}
        other = copy(self)
        other.in_system = [id(w) in own for w in params]
        other.params = list(compress(params, other.in_system))
        return other

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return zeros_for_none(self._tangents(vectors, self.params), vectors)

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return one_by_one(self, vectors)

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        return self._tangents(vectors, outer_params)

    def with_mixed(
        self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """`H v` and the mixed product with v, by one pass."""
        found = self._tangents(vectors, [*self.params, *outer_params])
        return zeros_for_none(found[: len(vectors)], vectors), found[len(vectors) :]

    def _tangents(self, vectors: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """Tangents of the gradient in `wanted` along `vectors`."""
        with tangents_on(self.params, vectors):
            return [*map(tangent_of, self._gradient(self._computed(), wanted))]

    def _computed(self) -> LossGraph:
        try:
            with graph_constants():
                return self._loss_fn()
        except RuntimeError as error:
            _explain(error)
            raise
        finally:
            torch.clear_autocast_cache()  # its casts of the parameters have tangents

    def _gradient(self, inner: LossGraph, wanted: Sequence[Tensor]) -> list[Tensor | None]:
        detector = None if self._is_known else self._detector(inner)
        try:
            with detector or nullcontext(), graph_constants(in_backward=True):
                grads = inner.gradient(wanted)
        except RuntimeError as error:
            _explain(error)
            raise
        if detector is not None and detector.names:
            raise RuntimeError(
                f"{inner.name} went through {detector.names[0]}, whose backward pass gives a gradient without a "
                "tangent: let it compute with torch, from the gradient that it is given"
            )
        self._is_known = True
        return grads

    def _detector(self, inner: LossGraph) -> LostTangentDetector:
        if wrong := wrong_forward_over_backward(inner.nodes, [*self.params, *self._outer_params]):
            raise RuntimeError(
                f"{inner.name} went through {wrong[0]}, whose derivatives torch gets wrong in forward mode: pass "
                "curvature='hessian'"
            )
        return LostTangentDetector(inner.functions)


def _explain(error: RuntimeError) -> None:
    """Raises RuntimeError with what is to be done, where torch has no forward-mode derivative of something."""
    refused = _REFUSED.search(str(error))
    name = refused[1] if refused else function_without_tangents(error)
    if name is None:
        return
    if "CompiledFunction" in name:
        raise RuntimeError(
            "inner_loss was computed with torch.compile, which has no second derivatives: compute it without, or pass "
            "curvature='finite-difference'"
        ) from error
    remedies = [] if refused else ["give it a jvp"]
    operator = "".join(word.capitalize() for word in name.removeprefix("aten::").split("_"))
    remedies += [*known_ways_out([operator]), "pass curvature='hessian'"]
    raise RuntimeError(
        f"inner_loss went through {name}, which has no forward-mode derivatives: {', or '.join(remedies)}"
    ) from error
