"""Scores that tell which auxiliary tasks would help: the paper's Proposition 1, for all from one inverse product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from auxfast.implicit.arguments import as_tuple, check_uniform
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.losses import LossGraph, check_connected
from auxfast.solvers import MINRES
from auxfast.solvers.base import TRIVIAL, Solver, SolverState, SolveStats, check_solver, checked_solve

_DEFAULT_SOLVER = MINRES()


@dataclass(frozen=True)
class UsefulnessResult:
    """What `auxiliary_usefulness` found."""

    scores: Tensor
    """(num_auxiliaries,): by how much the outer loss falls per unit of each auxiliary's weight; below 0 it rises."""
    stats: SolveStats


def auxiliary_usefulness(
    outer_loss: Tensor,
    main_loss: Tensor,
    aux_losses: Tensor | Sequence[Tensor],
    params: Iterable[Tensor],
    *,
    solver: Solver = _DEFAULT_SOLVER,
    state: SolverState | None = None,
) -> UsefulnessResult:
    """How much each auxiliary loss would help a network that was trained on the main loss alone.

    With the inner loss `main + sum_k phi_k aux_k` and W trained at phi = 0, the outer loss falls at the rate

        score_k = - d outer / d phi_k  =  <d outer / d W, H^-1 d aux_k / d W>,    H = d^2 main / d W^2,

    the inner product of the outer loss's gradient and the Newton update towards the auxiliary (Proposition 1, equation
    5; where that takes the main loss's gradient for the auxiliary's, this is what its proof has before). All scores
    take one solve and two backward passes through the auxiliaries, however many there are. To compare auxiliaries of
    different scales, divide each score by the norm of the auxiliary's gradient, or compare their signs.

    Args:
        outer_loss: one element, on held-out data.
        main_loss: one element, at its minimum in `params`, or near it.
        aux_losses: (num_auxiliaries,), or a sequence of one-element tensors. May share a graph with the other losses.
        params: W, any iterable of tensors of one dtype on one device.
        solver: how to apply `H^-1`.
        state: what the solver keeps between calls; see `hypergradient`.

    Raises:
        TypeError, ValueError, RuntimeError: as `hypergradient` does; also for auxiliaries that are none, not scalars,
            or without a graph.
    """
    active = [w for w in as_tuple("params", params) if w.requires_grad]
    check_uniform(active)
    check_solver(solver)
    auxiliaries = _stacked(aux_losses)
    outer, main = LossGraph("outer_loss", outer_loss), LossGraph("main_loss", main_loss)
    rhs = outer.gradient(active, retain_graph=True)
    check_connected("outer_loss", rhs)
    hessian = Hessian(main, active, retain_graph=True)
    scores, stats = torch.zeros_like(auxiliaries), TRIVIAL
    if hessian.params:
        pairs = zip(compress(rhs, hessian.in_system), hessian.params, strict=True)
        b = [torch.zeros_like(w) if grad is None else grad for grad, w in pairs]
        solution, stats = checked_solve(solver, hessian, b, state)
        scores = _directional_derivatives(auxiliaries, hessian.params, solution)
    return UsefulnessResult(scores.detach(), stats)


def _stacked(losses: Tensor | Sequence[Tensor]) -> Tensor:
    """(num_auxiliaries,)"""
    given: Any = losses
    if not isinstance(given, Tensor):
        items = list(given)
        for i, item in enumerate(items):
            if not isinstance(item, Tensor) or item.numel() != 1:
                what = f"of shape {tuple(item.shape)}" if isinstance(item, Tensor) else f"a {type(item).__name__}"
                raise ValueError(f"aux_losses must hold tensors of one element, but number {i} is {what}")
        given = torch.stack([item.reshape(()) for item in items]) if items else torch.zeros(0)
    if given.dim() != 1 or len(given) == 0:
        raise ValueError(f"aux_losses must be (num_auxiliaries,), at least one, got shape {tuple(given.shape)}")
    if not given.requires_grad:
        raise ValueError("aux_losses have no graph: they were computed under torch.no_grad(), or from no parameter")
    result: Tensor = given
    return result


def _directional_derivatives(losses: Tensor, params: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """(num_losses,): the derivative of each along `direction`, by double backward through a cotangent."""
    cotangent = torch.zeros_like(losses, requires_grad=True)
    pulled = torch.autograd.grad(losses, params, cotangent, create_graph=True, retain_graph=True, allow_unused=True)
    reached = [grad is not None for grad in pulled]
    if not any(reached):
        return torch.zeros_like(losses)
    (result,) = torch.autograd.grad(list(compress(pulled, reached)), cotangent, list(compress(direction, reached)))
    return result
