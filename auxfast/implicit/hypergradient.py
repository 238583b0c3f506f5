"""The hypergradient by the implicit function theorem: the paper's equation 4, and the direct gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.engine import spread, zeros_for_none
from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit.adjoint import solve_adjoint
from auxfast.implicit.advice import missing_dependence, warn_of_no_group
from auxfast.implicit.derivatives import CurvatureName, check_curvature, derivatives_of
from auxfast.implicit.distributed import refuse_params
from auxfast.implicit.finite import all_finite, check_finite
from auxfast.implicit.free_entries import Free
from auxfast.implicit.inner_problem import (
    check_call_of_shards,
    check_inner_loss,
    check_same_call,
    given_loss,
    given_params,
)
from auxfast.implicit.losses import CheckedLoss, Loss, LossGraph, check_connected, check_of, gradient_term
from auxfast.implicit.one_step import check_losses, outer_gradient_and_derivatives
from auxfast.implicit.ranks import ProcessGroup, attempt, ranks_of, together
from auxfast.implicit.sharded_params import Shards, shards_of, whole_params
from auxfast.solvers import DEFAULT_SOLVER
from auxfast.solvers.base import Solver, SolverState, SolveStats, check_solver
from auxfast.solvers.known_solution import KnownSolution


@dataclass(frozen=True)
class HypergradientResult:
    """Gradients aligned with `outer_params`, of their shapes and dtypes, and how the solve went."""

    grads: tuple[Tensor, ...]
    stats: SolveStats
    direct_only: bool = False
    """Whether the solver found nothing better than x = 0: `grads` are then the direct gradients, and no
    hypergradients."""


def hypergradient(
    outer_loss: Loss,
    inner_loss: Loss,
    inner_params: Iterable[Tensor],
    outer_params: Iterable[Tensor],
    *,
    solver: Solver = DEFAULT_SOLVER,
    curvature: CurvatureName = "hessian",
    outputs: Tensor | Sequence[Tensor] | None = None,
    free: Free | None = None,
    state: SolverState | None = None,
    process_group: ProcessGroup | None = None,
    retain_graph: bool = False,
    warn: bool = True,
) -> HypergradientResult:
    """Gradient of `outer_loss(W*(phi), phi)` in `phi`, where `W*(phi)` minimises the inner loss:

        d outer / d phi  -  (d outer / d W) H^-1 (d^2 inner / d W d phi),    H = d^2 inner / d W^2

    with all derivatives taken at the parameters as they are, so it is as good as they are close to `W*`, and
    as the solver is at `H^-1`. Nothing is written to any `.grad`.

    **Losses.** Each of the two is a tensor of one element with its graph; or a function of no arguments that computes
    it; or a list of such functions, or of pairs `(weight, function)`, which stands for their mean: micro-batches,
    evaluated anew for every product, so that no more than the graph of one is in memory (`auxfast.MicroBatches` makes
    the list of a DataLoader). `auxfast.FreshBatches` takes another batch for every product instead. Functions must
    compute everything from the parameters when they are called. They leave no trace in the buffers of modules and in
    torch's random states, and draw the same random numbers (dropout masks) each time within one call; see
    `auxfast.preserved_state`.

    Args:
        outer_loss: depends on `inner_params`, and may depend on `outer_params`, which gives the direct gradient.
        inner_loss: depends on `inner_params` and, to be of any use, on `outer_params`. If both losses are tensors, they
            may share a part of their graph.
        inner_params: `W`, any iterable of tensors, generators included, on one device. If they are of several floating
            dtypes, the system is solved for vectors of the widest. Tensors with `requires_grad=False`, tensors that the
            inner loss does not use, and tensors in which its gradient is constant are no unknowns of the system:
            nothing of `phi` reaches the outer loss through them.
        outer_params: `phi`, any iterable of tensors, of any floating dtypes. These and `inner_params` need
            not be leaves, but none may be computed from another.
        solver: how to apply `H^-1`; by default in about ten products, which leaves the system of most networks at a
            residual of some tenths (see `solvers.DEFAULT_SOLVER`). `MINRES()` goes on to 1e-3, in 100 at most.
            `OneStep`, `SAMA` and `SingleLoop` put one step in its place: nothing is looked for that takes more
            products, and what evaluates a loss at other parameters needs it as a function.
        curvature: "hessian"; "gauss-newton", which takes a positive semi-definite stand-in for it that needs
            fewer operations (see `auxfast.implicit.curvature.GaussNewton`; the mixed derivative stays exact);
            "hessian-jvp", the Hessian by forward-mode AD through the gradient, which takes less memory and more time
            (see `auxfast.implicit.forward_over_reverse.ForwardOverReverse`); or "finite-difference", the Hessian by
            differences of gradients, for operators without second derivatives, which goes through `detach()`, which the
            others hold constant (see `auxfast.implicit.finite_difference.FiniteDifference`). Its error stands in
            `stats.operator_error`. The last two need functions for `inner_loss`.
        outputs: for "gauss-newton", the tensors of `inner_loss`'s graph where the network ends and the loss
            begins, such as the logits. Functions for `inner_loss` return `(loss, outputs)` instead.
        free: which entries of `inner_params` move with `outer_params`: one tensor of torch.bool for each parameter, of
            its shape and on its device, or None where all do. The others are held fixed, as those are that stay at a
            kink (a zero under an L1 penalty: `free=[w != 0]`) or at a bound. `None`: all entries of all are free.
        state: what the solver keeps from one call for the next of a slowly changing problem. It also holds which
            warnings were given.
        process_group: ranks of `torch.distributed` that share the call, such as `torch.distributed.group.WORLD`: each
            passes the losses of its own data, and all get the gradients of the whole losses, the means over all
            weights: pass `MicroBatches`, or pairs `(number of samples, function)`, where parts are unequal, and `[]`
            on a rank without data. A tensor, and a function without a weight, has weight 1. `None`: this process
            alone, and `group.WORLD` is None before `init_process_group()`. With a group, `inner_params` may be those of
            a network that `torch.distributed.fsdp.fully_shard` was applied to: losses are functions that call it, its
            parameters are whole within this call, and each rank has a piece of each of the solver's vectors. See
            `docs/scaling.md`.
        retain_graph: keep the graphs of tensors for further use. Otherwise they are spent: that of `outer_loss` before
            the solve unless `inner_loss` needs a part of it, that of `inner_loss` as far as the last product
            runs through it; what is then left goes with the last reference to `inner_loss`.
        warn: give a RuntimeWarning that says what to do where the solve diverged, met negative curvature, missed the
            solver's `tol`, found nothing better than x = 0, or came out as little more than the identity approximation;
            where no outer parameter plays a part, or none does in the inner loss; where an inner parameter is 0 and
            `abs` or `relu` of it has a kink; where finite differences are too inexact for `tol`, or disagree with
            the recorded graph; and where `process_group` is None before `init_process_group()`, and the environment's
            `WORLD_SIZE` says that several processes run.

    Returns:
        The gradients, zeros (never `None`) for a parameter that plays no part or has `requires_grad=False`,
        and the solver's statistics.

    Raises:
        TypeError: a loss that is neither a tensor nor made of functions that return one, or a tensor where the solver
            needs a function, parameters that are not an iterable of tensors, or a solver that is none or returns
            something else than `Solver.solve` says.
        ValueError: a loss of more than one element or without a graph to the inner parameters; parameters
            that are none, repeated, in both lists, computed from one another, complex, made under
            `torch.inference_mode()`, or (the inner ones) of several devices; DTensors but for inner ones with
            `process_group`; an unknown `curvature`, or `outputs` or `free` that do not fit; ranks that pass different
            settings, parameters or kinds of losses.
        NotImplementedError: inner parameters that something else than `fully_shard` has cut, or that have another dtype
            in forward passes; or a solver (`NotSharded`), `free` or finite differences that do not go with pieces.
        RuntimeError: a graph that was freed before, or holds parameters that have changed since; an inner loss with
            something in it that has no second derivatives (the message names it): code that went through
            `torch.compile`, an attention kernel; a loss that went through a reentrant checkpoint, FSDP,
            SyncBatchNorm in training mode or, without `process_group`, DistributedDataParallel of several processes;
            or another rank has raised, and the message says what.
        NotFiniteError: NaN or inf in the outer loss's gradient, the inner loss's second derivatives, or the mixed ones;
            the message says in which. A FloatingPointError.
    """
    params = given_params(inner_params, outer_params, free, may_be_sharded=True)
    active_outer = params.active_outer
    check_curvature(curvature)
    check_solver(solver)
    if warn:
        warn_of_no_group(process_group, state)
    shards = shards_of(params.active_inner, process_group)
    ranks = ranks_of(process_group, params.inner[0].device) if shards is None else shards.ranks
    if ranks is not None:
        check_same_call(ranks, params, solver, curvature, state, is_sharded=shards is not None)
    elif isinstance(outer_loss, Tensor) or isinstance(inner_loss, Tensor):
        refuse_params("inner_params", params.active_inner)

    computes = not (isinstance(outer_loss, Tensor) and isinstance(inner_loss, Tensor))
    state_guard = preserved_state(warn=warn, check=check_of(ranks)) if computes else nullcontext()
    with whole_params(shards, params.active_inner) as active_inner, together(ranks), state_guard as guard:
        attempt(ranks, partial(_check_losses, solver, outer_loss, inner_loss, curvature, outputs), None)
        if shards is not None:
            attempt(ranks, partial(check_call_of_shards, outer_loss, inner_loss, free, solver, curvature), None)
        given_outer = given_loss("outer_loss", outer_loss, guard, ranks=ranks)
        given_inner = given_loss("inner_loss", inner_loss, guard, outputs, curvature == "gauss-newton", ranks)
        outer_gradient = partial(
            _outer_gradient, given_outer, given_inner, active_inner, active_outer, retain_graph, shards
        )
        recorded = partial(derivatives_of, curvature, given_inner, active_inner, active_outer, retain_graph, shards)
        if isinstance(solver, KnownSolution):
            outer_grads, derivatives = outer_gradient_and_derivatives(
                solver, outer_gradient, recorded, given_inner, active_inner, active_outer, params.masks
            )
        else:
            outer_grads, derivatives = outer_gradient(), None
        rhs, direct = outer_grads[: len(active_inner)], outer_grads[len(active_inner) :]
        check_connected("outer_loss", rhs)
        if shards is not None:
            rhs = shards.zeros_for_none(rhs, active_inner)
        adjoint = solve_adjoint(
            derivatives or recorded(),
            given_inner,
            rhs,
            active_inner,
            active_outer,
            params.masks,
            solver.without_lookahead() if isinstance(solver, KnownSolution) else solver,
            state,
        )
        grads = [difference(*terms) for terms in zip(active_outer, direct, adjoint.mixed, strict=True)]
        takes_part = [any(term is not None for term in terms) for terms in (direct, adjoint.mixed)]
        if ranks is not None:
            grads, takes_part = ranks.sum(grads, active_outer), ranks.any(takes_part)
        if not all_finite(grads):
            check_finite("The gradients of outer_loss in outer_params", direct)
            adjoint.check_finite()
            check_finite("The hypergradients", grads)
    if warn:
        adjoint.warn(solver, state, missing_dependence(*takes_part))
    return HypergradientResult(
        tuple(zeros_for_none(spread(grads, [phi.requires_grad for phi in params.outer]), params.outer)),
        adjoint.stats,
        adjoint.direct_only,
    )


def _check_losses(solver: Solver, outer_loss: Loss, inner_loss: Loss, curvature: str, outputs: Any) -> None:
    check_inner_loss(inner_loss, curvature, outputs)
    if isinstance(solver, KnownSolution):
        check_losses(solver, outer_loss, inner_loss)


def _outer_gradient(
    outer: CheckedLoss,
    inner: CheckedLoss,
    inner_params: Sequence[Tensor],
    outer_params: Sequence[Tensor],
    retain_graph: bool,
    shards: Shards | None,
) -> list[Tensor | None]:
    """The gradient of the outer loss in the inner parameters, in pieces if `shards` says how, and in the outer ones: of
    these it is this rank's term, which is summed with that of the mixed product."""
    params = [*inner_params, *outer_params]
    if isinstance(outer, LossGraph):
        attempt(outer.ranks, outer.refuse_functions, None)  # the curvature looks at `inner`
        shared = isinstance(inner, LossGraph) and any(
            node.next_functions
            for node in outer.nodes & inner.nodes  # common leaves do not count
        )
        term = gradient_term(outer, params, retain_graph=retain_graph or shared)
    else:
        term = gradient_term(outer, params)
    if outer.ranks is None:
        return term
    num_inner = len(inner_params)
    ranks = outer.ranks if shards is None else shards
    return [*ranks.sum_where_any(term[:num_inner], inner_params), *term[num_inner:]]


def difference(phi: Tensor, direct: Tensor | None, mixed: Tensor | None) -> Tensor:
    """`direct - mixed`, always a tensor of its own (autograd may give one tensor to two parameters)."""
    if mixed is None:
        return torch.zeros_like(phi) if direct is None else direct.detach().clone()
    return -mixed if direct is None else direct - mixed
