"""The adjoint problem of the implicit function theorem: one linear solve, and the mixed product with its solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Literal

import torch
from torch import Tensor

from auxfast.implicit.advice import found_nothing, no_more_than_identity, problem_of, warn_of
from auxfast.implicit.batch_curvature import FreshCurvature, MeanCurvature, Record
from auxfast.implicit.curvature import (
    Curvature,
    GaussNewton,
    Hessian,
    in_widest_dtype,
    on_one_dtype,
)
from auxfast.implicit.finite import check_finite
from auxfast.implicit.finite_difference import FiniteDifference
from auxfast.implicit.free_entries import FreeCurvature, Masks, project
from auxfast.implicit.kinks import is_at_kink
from auxfast.implicit.losses import LossFn, LossGraph
from auxfast.implicit.symmetry import check_symmetry
from auxfast.solvers.base import TRIVIAL, Solver, SolverState, SolveStats, checked_solve

CurvatureName = Literal["hessian", "gauss-newton", "finite-difference"]
Derivatives = Hessian | MeanCurvature | FreshCurvature | FiniteDifference
_RECORDED: dict[str, type[Hessian]] = {"hessian": Hessian, "gauss-newton": GaussNewton}


@dataclass(frozen=True)
class Adjoint:
    """The solution x of `H x = b`, and what it gives.

    Attributes:
        mixed: gradient of `<x, d inner / d W>` in each of the outer parameters; `None` where there is no dependence.
        rhs, solution: b and x, one tensor for each inner parameter that is in the system.
        stats: how the solve went.
        problem: what to warn of, a key of the texts in `advice`; `None`: nothing that the solve tells.
        direct_only: whether the solver found nothing better than x = 0.
    """

    mixed: Sequence[Tensor | None]
    rhs: Sequence[Tensor] = ()
    solution: Sequence[Tensor] = ()
    stats: SolveStats = TRIVIAL
    problem: str | None = None
    direct_only: bool = False

    def check_finite(self) -> None:
        """Raises NotFiniteError where something in here is not finite, and names it."""
        check_finite("The solver's solutions", self.solution)
        check_finite("The mixed second derivatives of inner_loss, in inner_params and outer_params,", self.mixed)

    def warn(self, solver: Solver, state: SolverState | None, other: str | None = None) -> None:
        """Gives a RuntimeWarning about the `other` problem, if there is one, or else about the solve's."""
        problem = other or self.problem
        warn_of(problem or no_more_than_identity(solver, self.stats, self.rhs, self.solution, state), solver, state)


def solve_adjoint(
    derivatives: Derivatives,
    inner: LossGraph | list[LossFn],
    outer_gradient: Sequence[Tensor | None],
    inner_params: Sequence[Tensor],
    outer_params: Sequence[Tensor],
    masks: Masks | None,
    solver: Solver,
    state: SolverState | None,
) -> Adjoint:
    """Solves `H x = b` and takes the mixed product with x.

    Args:
        derivatives: those of the inner loss, as `derivatives_of` makes them.
        inner: the inner loss that they are of.
        outer_gradient: b, one entry for each of `inner_params`; `None` is 0.
        masks: the free entries of `inner_params`; `None`: all are.
    """
    if isinstance(derivatives, FreshCurvature):
        derivatives.check(solver)
    product = on_one_dtype(derivatives)
    if masks is not None:
        outer_gradient, product = project(outer_gradient, masks), FreeCurvature(product, masks)
    if not product.params:
        return Adjoint([None] * len(outer_params))
    pairs = zip(compress(outer_gradient, product.in_system), product.params, strict=True)
    b = in_widest_dtype([torch.zeros_like(w) if grad is None else grad for grad, w in pairs])
    with torch.no_grad():  # once, and not at every step; what is differentiated in there says so itself
        solution, stats = _solve(solver, product, b, state)
        direct_only = found_nothing(stats, solution)
        problem = problem_of(solver, stats, product, b, direct_only)
        mixed = product.mixed(solution, outer_params)
        if isinstance(derivatives, FiniteDifference):
            stats, problem = derivatives.certify(stats, problem, getattr(solver, "tol", None))
        elif not direct_only and not isinstance(derivatives, FreshCurvature):  # whose products have nothing to compare
            stats, problem = check_symmetry(stats, problem, state, inner, derivatives, product.params, solution)
            if derivatives.kinked and is_at_kink(derivatives.kinked, inner_params, masks or [None] * len(inner_params)):
                problem = "kink"
    return Adjoint(mixed, b, solution, stats, problem, direct_only)


def _solve(
    solver: Solver, product: Curvature, rhs: Sequence[Tensor], state: SolverState | None
) -> tuple[Sequence[Tensor], SolveStats]:
    try:
        return checked_solve(solver, product, rhs, state)
    except ValueError:
        check_finite("The gradients of outer_loss in inner_params", rhs)
        raise


def check_curvature(curvature: str) -> None:
    """Raises ValueError where `curvature` is none that there is."""
    names = [*_RECORDED, "finite-difference"]
    if curvature not in names:
        raise ValueError(f"curvature must be one of {', '.join(names)}, not {curvature!r}")


def derivatives_of(
    name: str,
    inner: LossGraph | list[LossFn],
    params: Sequence[Tensor],
    outer_params: Sequence[Tensor],
    retain_graph: bool,
) -> Derivatives:
    if isinstance(inner, LossGraph):
        return _RECORDED[name](inner, params, retain_graph)
    if any(loss_fn.is_fresh for loss_fn in inner):
        if name == "finite-difference":
            raise ValueError(
                "curvature='finite-difference' compares gradients of the same loss: inner_loss must not be FreshBatches"
            )
        return FreshCurvature(_recorder(_RECORDED[name], inner[0]), params)
    if name == "finite-difference":
        return FiniteDifference(inner, params, outer_params)
    if len(inner) == 1:
        return _RECORDED[name](inner[0](), params)
    records = [_recorder(_RECORDED[name], loss_fn) for loss_fn in inner]
    return MeanCurvature(records, [loss_fn.share for loss_fn in inner], params)


def _recorder(kind: type[Hessian], loss_fn: LossFn) -> Record:
    return lambda params: kind(loss_fn(), params)
