"""Solved parameters as tensors with a graph, whose backward pass is that of the implicit function theorem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor

from auxfast.autograd.engine import in_own_task, keeps_graph
from auxfast.autograd.hooks import has_hook, through_hooks
from auxfast.autograd.transforms import (
    as_batch,
    has_tangent,
    in_transform_of_torch_func,
    outside_of_batch,
    rows_of_batch,
)
from auxfast.implicit.adjoint import Adjoint, Derivatives, solve_adjoint
from auxfast.implicit.central_difference import norm_of
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.finite import all_finite, check_finite
from auxfast.implicit.free_entries import Masks
from auxfast.implicit.jacobian import TransposedJacobian
from auxfast.implicit.losses import CheckedLoss, times
from auxfast.implicit.ranks import Ranks, together
from auxfast.implicit.summed_curvature import SummedCurvature
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
    inner: CheckedLoss | None
    params: Sequence[Tensor]
    outer_params: Sequence[Tensor]
    masks: Masks | None
    solver: Solver
    state: SolverState | None
    warn: bool
    on_solve: OnSolve | None

    @property
    def ranks(self) -> Ranks | None:
        """Those that have parts of F; `None`: this process has all of it."""
        return None if self.inner is None else self.inner.ranks

    def solved_params(self) -> tuple[Tensor, ...]:
        """W as tensors with a graph to phi: the same numbers, in the same memory."""
        solved: tuple[Tensor, ...] = _Solved.apply(self, *self.outer_params)  # type: ignore[no-untyped-call]
        return solved

    def pull_back(self, cotangents: Sequence[Tensor | None], batched: bool) -> tuple[list[Tensor], Sequence[Tensor]]:
        """`-(d F / d phi)^T x` for each of phi, zeros where it plays no part, and x with `(d F / d W)^T x =
        cotangents`. All tensors have one more axis in front where they are `batched`."""
        with together(self.ranks):
            return self._pull_back(cotangents, batched)

    def _pull_back(self, cotangents: Sequence[Tensor | None], batched: bool) -> tuple[list[Tensor], Sequence[Tensor]]:
        ranks = self.ranks
        if ranks is not None:
            cotangents = self._mean_cotangents(ranks, cotangents, batched)
        if self._has_hooks():  # F has gone through them, as an outer loss of W itself would
            cotangents = [self._hooked(w, c, batched) for w, c in zip(self.params, cotangents, strict=True)]
        solve = partial(
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
        adjoint = in_own_task(solve) if batched else solve()  # once, and not for each product
        lead = next(c.shape[:1] for c in cotangents if c is not None) if batched else ()
        gradients = [
            phi.new_zeros((*lead, *phi.shape)) if term is None else -term
            for phi, term in zip(self.outer_params, adjoint.mixed, strict=True)
        ]
        if ranks is not None:
            gradients = ranks.sum(gradients, gradients)
        if not all_finite(gradients):
            adjoint.check_finite()
            check_finite("The hypergradients", gradients)
        # Ranks look together, whichever of them warn.
        problem = self.own_problem(adjoint) if self.warn or ranks is not None else None
        if self.warn:
            adjoint.warn(self.solver, self.state, problem)
        if self.on_solve is not None:
            self.on_solve(adjoint.stats)
        return gradients, adjoint.solution

    def _mean_cotangents(
        self, ranks: Ranks, cotangents: Sequence[Tensor | None], batched: bool
    ) -> Sequence[Tensor | None]:
        lead = next(c.shape[:1] for c in cotangents if c is not None) if batched else ()
        like = [w.expand((*lead, *w.shape)) for w in self.params]
        return ranks.sum_where_any(times(1 / ranks.size, cotangents), like)

    def _has_hooks(self) -> bool:
        return any(map(has_hook, self.params))

    @staticmethod
    def _hooked(param: Tensor, cotangent: Tensor | None, batched: bool) -> Tensor | None:
        """The cotangent of `param` as the hooks on that make it."""
        if cotangent is None or not has_hook(param):
            return cotangent
        if batched:
            return torch.stack([through_hooks(param, row) for row in cotangent]) if len(cotangent) else cotangent
        return through_hooks(param, cotangent)

    def own_problem(self, adjoint: Adjoint) -> str | None:
        """What to warn of before all that a solve tells; a key of the texts in `advice`."""
        raise NotImplementedError

    def is_far(self, adjoint: Adjoint, derivatives: Hessian | SummedCurvature | TransposedJacobian) -> bool:
        """Whether the parameters are far from where F is 0, along the right-hand side."""
        if adjoint.problem is not None or not adjoint.stats.residual < _UNSOLVED:
            return False
        length = norm_of(derivatives.params)
        # Parameters that are all 0 have no scale: mostly nobody has trained them, and rounding is far below this.
        limit = _FAR * length if length else math.sqrt(torch.finfo(adjoint.rhs[0].dtype).eps)
        return adjoint.distance(derivatives.slope) > limit

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

    def refuse_transform(self) -> NoReturn:
        self._refuse(
            "has backward passes in one torch.func.vmap of first derivatives, and in no other transform of torch.func: "
            "put all cotangents on one axis, or take torch.autograd.grad(..., is_grads_batched=True)"
        )

    def refuse_third(self) -> None:
        if torch.is_grad_enabled():
            self._refuse(
                "has first and second derivatives, and no third: leave create_graph out of the last backward pass"
            )


def refuse_transforms(name: str, outer_params: Sequence[Tensor]) -> None:
    """Raises RuntimeError where forward-mode AD or a transform of torch.func would get zeros of what `name` returns."""
    if in_transform_of_torch_func() or has_tangent(outer_params):
        raise RuntimeError(
            f"{name} cannot be used within a transform of torch.func (grad, jvp, vmap, ...) or forward-mode AD: its "
            "results have backward passes alone. For a Jacobian take torch.autograd.functional.jacobian with "
            "strategy='reverse-mode'"
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
        tensors = _tensors_of(ctx)
        gradients = _Solved._gradients(ctx.function, cotangents, tensors)
        if not keeps_graph():  # the recorded gradient goes as saved tensors go, which an error leaves
            ctx.function = None
        return None, *gradients

    @staticmethod
    def _gradients(
        function: ImplicitFunction, cotangents: Sequence[Tensor | None], tensors: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        if (rows := rows_of_batch(cotangents)) is not None:
            function.refuse_graph_of_batch()
            with outside_of_batch():
                gradients, _ = function.pull_back(rows, True)
            return as_batch(gradients)
        if torch.is_grad_enabled() or in_transform_of_torch_func():
            results: tuple[Tensor, ...] = _PullBack.apply(function, *cotangents, *tensors)  # type: ignore[no-untyped-call]
            return results[: len(function.outer_params)]
        return function.pull_back(cotangents, False)[0]


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
        solution = _tensors_of(ctx)[2 * len(function.params) + num_outer :]
        if (rows := rows_of_batch(cotangents[:num_outer])) is not None:
            with outside_of_batch():
                return None, *_one_by_one(function, solution, rows)
        if in_transform_of_torch_func():
            function.refuse_transform()
        return None, *chain(*function.pull_back_twice(solution, cotangents[:num_outer]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: ImplicitFunction, *tensors: Tensor | None) -> Any:
        """`torch.func.vmap` over cotangents: one batched solve."""
        function.refuse_graph_of_batch()
        if in_transform_of_torch_func():  # around this one
            function.refuse_transform()
        rows = [
            tensor if tensor is None or axis is None else tensor.movedim(axis, 0)
            for tensor, axis in zip(tensors[: len(function.params)], in_dims[1:], strict=False)
        ]
        gradients, solution = function.pull_back(rows, True)
        return (*gradients, *solution), (0,) * (len(gradients) + len(solution))


def _one_by_one(
    function: ImplicitFunction, solution: Sequence[Tensor], rows: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The results of `pull_back_twice` for each row of the batch `rows`, as batches."""
    count = next(len(row) for row in rows if row is not None)
    cotangents = ([None if row is None else row[i] for row in rows] for i in range(count))
    found = [list(chain(*function.pull_back_twice(solution, each))) for each in cotangents]
    return [None if column[0] is None else as_batch([torch.stack(column)])[0] for column in zip(*found, strict=True)]


def _tensors_of(ctx: Any) -> tuple[Tensor, ...]:
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
