"""The adjoint problem of the implicit function theorem: one linear solve, and the mixed product with its solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from auxfast.implicit.advice import found_nothing, no_more_than_identity, problem_of, warn_of
from auxfast.implicit.batch_curvature import FreshCurvature, MeanCurvature
from auxfast.implicit.central_difference import norm_of, quotient
from auxfast.implicit.curvature import Curvature, Hessian, in_widest_dtype, on_one_dtype
from auxfast.implicit.derivatives import LossDerivatives
from auxfast.implicit.finite import NotFiniteError, check_finite
from auxfast.implicit.finite_difference import FiniteDifference
from auxfast.implicit.free_entries import FreeCurvature, Masks, project
from auxfast.implicit.jacobian import TransposedJacobian
from auxfast.implicit.kinks import is_at_kink
from auxfast.implicit.losses import CheckedLoss
from auxfast.implicit.one_step import StepDerivatives
from auxfast.implicit.summed_curvature import SummedCurvature
from auxfast.implicit.symmetry import check_symmetry
from auxfast.solvers.base import RHS_NOT_FINITE, TRIVIAL, Solver, SolverState, SolveStats, checked_solve
from auxfast.solvers.known_solution import KnownSolution
from auxfast.solvers.space import LOCAL, VectorSpace

Derivatives = LossDerivatives | StepDerivatives | TransposedJacobian


@dataclass(frozen=True)
class Adjoint:
    """The solution x of `H x = b`, and what it gives.

    Attributes:
        mixed: gradient of `<x, d inner / d W>` in each of the outer parameters; `None` where there is no dependence.
            Of a loss that is spread over ranks it is this rank's term of their sum.
        rhs, solution: b and x, one tensor for each inner parameter that is in the system.
        batched: whether `mixed`, `rhs` and `solution` have one more axis in front, of several right-hand sides.
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
    batched: bool = False

    def hardest(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """b and x without the axis of the batch: those of the right-hand side with the largest residual."""
        return hardest(self.rhs, self.stats, self.batched), hardest(self.solution, self.stats, self.batched)

    def distance(self, slope: Callable[[Sequence[Tensor]], Tensor]) -> float:
        """How far the parameters are from the minimum along b, to first order: `<x, g> / |b| = <b, H^-1 g> / |b|` is
        what a Newton step would go that way. It is no more than the length of that step.

        Args:
            slope: `v -> <v, g>`, where g is the gradient of the inner loss.
        """
        b, x = self.hardest()
        return quotient(abs(float(slope(x))), norm_of(b))

    def check_finite(self) -> None:
        """Raises NotFiniteError where something in here is not finite, and names it."""
        check_finite("The solver's solutions", self.solution)
        check_finite("The mixed second derivatives of inner_loss, in inner_params and outer_params,", self.mixed)

    def warn(self, solver: Solver, state: SolverState | None, other: str | None = None) -> None:
        """Gives a RuntimeWarning about the `other` problem, if there is one, or else about the solve's."""
        problem = other or self.problem
        warn_of(problem or no_more_than_identity(solver, self.stats, *self.hardest(), state), solver, state)


def solve_adjoint(
    derivatives: Derivatives,
    inner: CheckedLoss | None,
    outer_gradient: Sequence[Tensor | None],
    inner_params: Sequence[Tensor],
    outer_params: Sequence[Tensor],
    masks: Masks | None,
    solver: Solver,
    state: SolverState | None,
    batched: bool = False,
) -> Adjoint:
    """Solves `H x = b` and takes the mixed product with x.

    Args:
        derivatives: those of the inner loss, as `derivatives_of` makes them, or as a `KnownSolution` takes them.
        inner: the inner loss that they are of; `None`: they are of no loss.
        outer_gradient: b, one entry for each of `inner_params`; `None` is 0.
        masks: the free entries of `inner_params`; `None`: all are.
        batched: `outer_gradient` has one more axis in front, of several right-hand sides, and so has the result.
    """
    is_fresh = inner is not None and inner.kind == "fresh"
    if is_fresh:
        FreshCurvature.check(solver)
    product = operator_of(derivatives, masks)
    if masks is not None:
        outer_gradient = project(outer_gradient, masks)
    if not product.params:
        return Adjoint([None] * len(outer_params), batched=batched)
    lead = next(grad.shape[:1] for grad in outer_gradient if grad is not None) if batched else ()
    pairs = zip(compress(outer_gradient, product.in_system), product.params, strict=True)
    b = in_widest_dtype([w.new_zeros((*lead, *w.shape)) if grad is None else grad for grad, w in pairs])
    with torch.no_grad():  # once, and not at every step; what is differentiated in there says so itself
        solution, stats = solve_system(solver, product, b, state, batched)
        space: VectorSpace = getattr(product, "space", LOCAL)
        if inner is not None and inner.ranks is not None and space.is_whole:
            inner.ranks.check_same_solution(solution)
        direct_only = found_nothing(stats, solution, space)
        problem = problem_of(solver, stats, product, hardest(b, stats, batched), direct_only)
        mixed = (
            _mixed_of_rows(derivatives, product, solution, outer_params)
            if batched
            else product.mixed(solution, outer_params)
        )
        if isinstance(derivatives, FiniteDifference):
            stats, problem = derivatives.certify(stats, problem, getattr(solver, "tol", None))
        elif (
            isinstance(derivatives, (Hessian, MeanCurvature, SummedCurvature))
            and not is_fresh
            and not isinstance(solver, KnownSolution)
            and not (inner is None or direct_only)
        ):
            one = hardest(solution, stats, batched)
            stats, problem = check_symmetry(stats, problem, state, inner, derivatives, product.params, one)
            if derivatives.kinked and is_at_kink(derivatives.kinked, inner_params, masks or [None] * len(inner_params)):
                problem = "kink"
    return Adjoint(mixed, b, solution, stats, problem, direct_only, batched)


def operator_of(derivatives: Curvature, masks: Masks | None) -> Curvature:
    """H, for vectors of one dtype; of the free entries alone where there are masks."""
    product = on_one_dtype(derivatives)
    return product if masks is None else FreeCurvature(product, masks)


def hardest(tensors: Sequence[Tensor], stats: SolveStats, batched: bool) -> Sequence[Tensor]:
    """The entries of the right-hand side with the largest residual, of tensors that are `batched` or have but one."""
    if not batched:
        return tensors
    worst = max(range(len(stats.residuals)), key=stats.residuals.__getitem__, default=0)
    each = max(1, len(stats.residuals) // len(tensors[0]))  # `BlockDiagonal` has several residuals for each of them
    return [tensor[worst // each] for tensor in tensors]


def _mixed_of_rows(
    derivatives: Derivatives,
    product: Curvature,
    solutions: Sequence[Tensor],
    outer_params: Sequence[Tensor],
) -> list[Tensor | None]:
    rows, errors = [], []
    for row in zip(*solutions, strict=True):
        rows.append(product.mixed(row, outer_params))
        if isinstance(derivatives, FiniteDifference):
            errors.append(derivatives.operator_error)
    if isinstance(derivatives, FiniteDifference):
        derivatives.operator_error = max(errors)
    present = [next((term for term in column if term is not None), None) for column in zip(*rows, strict=True)]
    return [
        None if like is None else torch.stack([torch.zeros_like(like) if term is None else term for term in column])
        for like, column in zip(present, zip(*rows, strict=True), strict=True)
    ]


def solve_system(
    solver: Solver, product: Curvature, rhs: Sequence[Tensor], state: SolverState | None, batched: bool = False
) -> tuple[Sequence[Tensor], SolveStats]:
    """What `solver.solve` returns.

    Raises:
        NotFiniteError: the right-hand side is not finite. TypeError: see `checked_solve`.
    """
    try:
        return checked_solve(solver, product, rhs, state, batched)
    except ValueError as error:
        check_finite("The gradients of outer_loss in inner_params", rhs)
        if RHS_NOT_FINITE in str(error):  # by the piece of another rank
            raise NotFiniteError(str(error)) from None
        raise
