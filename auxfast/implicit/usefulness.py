"""Scores that tell which auxiliary tasks would help: the paper's Proposition 1, for all from one inverse product."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.engine import vjp, zeros_for_none
from auxfast.implicit.arguments import as_tuple, check_one_device
from auxfast.implicit.curvature import Hessian, in_widest_dtype, on_one_dtype
from auxfast.implicit.distributed import refuse_params
from auxfast.implicit.free_entries import Free, FreeCurvature, free_masks, project
from auxfast.implicit.losses import LossGraph, check_connected
from auxfast.solvers import MINRES
from auxfast.solvers.base import TRIVIAL, Solver, SolverState, SolveStats, check_solver, checked_solve

_DEFAULT_SOLVER = MINRES()


@dataclass(frozen=True)
class UsefulnessResult:
    """What `auxiliary_usefulness` found."""

    scores: Tensor
    """(num_auxiliaries,): by how much the outer loss falls per unit of each auxiliary's weight; below 0 it rises."""
    normalized_scores: Tensor
    """(num_auxiliaries,): each score divided by the Euclidean norm of its auxiliary's gradient, taken over all free
    entries of those `params` that the main loss's gradient depends on; 0 where that gradient is 0. They do not change
    with an auxiliary's scale, so they compare auxiliaries of different ones."""
    stats: SolveStats


def auxiliary_usefulness(
    outer_loss: Tensor,
    main_loss: Tensor,
    aux_losses: Tensor | Sequence[Tensor],
    params: Iterable[Tensor],
    *,
    free: Free | None = None,
    solver: Solver = _DEFAULT_SOLVER,
    state: SolverState | None = None,
) -> UsefulnessResult:
    """How much each auxiliary loss would help a network that was trained on the main loss alone.

    With the inner loss `main + sum_k phi_k aux_k` and W trained at phi = 0, the outer loss falls at the rate

        score_k = - d outer / d phi_k  =  <d outer / d W, H^-1 d aux_k / d W>,    H = d^2 main / d W^2,

    the inner product of the outer loss's gradient and the Newton update towards the auxiliary (Proposition 1, equation
    5; where that takes the main loss's gradient for the auxiliary's, this is what its proof has before). All scores
    take one solve, and one backward pass for each auxiliary.

    A score is about the outer loss and nothing else. A network that overfits its main loss is helped by whatever
    regularises it: a weight decay, or labels of pure noise, then scores as high as a related task, and rightly so.

    Args:
        outer_loss: one element, on held-out data.
        main_loss: one element, at its minimum in `params`, or near it.
        aux_losses: (num_auxiliaries,), or a sequence of one-element tensors. May share a graph with the other losses.
        params: W, any iterable of tensors on one device.
        free: the entries of `params` that are not held fixed; see `hypergradient`.
        solver: how to apply `H^-1`.
        state: what the solver keeps between calls; see `hypergradient`.

    Raises:
        TypeError: a loss that is not a tensor; or as `hypergradient` does.
        ValueError, RuntimeError: as `hypergradient` does; also for auxiliaries that are none, not scalars, or without a
            graph.
    """
    given = as_tuple("params", params)
    masks = free_masks(free, given, "params")
    active = [w for w in given if w.requires_grad]
    check_one_device("params", active)
    check_solver(solver)
    refuse_params("params", active)
    auxiliaries = _auxiliaries(aux_losses)
    outer, main = _graph("outer_loss", outer_loss), _graph("main_loss", main_loss)
    for graph in (outer, LossGraph("aux_losses", torch.stack([a.reshape(()) for a in auxiliaries]).sum())):
        graph.refuse_functions()  # Hessian looks at `main`
    rhs = outer.gradient(active, retain_graph=True)
    check_connected("outer_loss", rhs)
    hessian = FreeCurvature(on_one_dtype(Hessian(main, active, retain_graph=True)), masks)
    masks = list(compress(masks, hessian.in_system))
    solution: Sequence[Tensor] = ()
    stats = TRIVIAL
    if hessian.params:
        b = in_widest_dtype(zeros_for_none(project(list(compress(rhs, hessian.in_system)), masks), hessian.params))
        solution, stats = checked_solve(solver, hessian, b, state)
    gradients = (project(_gradient(auxiliary, hessian.params), masks) for auxiliary in auxiliaries)
    found = [_score_and_norm(gradient, solution) for gradient in gradients]
    scores, norms = torch.tensor(found, dtype=auxiliaries[0].dtype, device=auxiliaries[0].device).unbind(1)
    return UsefulnessResult(scores, torch.where(norms > 0, scores / norms, 0), stats)


def _graph(name: str, loss: Tensor) -> LossGraph:
    given: Any = loss
    if callable(given) and not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, not a function: pass {name}()")
    return LossGraph(name, loss)


def _auxiliaries(losses: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Scalars, at least one of them with a graph."""
    given: Any = losses
    if isinstance(given, Tensor):
        if given.dim() != 1 or len(given) == 0:
            raise ValueError(f"aux_losses must be (num_auxiliaries,), at least one, got shape {tuple(given.shape)}")
        given = given.unbind()
    elif callable(given):
        raise TypeError("aux_losses must be a tensor or a list of tensors, not a function: pass aux_losses()")
    items = list(given)
    if not items:
        raise ValueError("aux_losses must be (num_auxiliaries,), at least one, got shape (0,)")
    for i, item in enumerate(items):
        if not isinstance(item, Tensor):
            hint = f": pass aux_losses[{i}]()" if callable(item) else ""
            raise TypeError(f"aux_losses must hold tensors, but number {i} is a {type(item).__name__}{hint}")
        if item.numel() != 1:
            raise ValueError(
                f"aux_losses must hold tensors of one element, but number {i} is of shape {tuple(item.shape)}"
            )
    if not any(item.requires_grad for item in items):
        raise ValueError("aux_losses have no graph: they were computed under torch.no_grad(), or from no parameter")
    return items


def _gradient(loss: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not params or not loss.requires_grad:
        return [None] * len(params)
    return vjp([loss], params, [torch.ones_like(loss)])


def _score_and_norm(gradient: Sequence[Tensor | None], solution: Sequence[Tensor]) -> tuple[float, float]:
    """`<gradient, solution>` and the norm of the gradient"""
    pairs = [(grad.double(), x.double()) for grad, x in zip(gradient, solution, strict=True) if grad is not None]
    score = sum(float((grad * x).sum()) for grad, x in pairs)
    return score, math.sqrt(sum(float(grad.square().sum()) for grad, _ in pairs))
