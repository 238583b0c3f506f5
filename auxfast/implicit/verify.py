"""A check of the hypergradient on a user's own problem, against what needs no implicit function theorem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxfast.autograd.engine import spread
from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit.arguments import as_tuple
from auxfast.implicit.bilevel_problem import BilevelProblem, assign, coarsest_eps, cut, flat, restored
from auxfast.implicit.derivatives import CurvatureName
from auxfast.implicit.finite import NotFiniteError
from auxfast.implicit.free_entries import Free, free_masks, project
from auxfast.implicit.fresh_batches import FreshBatches
from auxfast.implicit.kinks import find_kinks
from auxfast.implicit.losses import Loss, LossFns, as_loss_fns, as_pairs, check_call, mean_loss
from auxfast.implicit.report import RIGHT, Agreement, HypergradientReport, Unrolled
from auxfast.implicit.unrolling import check_unrollable, unrolled_gradient
from auxfast.solvers import MINRES, Dense, Solver
from auxfast.solvers.base import NOT_FINITE, check_positive, check_solver, check_steps

_SYMMETRY_PAIRS = 4
"""Pairs of random vectors, which give the norm of the antisymmetric part of H to a factor of about 2."""
_NEARBY = 1e-4
"""Step of `gradient_change`: an optimizer that ends in a fold of ReLUs has been seen to stop 1e-5 from its bottom."""
_CLEARLY = 100
"""How many times the inner gradient of an entry that only a bound can have kept in its place is that of any other."""


def verify_hypergradient(
    outer_loss: Loss,
    inner_loss: Loss,
    inner_params: Iterable[Tensor],
    outer_params: Iterable[Tensor],
    *,
    solver: Solver | None = None,
    curvature: CurvatureName = "hessian",
    free: Free | None = None,
    solve_inner: Callable[[], object] | None = None,
    step: float | None = None,
    max_directions: int = 16,
    max_dense: int = 2000,
    unrolled: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> HypergradientReport:
    """Compares a hypergradient with a dense solve and with finite differences through a re-solved inner problem.

    The finite differences know nothing of the implicit function theorem: for each direction d the inner problem is
    solved at `phi + step d` and at `phi - step d`, from the inner parameters as they are, and the outer loss is
    compared. So they also tell what a perfect linear solve cannot: whether the inner parameters are near enough to a
    minimum, and whether a path from phi to the outer loss is missing. All parameters are as before when it returns.

    Three more checks name causes: whether the recorded second derivatives are symmetric; whether they are those of the
    inner gradient; and whether entries stay at a kink of the inner loss or at a bound, so that `free` must hold them
    fixed. Kinks are found from inner gradients at both sides of the inner parameters, which then are left by some
    `1e-8` of their size (float64); bounds, as entries that `solve_inner` leaves exactly in place. `report.verdict`, at
    the end of `print(report)`, says in one sentence what all of it comes to.

    With `unrolled=K` it is also compared with the derivative of K steps of the inner `optimizer` from the parameters as
    they are: what an inner problem that is not converged really has, `report.training`. K = 1 is the one-step gradient,
    and with K the derivative tends to that of the solved problem. It is exact, of the gradients that the inner loss has
    at all entries, free or not, and takes a gradient, a recorded one and two products a step, and the memory of K
    copies of the inner parameters, their gradient and the optimizer's state.

    Args:
        outer_loss, inner_loss: functions of no arguments that compute the loss from the parameters, or lists of them or
            `MicroBatches`, for the mean; deterministic but for torch's random numbers, which are replayed at each call.
        inner_params, outer_params: as for `hypergradient`; leaves, since they are varied in place.
        solver: what is verified; `None`: `MINRES()`, so that the linear system is solved.
        curvature: as for `hypergradient`, whose error with "gauss-newton" or "finite-difference" this measures. With
            "gauss-newton" `inner_loss` returns `(loss, outputs)`.
        free: as for `hypergradient`. The inner problem is then solved anew in the free entries alone, and so it is for
            entries that are found at a kink, unless there is a `solve_inner`.
        solve_inner: minimises the inner loss in `inner_params`, in place; called at varied `outer_params`. `None`:
            torch's L-BFGS and then Newton's method, which suits smooth problems of moderate size.
        step: length of the finite differences, relative to max(1, norm of the outer parameters); `None`: the cube root
            of the precision of the inner parameters' dtype.
        max_directions: up to so many outer parameters are each varied; of more, so many random directions.
        max_dense: systems with more inner parameters are not solved densely.
        unrolled: K, at least 1; `None`: nothing is unrolled.
        optimizer: goes with `unrolled`; torch's SGD, Adam or AdamW, which holds the inner parameters and no others. A
            copy of it takes the steps, from its state (momentum, moments, learning rates) as it is.

    Raises:
        TypeError: a loss that is not made of functions, an `optimizer` of another class, parameters that are not an
            iterable of tensors, `free` that is none of masks, or a solver that is none.
        ValueError: a setting outside its range; parameters that are none, not leaves or without any
            `requires_grad=True`; a loss that is not finite, or of two values at the same parameters; `unrolled` without
            an `optimizer` of the inner parameters; or what `hypergradient` raises.
        NotFiniteError: as `hypergradient` does, unless entries at kinks explain it, which the report then says.
    """
    outer_pairs, inner_pairs = _pairs("outer_loss", outer_loss), _pairs("inner_loss", inner_loss)
    if unrolled is not None:
        check_steps("unrolled", unrolled)
    if (unrolled is None) != (optimizer is None):
        raise ValueError(
            "unrolled, the number of steps, and optimizer, which takes them, go together: give both or none"
        )
    if solver is not None:
        check_solver(solver)
    check_steps("max_directions", max_directions)
    inner, outer = as_tuple("inner_params", inner_params), as_tuple("outer_params", outer_params)
    masks = free_masks(free, inner)
    for name, params in (("inner_params", inner), ("outer_params", outer)):
        if any(not param.is_leaf for param in params):
            raise ValueError(f"{name} must be leaves: their values are varied in place")
        if not any(param.requires_grad for param in params):
            raise ValueError(f"{name} has no parameter with requires_grad=True: there is nothing to verify")
    active = [param for param in inner if param.requires_grad]
    if optimizer is not None:
        check_unrollable(optimizer)
        _check_holds(optimizer, inner)
    if step is None:
        step = coarsest_eps(active) ** (1 / 3)
    check_positive("step", step)
    with preserved_state(check=check_call) as guard, restored([*active, *outer]):
        replayed_outer = [(weight, guard.replay(function)) for weight, function in outer_pairs]
        replayed_inner = [(weight, guard.replay(function)) for weight, function in inner_pairs]
        outer_fns = as_loss_fns("outer_loss", replayed_outer, _as_it_is)
        inner_fns = as_loss_fns("inner_loss", replayed_inner, _as_it_is, curvature == "gauss-newton")
        _check_values(outer_loss=outer_fns, inner_loss=inner_fns)
        problem = BilevelProblem(
            replayed_outer,
            replayed_inner,
            outer_fns,
            inner_fns,
            active,
            [param for param in outer if param.requires_grad],
            masks,
            None if solve_inner is None else guard.replay(solve_inner),
            curvature,
        )
        values = flat(problem.inner), flat(problem.outer)
        report = _verify(problem, solver or MINRES(), step, max_directions, max_dense)
        if unrolled is not None and optimizer is not None:
            assign(problem.inner, values[0])
            assign(problem.outer, values[1])
            exact = problem.exact_curvature
            gradient = unrolled_gradient(outer_fns, inner_fns, problem.inner, problem.outer, optimizer, unrolled, exact)
            along = report.directions @ flat(gradient)
            report = replace(report, unrolled=Unrolled(along, unrolled, type(optimizer).__name__))
    if report.suggested_free is None:
        return report
    suggested = spread(report.suggested_free, [param.requires_grad for param in inner])
    return replace(report, suggested_free=tuple(suggested))


def _pairs(name: str, loss: Loss) -> list[tuple[float, Callable[[], Any]]]:
    if isinstance(loss, Tensor):
        raise TypeError(
            f"{name} must be a function of no arguments, since it is evaluated again, not a Tensor: lambda: ..."
        )
    if isinstance(loss, FreshBatches):
        raise ValueError(f"{name} must not be FreshBatches, another loss at every call: pass MicroBatches")
    return as_pairs(name, loss)


def _check_holds(optimizer: torch.optim.Optimizer, inner: Sequence[Tensor]) -> None:
    """Raises ValueError where an optimizer would not train the inner parameters, or train others."""
    held = {id(param) for group in optimizer.param_groups for param in group["params"] if param.requires_grad}
    wanted = {id(param) for param in inner if param.requires_grad}
    if held != wanted:
        raise ValueError(
            f"optimizer must hold the inner parameters and no others: it lacks {len(wanted - held)} of them, and holds "
            f"{len(held - wanted)} others"
        )


def _as_it_is(function: Any) -> Any:
    return function


def _check_values(**losses: LossFns) -> None:
    """Raises ValueError where a loss is not finite, or differs between two calls by more than summation in another
    order could make it."""
    for name, loss_fns in losses.items():
        loss = mean_loss(loss_fns)
        first, second = loss.item(), mean_loss(loss_fns).item()
        if not (math.isfinite(first) and math.isfinite(second)):
            raise ValueError(f"{name} is {first} at the given parameters: there is nothing to verify")
        if abs(first - second) > torch.finfo(loss.dtype).eps ** (2 / 3) * abs(first):
            raise ValueError(
                f"{name} is not deterministic: two calls at the same parameters gave {first:.9g} and {second:.9g}. "
                "torch's random numbers are replayed; draw all others, and batches, once and outside of the function"
            )


def _verify(
    given: BilevelProblem, solver: Solver, step: float, max_directions: int, max_dense: int
) -> HypergradientReport:
    phi, w = flat(given.outer), flat(given.inner)
    directions = _directions(len(phi), max_directions)
    given_norm = float(flat(given.inner_gradient()).norm())
    is_free = flat(project([torch.ones_like(param) for param in given.inner], given.masks)).bool()
    scales = _scales(given.inner)
    held, oblique = find_kinks(given.inner_gradient_at, w, torch.where(is_free, scales, 0), given.eps)
    assign(given.inner, w)
    dense = None
    try:
        derivatives, stats = given.derivatives(directions, solver)
        if len(w) <= max_dense:
            dense, _ = given.derivatives(directions, Dense(max_size=max_dense))
    except NotFiniteError:
        if not bool(held.any()):
            raise
        nan = torch.full((len(directions),), math.nan, dtype=torch.float64)
        derivatives, stats = nan, NOT_FINITE  # the kinks explain it
    problem = replace(given, masks=_masks(is_free & ~held, given.inner))

    generator = torch.Generator().manual_seed(0)
    solution = flat(problem.outer_solution())
    noise = torch.where(is_free & ~held, scales * _normal(len(w), generator), 0)
    recorded_error = None
    if problem.curvature != "finite-difference" and not oblique:
        along = solution * float(noise.norm()) / max(float(solution.norm()), torch.finfo(w.dtype).tiny)
        recorded_error = _recorded_error(problem, w, [noise, along])
    symmetry_error = _symmetry_error(problem, generator)
    gradient_change = _gradient_change(problem, w, _NEARBY * noise)

    found = _finite_differences(problem, w, phi, directions, step * max(1.0, float(phi.norm())), solution)
    if problem.solve_inner is not None:
        held = held | (is_free & found.pushed)
    at_minimum = None
    if bool(derivatives.isfinite().all()) and not Agreement.of(derivatives, found.derivatives).relative_error <= RIGHT:
        there = problem.solved_at(w, phi)
        if bool(there.gradient.isfinite().all()):
            with suppress(NotFiniteError):
                at_minimum, _ = given.derivatives(directions, solver)
    return HypergradientReport(
        directions=directions,
        hypergradient=derivatives,
        dense=dense,
        finite_differences=found.derivatives,
        finite_difference_error=found.error,
        at_minimum=at_minimum,
        curvature=given.curvature,
        stats=stats,
        inner_gradient_norm=given_norm,
        resolved_gradient_norm=found.gradient_norm,
        symmetry_error=symmetry_error,
        recorded_error=recorded_error,
        held=int(held.sum()),
        oblique=oblique,
        suggested_free=tuple(_masks(is_free & ~held, given.inner)) if bool(held.any()) else None,
        gradient_change=gradient_change,
        inner_entries=int(is_free.sum()),
    )


class _FiniteDifferences(NamedTuple):
    derivatives: Tensor  # (m,)
    error: float  # estimated, relative
    gradient_norm: float  # largest of the inner gradient where solved anew
    pushed: Tensor  # (n,), bool: the entries that have stayed exactly in place against an inner gradient


def _finite_differences(
    problem: BilevelProblem, w: Tensor, phi: Tensor, directions: Tensor, length: float, solution: Tensor
) -> _FiniteDifferences:
    """Along each of `directions` (m, n). Where an inner gradient g is left, the outer loss is about `<x, g>` above that
    at the minimum, with `x = solution`; entries that stay in place need not have g = 0."""
    differences, errors, norms = [], [], []
    moved, against = torch.zeros_like(w, dtype=torch.bool), torch.zeros_like(w)
    for direction in directions:
        above, below = (problem.solved_at(w, phi + sign * length * direction) for sign in (1, -1))
        here = (above.point != w) | (below.point != w)
        left = torch.where(here if bool(here.any()) else ~here, above.gradient - below.gradient, 0)
        rounding = problem.eps * max(abs(above.outer_loss), abs(below.outer_loss))
        differences.append((above.outer_loss - below.outer_loss) / (2 * length))
        errors.append((abs(float(solution @ left)) / 2 + rounding) / length)
        norms += [float(above.gradient.norm()), float(below.gradient.norm())]
        moved |= here
        against = torch.stack([against, above.gradient.abs(), below.gradient.abs()]).amax(0)
    truth, error = torch.tensor(differences, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
    return _FiniteDifferences(
        truth,
        float(error.norm() / truth.norm()) if bool(error.any()) else 0.0,  # inf where the truth is 0
        float(torch.tensor(norms).max()),
        ~moved & (against > _CLEARLY * torch.where(moved, against, 0).max()) & moved.any(),
    )


def _symmetry_error(problem: BilevelProblem, generator: torch.Generator) -> float:
    """About `||H - H^T|| / ||H||`, Frobenius norms: the mean squares of `<u, H v> - <v, H u>` and `<u, H v>`."""
    product, size = problem.hessian(), sum(param.numel() for param in problem.inner)
    differences, squares = 0.0, 0.0
    for _ in range(_SYMMETRY_PAIRS):
        u, v = _normal(size, generator), _normal(size, generator)
        uhv, vhu = float(u @ product(v)), float(v @ product(u))
        differences += (uhv - vhu) ** 2
        squares += (uhv**2 + vhu**2) / 2
    return math.sqrt(differences / squares) if squares else 0.0


def _recorded_error(problem: BilevelProblem, point: Tensor, vectors: Sequence[Tensor]) -> float:
    """Relative difference of recorded products with two vectors (n,) and of differences of gradients, less three times
    the error of those, which shows in that they are not additive. The smaller one of two steps: the long one may cross
    kinks, and the short one suffers from rounding."""
    vectors = [*vectors, vectors[0] + vectors[1]]
    exact = list(map(problem.hessian(), vectors))
    errors = []
    for step in (problem.eps ** (1 / 3), problem.eps ** (1 / 2)):
        quotients = [problem.gradient_change(point, step * v) / step for v in vectors]
        additive = _relative(quotients[0] + quotients[1], quotients[2])
        errors.append(max(map(_relative, exact, quotients)) - 3 * additive)
    return max(0.0, min(errors))


def _gradient_change(problem: BilevelProblem, point: Tensor, step: Tensor) -> float:
    """Change of the inner gradient by `step`, relative to that of the second derivatives."""
    expected = problem.hessian()(step)
    change = problem.gradient_change(point, step)
    return float(change.norm() / expected.norm()) if bool(change.any()) else 1.0


def _relative(a: Tensor, b: Tensor) -> float:
    scale = float(torch.maximum(a.norm(), b.norm()))
    return float((a - b).norm()) / scale if scale else 0.0


def _scales(params: Sequence[Tensor]) -> Tensor:
    """(n,): the size of each entry, or of its tensor if that is larger; where a tensor is zero, of all parameters."""
    overall = float(flat(params).square().mean().sqrt()) or 1.0
    means = [float(flat([param]).square().mean().sqrt()) or overall if param.numel() else 1.0 for param in params]
    return flat([param.detach().abs().clamp(min=mean) for param, mean in zip(params, means, strict=True)])


def _masks(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    return [part.bool() for part in cut(flat, params)]


def _directions(size: int, most: int) -> Tensor:
    """(m, size)"""
    if size <= most:
        return torch.eye(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    basis: Tensor = torch.linalg.qr(torch.randn(size, most, dtype=torch.float64, generator=generator)).Q
    return basis.T


def _normal(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)
