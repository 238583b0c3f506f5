"""The root of a function as a differentiable function of the outer parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from auxfast.autograd.graph import reaches
from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit.adjoint import Adjoint
from auxfast.implicit.arguments import as_tuple, check_independent, check_one_device
from auxfast.implicit.distributed import SpreadOverProcesses
from auxfast.implicit.finite import NotFiniteError
from auxfast.implicit.implicit_function import ImplicitFunction, OnSolve, like_given, refuse_transforms, values_of
from auxfast.implicit.jacobian import TransposedJacobian
from auxfast.implicit.losses import check_call
from auxfast.solvers import GMRES
from auxfast.solvers.base import Solver, SolverState, check_solver

_DEFAULT_SOLVER = GMRES()

Equations = Callable[[], Tensor | Sequence[Tensor] | Mapping[str, Tensor]]


@overload
def implicit_root(
    function: Equations,
    params: Mapping[str, Tensor],
    outer_params: Iterable[Tensor],
    *,
    solver: Solver = ...,
    state: SolverState | None = ...,
    on_solve: OnSolve | None = ...,
    warn: bool = ...,
) -> dict[str, Tensor]: ...


@overload
def implicit_root(
    function: Equations,
    params: Iterable[Tensor],
    outer_params: Iterable[Tensor],
    *,
    solver: Solver = ...,
    state: SolverState | None = ...,
    on_solve: OnSolve | None = ...,
    warn: bool = ...,
) -> list[Tensor]: ...


def implicit_root(
    function: Equations,
    params: Any,
    outer_params: Iterable[Tensor],
    *,
    solver: Solver = _DEFAULT_SOLVER,
    state: SolverState | None = None,
    on_solve: OnSolve | None = None,
    warn: bool = True,
) -> Any:
    """Parameters `W*(phi)` with `F(W, phi) = 0`, as tensors that are differentiable in `phi`.

        (z,) = auxfast.implicit_root(lambda: net(z_solved, x) - z_solved, [z_solved], net.parameters())
        outer_loss(z).backward()

    F is any function with as many equations as unknowns: what a fixed-point iteration or an equilibrium model solves,
    or training dynamics that are the gradient of no loss, because weights in them are detached. (The gradient of a loss
    is `implicit_minimum`'s, whose systems are symmetric and cheaper to solve.) With the Jacobian `J = d F / d W`, a
    backward pass solves `J^T x = d outer / d W` and takes `-(d F / d phi)^T x`: one backward pass through F for each
    step of the solver, and one in the end. Derivatives are taken at `params` as they are, which the caller has solved
    for.

    What `implicit_minimum` says of its results, several backward passes and rows of a Jacobian holds here too. There
    are no second derivatives.

    Args:
        function: computes F from `params` and `outer_params`, under `auxfast.preserved_state`: a tensor or a list of
            tensors of the shapes of `params`, a mapping like `params`, or one tensor with as many elements as `params`
            have together. If F is a gradient, it is one with a graph (`create_graph=True`).
        params: `W`, an iterable of tensors of one floating dtype on one device that all require gradients, or a mapping
            from names to tensors. They need not be leaves.
        outer_params: `phi`, any iterable of tensors, none of them computed from `params`.
        solver: how to apply `J^-T`. J is not symmetric in general: `GMRES`, `NormalEquations` and `Dense` are for
            such, and solvers for symmetric matrices are refused by the backward pass. `OneStep` and `Identity` take F
            for what a step subtracts from W: of a fixed-point map f that is `W - f(W)`, and `f(W) - W` has their sign
            wrong.
        state: what the solver keeps from one call for the next of a slowly changing problem, and which warnings were
            given.
        on_solve: called with the `SolveStats` of every solve, within the backward pass.
        warn: give a RuntimeWarning, in the backward pass, where the solver missed its `tol` or found nothing, no outer
            parameter plays a part in F, or `params` are so far from a root that a Newton step would move them, along
            the outer loss's gradient, by more than a tenth of their length.

    Returns:
        A list of tensors like `params`; a dict where that is a mapping.

    Raises:
        TypeError: a `function` that is none or returns no tensors, parameters that are no iterable of tensors, or a
            solver that is none.
        ValueError: equations of another number or shape than `params`, of another dtype, without a graph to any of
            `params`; parameters that do not require gradients, or are not allowed in `hypergradient`.
        ValueError: by the backward pass: a solver for symmetric matrices.
        RuntimeError: by the backward pass, where parameters have changed since this call, or an earlier pass has freed
            the graph.
        NotFiniteError: by the backward pass, for NaN or inf in the outer gradient or in the derivatives of F.
        NotImplementedError: by the backward pass of a backward pass.
    """
    values, outer = as_tuple("params", values_of(params)), as_tuple("outer_params", outer_params)
    check_independent(params=values, outer_params=outer)
    check_one_device("params", values)
    check_solver(solver)
    for i, w in enumerate(values):
        if not w.requires_grad:
            raise ValueError(
                f"params[{i}] has requires_grad=False: params are the unknowns of F = 0, and each has its equations. "
                "Leave out what is fixed, and its equations"
            )
        if w.dtype != values[0].dtype:
            raise ValueError(f"params must be of one dtype, not {values[0].dtype} and {w.dtype}")
    if not callable(function):
        raise TypeError(f"function must be a function of no arguments that computes F, not a {type(function).__name__}")
    refuse_transforms("implicit_root", outer)
    active_outer = [phi for phi in outer if phi.requires_grad]
    if not (torch.is_grad_enabled() and active_outer):
        return like_given(params, values, values, [w.detach() for w in values])
    with preserved_state(warn=warn, check=check_call):
        try:
            found = function()
        except SpreadOverProcesses as error:
            raise RuntimeError(f"function went through {error}") from None
        equations = _like_params(found, params, values)
    root = _Root(
        "implicit_root",
        TransposedJacobian(equations, values),
        None,
        values,
        active_outer,
        None,
        solver,
        state,
        warn,
        on_solve,
    )
    return like_given(params, values, values, root.solved_params())


class _Root(ImplicitFunction):
    derivatives: TransposedJacobian

    def pull_back(self, cotangents: Sequence[Tensor | None], batched: bool) -> tuple[list[Tensor], Sequence[Tensor]]:
        try:
            return super().pull_back(cotangents, batched)
        except NotFiniteError as error:
            raise NotFiniteError(
                "The backward pass of implicit_root holds NaN or inf: look for them in params, in the gradient of the "
                "outer loss, and in the derivatives of function (the norm of a zero vector, sqrt(0), log(0))"
            ) from error

    def own_problem(self, adjoint: Adjoint) -> str | None:
        if all(term is None for term in adjoint.mixed):
            return "no part in the function"
        if adjoint.problem in ("no curvature", "stagnated"):
            return "singular"
        if adjoint.problem in ("steps", "no solution"):
            return "not solved"
        return "no root" if self.is_far(adjoint, self.derivatives) else None


def _like_params(given: Any, params: Any, values: Sequence[Tensor]) -> list[Tensor]:
    """The equations as tensors of the shapes of the parameters.

    Raises:
        TypeError, ValueError: they are none, or have no graph.
    """
    if isinstance(given, Mapping):
        if not isinstance(params, Mapping) or given.keys() != params.keys():
            raise ValueError(f"function returned a mapping of {list(given)}, and params are none of the same names")
        given = [given[name] for name in params]
    equations = [given] if isinstance(given, Tensor) else given
    if not isinstance(equations, Sequence) or not all(isinstance(each, Tensor) for each in equations):
        raise TypeError(f"function must return a tensor or a list of tensors, not {given!r:.60}")
    total = sum(w.numel() for w in values)
    if isinstance(given, Tensor) and given.shape != values[0].shape and given.numel() == total:
        parts = given.reshape(-1).split([w.numel() for w in values])
        equations = [part.view(w.shape) for part, w in zip(parts, values, strict=True)]
    shapes, wanted = ([tuple(t.shape) for t in tensors] for tensors in (equations, values))
    if shapes != wanted:
        raise ValueError(
            f"function must return as many equations as there are unknowns: tensors of the shapes of params, {wanted}, "
            f"or one of {total} elements, not {shapes}"
        )
    for i, equation in enumerate(equations):
        if equation.dtype != values[0].dtype:
            raise ValueError(f"function returned {equation.dtype} for equation {i}, and params are {values[0].dtype}")
        if not equation.requires_grad:
            raise ValueError(
                f"function's result {i} has no graph, so that the Jacobian is singular: was it detached, or a gradient "
                "that was taken without create_graph=True?"
            )
    if not any(reaches(equation.grad_fn, values) for equation in equations):
        raise ValueError(
            "function does not depend on any of params: was something detached on the way, or were they replaced since?"
        )
    return list(equations)
