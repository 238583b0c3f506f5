"""Solved parameters as tensors with a graph, whose backward pass is that of the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from auxfast.autograd.engine import in_own_task, keeps_graph
from auxfast.autograd.transforms import as_batch, in_transform_of_torch_func, outside_of_batch, rows_of_batch
from auxfast.implicit.adjoint import Adjoint, Derivatives, length_of, solve_adjoint
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.finite import all_finite, check_finite
from auxfast.implicit.free_entries import Masks
from auxfast.implicit.jacobian import TransposedJacobian
from auxfast.implicit.losses import LossFn, LossGraph
from auxfast.solvers.base import Solver, SolverState, SolveStats

OnSolve = Callable[[SolveStats], object]

_FAR = 0.1
"""Distance from the minimum, or root, along the outer gradient, relative to the length of the parameters, from which it
is none. Networks trained on mini-batches are within some percent."""
_UNSOLVED = 0.5  # residual from which the solution tells nothing of a distance


@dataclass(frozen=True)
class ImplicitFunction:
    """Parameters W that solve a problem `F(W, phi) = 0` for the present phi.

    Attributes:
        name: what users call, for errors.
        derivatives: those of F.
        inner: the loss whose gradient F is; `None`: there is none.
        params, outer_params: those of W and of phi that require gradients.
        masks: the free entries of `params`; `None`: all are.
        solver, state, warn, on_solve: as users give them.
    """

    name: str
    derivatives: Derivatives
    inner: LossGraph | list[LossFn] | None
    params: Sequence[Tensor]
    outer_params: Sequence[Tensor]
    masks: Masks | None
    solver: Solver
    state: SolverState | None
    warn: bool
    on_solve: OnSolve | None

    def solved_params(self) -> tuple[Tensor, ...]:
        """W as tensors with a graph to phi: the same numbers, in the same memory."""
        solved: tuple[Tensor, ...] = _Solved.apply(self, *self.outer_params)  # type: ignore[no-untyped-call]
        return solved

    def pull_back(self, cotangents: Sequence[Tensor | None], batched: bool) -> tuple[list[Tensor], Sequence[Tensor]]:
        """`-(d F / d phi)^T x` for each of phi, zeros where it plays no part, and x with `(d F / d W)^T x =
        cotangents`. All tensors have one more axis in front where they are `batched`."""
        adjoint = in_own_task(
            partial(
                solve_adjoint,
                self.derivatives,
                self.inner,
                cotangents,
                self.params,
                self.outer_params,
                self.masks,
                self.solver,
                self.state,
                batched,
            )
        )
        lead = next(c.shape[:1] for c in cotangents if c is not None) if batched else ()
        gradients = [
            phi.new_zeros(*lead, *phi.shape) if term is None else -term
            for phi, term in zip(self.outer_params, adjoint.mixed, strict=True)
        ]
        if not all_finite(gradients):
            adjoint.check_finite()
            check_finite("The hypergradients", gradients)
        if self.warn:
            adjoint.warn(self.solver, self.state, self.problem_of(adjoint))
        if self.on_solve is not None:
            self.on_solve(adjoint.stats)
        return gradients, adjoint.solution

    def problem_of(self, adjoint: Adjoint) -> str | None:
        """What to warn of before all that a solve tells; a key of the texts in `advice`."""
        raise NotImplementedError

    def is_far(self, adjoint: Adjoint, derivatives: Hessian | TransposedJacobian) -> bool:
        """Whether the parameters are far from where F is 0, along the right-hand side."""
        if adjoint.problem is not None or not adjoint.stats.residual < _UNSOLVED:
            return False
        return adjoint.distance(derivatives.slope) > _FAR * length_of(derivatives.params) > 0

    def pull_back_twice(
        self, solution: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]]:
        """The derivative of `<cotangents, -(d F / d phi)^T x>`, the gradients of `pull_back`, in the cotangents that it
        was given, in `params` and in `outer_params`.

        Args:
            solution: the x that `pull_back` has found.

        Raises:
            NotImplementedError: it is not known how, and what else to do.
        """
        self._refuse("has first derivatives alone: leave create_graph out of the backward pass")

    def _refuse(self, text: str) -> NoReturn:
        raise NotImplementedError(f"{self.name} {text}")

    def refuse_graph_of_batch(self) -> None:
        if torch.is_grad_enabled():
            self._refuse(
                "has no second derivatives for batched gradients (is_grads_batched=True or vmap, with "
                "create_graph=True): take a backward pass for each row"
            )

    def refuse_third(self) -> None:
        if torch.is_grad_enabled():
            self._refuse(
                "has first and second derivatives, and no third: leave create_graph out of the last backward pass"
            )


def values_of(params: Any) -> Any:
    """The tensors of an argument that may also be a mapping, by name."""
    return params.values() if isinstance(params, Mapping) else params


def like_given(given: Any, tensors: Sequence[Tensor], active: Sequence[Tensor], solved: Sequence[Tensor]) -> Any:
    """The `tensors` of the argument `given`, `solved` in the place of the `active` ones: a dict for a mapping, else a
    list."""
    by_id = dict(zip(map(id, active), solved, strict=True))
    found = [by_id.get(id(tensor), tensor) for tensor in tensors]
    return dict(zip(given, found, strict=True)) if isinstance(given, Mapping) else found


class _Solved(torch.autograd.Function):
    """phi -> W."""

    @staticmethod
    def forward(ctx: Any, function: ImplicitFunction, *outer_params: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.set_materialize_grads(False)
        # They share the parameters' memory and version, so that autograd notices where the parameters have changed.
        solved = tuple(w.detach() for w in function.params)
        ctx.save_for_backward(*solved, *outer_params)
        return solved

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        tensors = _saved_tensors(ctx)
        function: ImplicitFunction = ctx.function
        if not keeps_graph():  # the recorded gradient goes as saved tensors go
            ctx.function = None
        if (rows := rows_of_batch(cotangents)) is not None:
            function.refuse_graph_of_batch()
            with outside_of_batch():
                gradients, _ = function.pull_back(rows, True)
            return None, *as_batch(gradients)
        if torch.is_grad_enabled() or in_transform_of_torch_func():
            results = _PullBack.apply(function, *cotangents, *tensors)  # type: ignore[no-untyped-call]
            return None, *results[: len(function.outer_params)]
        return None, *function.pull_back(cotangents, False)[0]


class _PullBack(torch.autograd.Function):
    """(cotangents, W, phi) -> (gradients in phi, x)."""

    @staticmethod
    def forward(function: ImplicitFunction, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        gradients, solution = function.pull_back(tensors[: len(function.params)], False)
        return *gradients, *(x.detach() for x in solution)  # a solver may return what it was given

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *tensors = inputs
        solution = output[len(ctx.function.outer_params) :]
        ctx.mark_non_differentiable(*solution)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *solution)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        function: ImplicitFunction = ctx.function
        function.refuse_third()
        num_outer = len(function.outer_params)
        solution = _saved_tensors(ctx)[2 * len(function.params) + num_outer :]
        in_cotangents, in_params, in_outer = function.pull_back_twice(solution, cotangents[:num_outer])
        return None, *in_cotangents, *in_params, *in_outer

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: ImplicitFunction, *tensors: Tensor | None) -> Any:
        """`torch.func.vmap` over cotangents: one batched solve."""
        function.refuse_graph_of_batch()
        rows = [
            tensor if tensor is None or axis is None else tensor.movedim(axis, 0)
            for tensor, axis in zip(tensors[: len(function.params)], in_dims[1:], strict=False)
        ]
        gradients, solution = function.pull_back(rows, True)
        return (*gradients, *solution), (0,) * (len(gradients) + len(solution))


def _saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """The saved tensors.

    Raises:
        RuntimeError: they were freed, or have changed since.
    """
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "Parameters were changed (by a step of an optimizer?) between the call of implicit_minimum or "
            "implicit_root and the backward pass through its result: take the backward pass first, or call it anew "
            "after the change"
        ) from error
    return saved
