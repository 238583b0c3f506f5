"""One step in place of a solve: where x is known beforehand, what is left are the outer gradient, perhaps after a step
of the inner training, and one mixed product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from auxfast.autograd.engine import zeros_for_none
from auxfast.implicit.batch_curvature import FreshCurvature, MeanCurvature
from auxfast.implicit.central_difference import Grads, minus, moved_by, norm_of
from auxfast.implicit.curvature import Hessian, one_by_one
from auxfast.implicit.derivatives import LossDerivatives
from auxfast.implicit.finite import all_finite, check_finite
from auxfast.implicit.finite_difference import FiniteDifference
from auxfast.implicit.free_entries import Masks, project
from auxfast.implicit.losses import (
    CheckedLoss,
    Loss,
    LossFns,
    LossGraph,
    check_connected,
    gradient_term,
    mean_gradient,
    term_of_whole,
    times,
)
from auxfast.implicit.summed_curvature import SummedCurvature
from auxfast.solvers.known_solution import KnownSolution
from auxfast.solvers.space import LOCAL

_RADIUS = 0.01
"""How far a central difference moves the parameters to each side, in norm: DARTS's choice, and betty's."""


class StepDifference:
    """Second derivatives by one central difference of gradients, `(g(W + e v) - g(W - e v)) / 2e`, `e = 0.01 / |v|`:
    two gradients and no more. Nothing is known of its error, which `FiniteDifference` estimates.

    Args:
        loss_fns: functions that compute the loss of each micro-batch.
        params: tensors that are moved.
    """

    def __init__(self, loss_fns: LossFns, params: Sequence[Tensor]) -> None:
        self._loss_fns = loss_fns
        self.in_system = [True] * len(params)
        self.params = list(params)

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return zeros_for_none(self._along(vectors, self.params), vectors)

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return one_by_one(self, vectors)

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        mixed = self._along(vectors, outer_params)
        if not any(term is not None and bool(term.any()) for term in mixed):  # rare, and the gradient costs a third
            check_connected("inner_loss", mean_gradient(self._loss_fns, self.params))
        return term_of_whole(mixed, self._loss_fns)

    def _along(self, vectors: Sequence[Tensor], wanted: Sequence[Tensor]) -> Grads:
        norm = norm_of(vectors)
        if not math.isfinite(norm):
            check_finite("The solver's solutions", vectors)
        step = _RADIUS / (norm or _RADIUS)  # along a vector of zeros nothing moves
        with moved_by(self.params, vectors, step):
            ahead = mean_gradient(self._loss_fns, wanted)
            torch._foreach_add_([w.data for w in self.params], list(vectors), alpha=-2 * step)
            behind = mean_gradient(self._loss_fns, wanted)
        return times(0.5 / step, minus(ahead, behind))


class OnePass:
    """Recorded second derivatives for a `KnownSolution`: where it multiplies x, the mixed product is taken in the same
    backward pass."""

    def __init__(self, derivatives: Hessian | MeanCurvature | SummedCurvature, outer_params: Sequence[Tensor]) -> None:
        self._derivatives = derivatives
        self._outer_params = outer_params
        self._mixed: list[Tensor | None] | None = None
        self.in_system, self.params = derivatives.in_system, derivatives.params
        self.space = getattr(derivatives, "space", LOCAL)

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        product, self._mixed = self._derivatives.with_mixed(vectors, self._outer_params)
        return product

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._derivatives.batched(vectors)

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        is_zero = self.space.all(not any(bool(v.any()) for v in vectors))
        if self._mixed is None or is_zero:  # what was multiplied was not x = 0
            return self._derivatives.mixed(vectors, outer_params)
        return self._mixed


StepDerivatives = OnePass | StepDifference | FreshCurvature | FiniteDifference


def check_losses(solver: KnownSolution, outer_loss: Loss, inner_loss: Loss) -> None:
    """Raises TypeError where a loss that `solver` evaluates elsewhere than at the present parameters is a tensor."""
    if solver.lookahead_lr and isinstance(outer_loss, Tensor):
        raise TypeError(
            "outer_loss must be a function for a look-ahead, which evaluates it after a step of the inner parameters, "
            "not a tensor: pass one, or take lookahead=False"
        )
    if solver.mixed == "difference" and isinstance(inner_loss, Tensor):
        raise TypeError(
            "inner_loss must be a function for mixed='difference', which evaluates it at other parameters, not a "
            "tensor: pass one, or take mixed='exact'"
        )


def outer_gradient_and_derivatives(
    solver: KnownSolution,
    outer_gradient: Callable[[], Grads],
    recorded: Callable[[], LossDerivatives],
    inner: CheckedLoss,
    params: Sequence[Tensor],
    outer_params: Sequence[Tensor],
    masks: Masks | None,
) -> tuple[Grads, StepDerivatives]:
    """The outer gradients where `solver` wants them, and derivatives of the inner loss as it takes them.

    Args:
        outer_gradient: computes the outer gradients at the parameters as they then are.
        recorded: makes the derivatives that `curvature` names.
    """

    def derivatives() -> LossDerivatives | StepDifference:
        if isinstance(inner, LossGraph) or solver.mixed == "exact" or inner.kind != "functions":
            return recorded()  # a difference of the gradients of two batches tells nothing; fresh ones are then refused
        return StepDifference(inner, params)

    if not solver.lookahead_lr:
        return outer_gradient(), _in_one_pass(derivatives(), outer_params)
    found = derivatives()
    if inner.ranks is not None:
        gradient = inner.ranks.sum_where_any(gradient_term(inner, params, retain_graph=True), params)
    elif isinstance(found, Hessian):
        gradient = found.gradient
    else:
        assert not isinstance(inner, LossGraph)
        gradient = mean_gradient(inner, params)
    moved = gradient if masks is None else project(gradient, masks)
    check_connected("inner_loss", moved)
    used = [w for w, grad in zip(params, moved, strict=True) if grad is not None]
    with moved_by(used, [grad.detach() for grad in moved if grad is not None], -solver.lookahead_lr):
        grads = outer_gradient()
    first = next((grad for grad in grads if grad is not None), None)
    if first is not None and not all_finite([first]):  # what follows checks all, and blames outer_loss
        check_finite("The gradients of inner_loss in inner_params", moved)
    return grads, _in_one_pass(found, outer_params)


def _in_one_pass(derivatives: LossDerivatives | StepDifference, outer_params: Sequence[Tensor]) -> StepDerivatives:
    if isinstance(derivatives, (Hessian, MeanCurvature, SummedCurvature)):
        return OnePass(derivatives, outer_params)
    return derivatives
