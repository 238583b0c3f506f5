"""The minimum of the inner loss as a differentiable function of the outer parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import compress
from typing import Any, overload

import torch
from torch import Tensor

from auxfast.autograd.engine import spread, vjp, zeros_for_none
from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit.adjoint import Adjoint, operator_of, solve_system
from auxfast.implicit.advice import found_nothing, problem_of, warn_of, warn_of_no_group
from auxfast.implicit.curvature import Hessian, in_dtypes_of, in_widest_dtype
from auxfast.implicit.derivatives import CurvatureName, check_curvature, derivatives_of
from auxfast.implicit.distributed import refuse_params
from auxfast.implicit.free_entries import Free, project
from auxfast.implicit.implicit_function import ImplicitFunction, OnSolve, like_given, refuse_transforms, values_of
from auxfast.implicit.inner_problem import check_inner_loss, check_same_call, given_loss, given_params
from auxfast.implicit.losses import Loss, LossGraph, check_of
from auxfast.implicit.ranks import ProcessGroup, attempt, ranks_of, together
from auxfast.implicit.summed_curvature import SummedCurvature
from auxfast.solvers import DEFAULT_SOLVER, MINRES, ConjugateGradient, Dense
from auxfast.solvers.base import Solver, SolverState, check_solver
from auxfast.solvers.known_solution import KnownSolution

_INVERSES = (MINRES, ConjugateGradient, Dense)
"""Solvers whose result is the solution, to their tolerance: its derivative is then that of the solution."""


@overload
def implicit_minimum(
    inner_loss: Loss,
    inner_params: Mapping[str, Tensor],
    outer_params: Iterable[Tensor],
    *,
    solver: Solver = ...,
    curvature: CurvatureName = ...,
    outputs: Tensor | Sequence[Tensor] | None = ...,
    free: Free | None = ...,
    state: SolverState | None = ...,
    on_solve: OnSolve | None = ...,
    process_group: ProcessGroup | None = ...,
    warn: bool = ...,
) -> dict[str, Tensor]: ...


@overload
def implicit_minimum(
    inner_loss: Loss,
    inner_params: Iterable[Tensor],
    outer_params: Iterable[Tensor],
    *,
    solver: Solver = ...,
    curvature: CurvatureName = ...,
    outputs: Tensor | Sequence[Tensor] | None = ...,
    free: Free | None = ...,
    state: SolverState | None = ...,
    on_solve: OnSolve | None = ...,
    process_group: ProcessGroup | None = ...,
    warn: bool = ...,
) -> list[Tensor]: ...


def implicit_minimum(
    inner_loss: Loss,
    inner_params: Any,
    outer_params: Iterable[Tensor],
    *,
    solver: Solver = DEFAULT_SOLVER,
    curvature: CurvatureName = "hessian",
    outputs: Tensor | Sequence[Tensor] | None = None,
    free: Free | None = None,
    state: SolverState | None = None,
    on_solve: OnSolve | None = None,
    process_group: ProcessGroup | None = None,
    warn: bool = True,
) -> Any:
    """The inner parameters `W*(phi)`, which minimise the inner loss, as tensors that are differentiable in `phi`.

        w = auxfast.implicit_minimum(inner_loss, dict(net.named_parameters()), phi)
        outer_loss(torch.func.functional_call(net, w, (x,)), phi).backward()  # phi.grad is the hypergradient

    The results hold the numbers of `inner_params`, which the caller has trained. Their backward pass solves the linear
    system of `hypergradient`, which is the case of one outer loss that is a scalar, and costs the same. Any number of
    outer losses, and whatever torch does with a graph, works:

    - `backward()` and the optimizers of torch, or a LightningModule, whose `training_step` returns an outer loss;
    - several backward passes through one result (`retain_graph=True`): the inner gradient is recorded once, by this
      call, and freed as autograd frees what it saves;
    - rows of a Jacobian: `torch.autograd.grad(losses, phi, torch.eye(k), is_grads_batched=True)`,
      `torch.func.vmap` of a backward pass, or `torch.autograd.functional.jacobian(..., vectorize=True)`, which share
      one batched solve;
    - second derivatives (`create_graph=True`), as in a third level of optimization, for `curvature="hessian"`, an inner
      loss that is a function or a tensor, and the solvers MINRES, ConjugateGradient and Dense, whose tolerance then
      bounds the accuracy. A backward pass through a backward pass takes two more solves.

    Nothing flows into `inner_params`: `W*` does not depend on the values that training started from. Where gradients
    are off, or no outer parameter requires them, the results are plain tensors. They share the memory of
    `inner_params`: train on after the backward pass, not before it. An outer loss that does not use them has its direct
    gradient alone, and nothing is solved.

    Args:
        inner_loss, outer_params, solver, curvature, outputs, free, state: see `hypergradient`. Functions are called
            within this call, under `auxfast.preserved_state`, and lists of them in the backward pass again. The graph
            of a tensor is kept.
        inner_params: `W`, an iterable of tensors, or a mapping from names to tensors, such as
            `dict(net.named_parameters())`.
        on_solve: called with the `SolveStats` of every solve, within the backward pass: `stats.append`, for a list
            `stats`.
        process_group: see `hypergradient`. The gradients that arrive at the results are averaged over the ranks, with
            equal weights, and what reaches `phi` through them is the same on all. Average `phi.grad` over the ranks, as
            DistributedDataParallel does, where outer losses also depend on `phi` directly.
        warn: give a RuntimeWarning, in the backward pass, of what `hypergradient` warns of; and where the parameters
            are so far from a minimum that a Newton step would move them, along the outer loss's gradient, by more than
            a tenth of their length. That is seen where the inner loss is one graph. At once, where `process_group` is
            None before `init_process_group()` under `torchrun`.

    Returns:
        A list of tensors like `inner_params`; a dict where that is a mapping. Those with `requires_grad=False` are
        returned as they are.

    Raises:
        TypeError, ValueError, RuntimeError: what `hypergradient` raises of the arguments, by this call.
        NotFiniteError: by the backward pass; see `hypergradient`.
        RuntimeError: by the backward pass, where parameters have changed since this call, or an earlier pass has freed
            the graph.
        NotImplementedError: by the backward pass, where there is no second derivative, or a third is asked for.
    """
    params = given_params(values_of(inner_params), outer_params, free)
    check_curvature(curvature)
    check_solver(solver)
    if isinstance(solver, KnownSolution) and solver.lookahead_lr:
        raise ValueError(
            f"solver must take the outer gradient at the parameters as they are, not after a step: {solver}"
        )
    if not params.active_inner:
        raise ValueError("inner_params have requires_grad=False, all of them: nothing would move with outer_params")
    if warn:
        warn_of_no_group(process_group, state)
    ranks = ranks_of(process_group, params.inner[0].device)
    if ranks is not None:
        check_same_call(ranks, params, solver, curvature, state)
    elif isinstance(inner_loss, Tensor):
        refuse_params("inner_params", params.active_inner)
    refuse_transforms("implicit_minimum", params.outer)
    if not (torch.is_grad_enabled() and params.active_outer):
        solved: Sequence[Tensor] = [w.detach() for w in params.active_inner]
        return like_given(inner_params, params.inner, params.active_inner, solved)
    state_guard = nullcontext() if isinstance(inner_loss, Tensor) else preserved_state(warn=warn, check=check_of(ranks))
    with together(ranks), state_guard as guard:
        attempt(ranks, partial(check_inner_loss, inner_loss, curvature, outputs), None)
        inner = given_loss("inner_loss", inner_loss, guard, outputs, curvature == "gauss-newton", ranks)
        derivatives = derivatives_of(curvature, inner, params.active_inner, params.active_outer, retain_graph=True)
    minimum = _Minimum(
        "implicit_minimum",
        derivatives,
        inner,
        params.active_inner,
        params.active_outer,
        params.masks,
        solver,
        state,
        warn,
        on_solve,
    )
    return like_given(inner_params, params.inner, params.active_inner, minimum.solved_params())


class _Minimum(ImplicitFunction):
    def own_problem(self, adjoint: Adjoint) -> str | None:
        takes_part = any(term is not None for term in adjoint.mixed)
        if not (takes_part if self.ranks is None else self.ranks.any_rank(takes_part)):
            return "no part in the inner loss"
        derivatives = self.derivatives
        if isinstance(derivatives, Hessian) or (isinstance(derivatives, SummedCurvature) and derivatives.has_slope):
            return "no minimum" if self.is_far(adjoint, derivatives) else None
        return None  # no gradient was recorded

    def pull_back_twice(
        self, solution: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]]:
        """See `ImplicitFunction`. With `x = H^-1 b`, cotangents u and `M = d g / d phi`, the change of `<u, -M^T x>` is

            -<db, s> + <x, dH s> - <x, dM u>,    s = H^-1 M u

        so one more solve gives the gradient in b, and autograd the rest, of `<x, H s - M u>` for fixed x, s and u."""
        loss = self._loss_for_third_derivatives()
        product = operator_of(self.derivatives, self.masks)
        with torch.enable_grad():
            gradient = loss.gradient(self.params, retain_graph=True, create_graph=True)
            g = list(compress(gradient, product.in_system))
            x = [each.detach().requires_grad_() for each in in_dtypes_of(product.params, solution)]
            mixed = vjp(g, self.outer_params, x, create_graph=True)  # type: ignore[arg-type]
            images = vjp(g, product.params, x, create_graph=True)  # type: ignore[arg-type]
            mixed_with_u = _dot(mixed, cotangents)
        if mixed_with_u is None:
            return [None] * len(self.params), [None] * len(self.params), [None] * len(self.outer_params)
        along = zeros_for_none(vjp([mixed_with_u], x, [torch.ones_like(mixed_with_u)]), x)
        s = self._solve(in_widest_dtype(along))
        with torch.enable_grad():
            images_with_s = _dot(images, s)
            total = -mixed_with_u if images_with_s is None else images_with_s - mixed_with_u
        ends = [*self.params, *self.outer_params]
        grads = vjp([total], ends, [torch.ones_like(total)])
        return (
            spread([-each for each in s], product.in_system),
            grads[: len(self.params)],
            grads[len(self.params) :],
        )

    def _solve(self, rhs: Sequence[Tensor]) -> Sequence[Tensor]:
        """`H^-1 rhs`."""
        product = operator_of(self.derivatives, self.masks)
        if self.masks is not None:
            rhs = project(rhs, list(compress(self.masks, product.in_system)))
        with torch.no_grad():
            solution, stats = solve_system(self.solver, product, rhs, None)
            problem = problem_of(self.solver, stats, product, rhs, found_nothing(stats, solution))
        if self.warn:
            warn_of(problem, self.solver, self.state)
        if self.on_solve is not None:
            self.on_solve(stats)
        return solution

    def _loss_for_third_derivatives(self) -> LossGraph:
        if self.ranks is not None:
            self._refuse("has second derivatives in one process alone: leave out create_graph, or process_group")
        if self._has_hooks():
            self._refuse("has second derivatives where no hook is registered on inner_params")
        if type(self.derivatives) is not Hessian:
            self._refuse("has second derivatives for curvature='hessian' alone, and an inner_loss that is no list")
        if not isinstance(self.solver, _INVERSES):
            self._refuse(
                f"has second derivatives where the solver is MINRES, ConjugateGradient or Dense, not {self.solver!r}"
            )
        assert self.inner is not None
        return self.inner if isinstance(self.inner, LossGraph) else self.inner[0]()


def _dot(tensors: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> Tensor | None:
    """The inner product of two lists, where `None` is 0; `None` where it is nothing else."""
    terms = [(a * b).sum() for a, b in zip(tensors, others, strict=True) if a is not None and b is not None]
    return torch.stack(terms).sum() if terms else None
