"""A check of the hypergradient on a user's own problem, against what needs no implicit function theorem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxfast.autograd.engine import zeros_for_none
from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit.arguments import as_tuple
from auxfast.implicit.curvature import Curvature, Hessian, in_widest_dtype, on_one_dtype
from auxfast.implicit.finite import NotFiniteError
from auxfast.implicit.finite_difference import FiniteDifference
from auxfast.implicit.free_entries import Free, FreeCurvature, free_masks, project
from auxfast.implicit.hypergradient import CurvatureName, hypergradient
from auxfast.implicit.kinks import find_kinks
from auxfast.implicit.losses import LossFn, as_loss_fns
from auxfast.implicit.report import RIGHT, Agreement, HypergradientReport
from auxfast.solvers import MINRES, Dense, Solver, SolveStats, StopReason
from auxfast.solvers.base import check_positive, check_solver, check_steps

Loss = Callable[[], Any]

_NEWTON_STEPS = 20
_NEWTON_SOLVER = MINRES(steps=500, tol=1e-6)
_NOT_FINITE = SolveStats(0, 0, residual=math.inf, converged=False, stop_reason=StopReason.NOT_FINITE)
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

    Args:
        outer_loss, inner_loss: functions of no arguments that compute the loss from the parameters; deterministic but
            for torch's random numbers, which are replayed at each call.
        inner_params, outer_params: as for `hypergradient`; leaves, since they are varied in place.
        solver: what is verified; `None`: the default, `MINRES()`.
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

    Raises:
        TypeError: a loss that is not a function, parameters that are not an iterable of tensors, `free` that is none of
            masks, or a solver that is none.
        ValueError: a setting outside its range; parameters that are none, not leaves or without any
            `requires_grad=True`; a loss that is not finite, or of two values at the same parameters; or what
            `hypergradient` raises.
        NotFiniteError: as `hypergradient` does, unless entries at kinks explain it, which the report then says.
    """
    for name, loss in (("outer_loss", outer_loss), ("inner_loss", inner_loss)):
        if isinstance(loss, Tensor) or not callable(loss):
            raise TypeError(
                f"{name} must be a function of no arguments, since it is evaluated again, not a {type(loss).__name__}: "
                "lambda: ..."
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
    if step is None:
        step = _epsilon(active) ** (1 / 3)
    check_positive("step", step)
    with preserved_state() as guard, _restored([*active, *outer]):
        replayed_outer, replayed_inner = guard.replay(outer_loss), guard.replay(inner_loss)
        (outer_graph,) = as_loss_fns("outer_loss", replayed_outer, _as_it_is)
        (inner_graph,) = as_loss_fns("inner_loss", replayed_inner, _as_it_is, curvature == "gauss-newton")
        _check_values(outer_loss=outer_graph, inner_loss=inner_graph)
        problem = _Problem(
            replayed_outer,
            replayed_inner,
            outer_graph,
            inner_graph,
            active,
            [param for param in outer if param.requires_grad],
            masks,
            None if solve_inner is None else guard.replay(solve_inner),
            curvature,
        )
        report = _verify(problem, solver or MINRES(), step, max_directions, max_dense)
    if report.suggested_free is None:
        return report
    suggested = iter(report.suggested_free)
    return replace(report, suggested_free=tuple(next(suggested) if param.requires_grad else None for param in inner))


def _as_it_is(function: Loss) -> Loss:
    return function


def _check_values(**losses: LossFn) -> None:
    """Raises ValueError where a loss is not finite, or differs between two calls by more than summation in another
    order could make it."""
    for name, compute in losses.items():
        loss = compute().loss
        first, second = loss.item(), compute().loss.item()
        if not (math.isfinite(first) and math.isfinite(second)):
            raise ValueError(f"{name} is {first} at the given parameters: there is nothing to verify")
        if abs(first - second) > torch.finfo(loss.dtype).eps ** (2 / 3) * abs(first):
            raise ValueError(
                f"{name} is not deterministic: two calls at the same parameters gave {first:.9g} and {second:.9g}. "
                "torch's random numbers are replayed; draw all others, and batches, once and outside of the function"
            )


@contextmanager
def _restored(params: Sequence[Tensor]) -> Iterator[None]:
    """Puts the values of the parameters and their `.grad` back in the end."""
    values = [(param.detach().clone(), param.grad) for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for param, (value, grad) in zip(params, values, strict=True):
                param.copy_(value)
                param.grad = grad
        torch.clear_autocast_cache()  # of casts of what was moved, which the user's next forward pass would take


@dataclass(frozen=True)
class _Solved:
    """Where the inner problem was solved anew."""

    outer_loss: float
    point: Tensor  # (n,), the inner parameters
    gradient: Tensor  # (n,), of the inner loss


@dataclass(frozen=True)
class _Problem:
    outer_loss: Loss
    inner_loss: Loss
    outer_graph: LossFn  # the same two, checked
    inner_graph: LossFn
    inner: list[Tensor]  # those with requires_grad
    outer: list[Tensor]  # those with requires_grad
    masks: list[Tensor | None]  # of `inner`: the entries that move
    solve_inner: Callable[[], object] | None
    curvature: CurvatureName

    def derivatives(self, directions: Tensor, solver: Solver) -> tuple[Tensor, SolveStats]:
        """Hypergradient along the directions: (m, n) -> (m,)."""
        result = hypergradient(
            self.outer_loss,
            self.inner_loss,
            self.inner,
            self.outer,
            solver=solver,
            curvature=self.curvature,
            free=self.masks,
            warn=False,
        )
        return directions @ _flat(result.grads), result.stats

    def solved_at(self, point: Tensor, outer_values: Tensor) -> _Solved:
        """The inner problem solved for `outer_values` (n,), starting from the inner values `point`."""
        _assign(self.inner, point)
        _assign(self.outer, outer_values)
        (self.solve_inner or self._minimise)()
        return _Solved(self.outer_graph().loss.item(), _flat(self.inner), _flat(self.inner_gradient()))

    def inner_gradient(self) -> list[Tensor]:
        """Zeros for entries that do not move."""
        return project(self._gradient(self.inner_graph), self.masks)

    def inner_gradient_at(self, point: Tensor) -> Tensor:
        """(n,) -> (n,)"""
        _assign(self.inner, point)
        return _flat(self.inner_gradient())

    def gradient_change(self, point: Tensor, step: Tensor) -> Tensor:
        """Half of the difference of the inner gradients at `point + step` and `point - step`; all (n,)."""
        change = (self.inner_gradient_at(point + step) - self.inner_gradient_at(point - step)) / 2
        _assign(self.inner, point)
        return change

    def _gradient(self, graph: LossFn) -> list[Tensor]:
        return zeros_for_none(graph().gradient(self.inner), self.inner)

    def operator(self) -> Curvature:
        """Exact second derivatives where there are some, whatever is verified."""
        if self.curvature == "finite-difference":
            return FreeCurvature(on_one_dtype(FiniteDifference([self.inner_graph], self.inner)), self.masks)
        return FreeCurvature(on_one_dtype(Hessian(self.inner_graph(), self.inner)), self.masks)

    def outer_solution(self) -> list[Tensor]:
        """`H^-1 d outer / d W`, by a solver that is not the one to verify."""
        return self._solve(self._gradient(self.outer_graph))

    def _solve(self, rhs: Sequence[Tensor]) -> list[Tensor]:
        operator = self.operator()
        b = in_widest_dtype(list(compress(project(rhs, self.masks), operator.in_system)))
        x = iter(_NEWTON_SOLVER.solve(operator, b)[0] if b else ())
        return [
            next(x) if inside else torch.zeros_like(w) for w, inside in zip(self.inner, operator.in_system, strict=True)
        ]

    def _minimise(self) -> None:
        epsilon = _epsilon(self.inner)
        lbfgs = torch.optim.LBFGS(
            self.inner,
            max_iter=1000,
            history_size=20,
            tolerance_grad=epsilon,
            tolerance_change=epsilon**2,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss = self.inner_graph()
            for param, grad in zip(self.inner, project(loss.gradient(self.inner), self.masks), strict=True):
                param.grad = grad
            return loss.loss

        lbfgs.step(closure)
        self._polish()

    def _polish(self) -> None:
        """Takes steps of Newton's method: a line search stalls where the loss no longer changes in its last digits, and
        the finite differences need the minimum far more exactly than that."""
        gradient = self.inner_gradient()
        norm = float(_flat(gradient).norm())
        for _ in range(_NEWTON_STEPS):
            update = self._solve(gradient)
            _add_(self.inner, update, -1)
            gradient = self.inner_gradient()
            before, norm = norm, float(_flat(gradient).norm())
            if not norm < before:
                _add_(self.inner, update, 1)
            if not norm < before / 2:
                return


def _verify(problem: _Problem, solver: Solver, step: float, max_directions: int, max_dense: int) -> HypergradientReport:
    phi, w = _flat(problem.outer), _flat(problem.inner)
    eps = max(torch.finfo(param.dtype).eps for param in problem.inner)
    directions = _directions(len(phi), max_directions)
    given = problem
    given_norm = float(_flat(given.inner_gradient()).norm())
    is_free, scales = (
        _flat(project([torch.ones_like(param) for param in given.inner], given.masks)).bool(),
        _scales(given.inner),
    )
    held, oblique = find_kinks(given.inner_gradient_at, w, torch.where(is_free, scales, 0), eps)
    _assign(given.inner, w)
    dense = None
    try:
        derivatives, stats = given.derivatives(directions, solver)
        if len(w) <= max_dense:
            dense, _ = given.derivatives(directions, Dense(max_size=max_dense))
    except NotFiniteError:
        if not bool(held.any()):
            raise
        derivatives, stats = torch.full((len(directions),), math.nan, dtype=torch.float64), _NOT_FINITE  # for the kinks
    problem = replace(given, masks=_masks(is_free & ~held, given.inner))

    generator = torch.Generator().manual_seed(0)
    solution = _flat(problem.outer_solution())
    noise = torch.where(is_free & ~held, scales * _normal(len(w), generator), 0)
    recorded_error = None
    if problem.curvature != "finite-difference" and not oblique:
        along = solution * float(noise.norm()) / max(float(solution.norm()), torch.finfo(w.dtype).tiny)
        recorded_error = _recorded_error(problem, w, [noise, along], eps)
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
    problem: _Problem, w: Tensor, phi: Tensor, directions: Tensor, length: float, solution: Tensor
) -> _FiniteDifferences:
    """Along each of `directions` (m, n). Where an inner gradient g is left, the outer loss is about `<x, g>` above that
    at the minimum, with `x = solution`; entries that stay in place need not have g = 0."""
    eps = max(torch.finfo(param.dtype).eps for param in problem.inner)
    differences, errors, norms = [], [], []
    moved, against = torch.zeros_like(w, dtype=torch.bool), torch.zeros_like(w)
    for direction in directions:
        above, below = (problem.solved_at(w, phi + sign * length * direction) for sign in (1, -1))
        here = (above.point != w) | (below.point != w)
        left = torch.where(here if bool(here.any()) else ~here, above.gradient - below.gradient, 0)
        rounding = eps * max(abs(above.outer_loss), abs(below.outer_loss))
        differences.append((above.outer_loss - below.outer_loss) / (2 * length))
        errors.append((abs(float(solution @ left)) / 2 + rounding) / length)
        norms += [float(above.gradient.norm()), float(below.gradient.norm())]
        moved |= here
        against = torch.maximum(above.gradient.abs(), below.gradient.abs())
    truth, error = torch.tensor(differences, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
    return _FiniteDifferences(
        truth,
        float(error.norm() / truth.norm()) if bool(error.any()) else 0.0,  # inf where the truth is 0
        float(torch.tensor(norms).max()),
        ~moved & (against > _CLEARLY * torch.where(moved, against, 0).max()) & moved.any(),
    )


def _symmetry_error(problem: _Problem, generator: torch.Generator) -> float:
    """About `||H - H^T|| / ||H||`, Frobenius norms: the mean squares of `<u, H v> - <v, H u>` and `<u, H v>`."""
    operator, size = problem.operator(), sum(param.numel() for param in problem.inner)
    differences, squares = 0.0, 0.0
    for _ in range(_SYMMETRY_PAIRS):
        u, v = _normal(size, generator), _normal(size, generator)
        uhv, vhu = (float(a @ _flat(_product(operator, _cut(b, problem.inner)))) for a, b in ((u, v), (v, u)))
        differences += (uhv - vhu) ** 2
        squares += (uhv**2 + vhu**2) / 2
    return math.sqrt(differences / squares) if squares else 0.0


def _recorded_error(problem: _Problem, point: Tensor, vectors: Sequence[Tensor], eps: float) -> float:
    """Relative difference of recorded products with two vectors (n,) and of differences of gradients, less three times
    the error of those, which shows in that they are not additive. The smaller one of two steps: the long one may cross
    kinks, and the short one suffers from rounding."""
    vectors = [*vectors, vectors[0] + vectors[1]]
    operator = problem.operator()
    exact = [_flat(_product(operator, _cut(v, problem.inner))) for v in vectors]
    errors = []
    for step in (eps ** (1 / 3), eps ** (1 / 2)):
        quotients = [problem.gradient_change(point, step * v) / step for v in vectors]
        additive = _relative(quotients[0] + quotients[1], quotients[2])
        errors.append(max(map(_relative, exact, quotients)) - 3 * additive)
    return max(0.0, min(errors))


def _gradient_change(problem: _Problem, point: Tensor, step: Tensor) -> float:
    """Change of the inner gradient by `step`, relative to that of the second derivatives."""
    expected = _flat(_product(problem.operator(), _cut(step, problem.inner)))
    change = problem.gradient_change(point, step)
    return float(change.norm() / expected.norm()) if bool(change.any()) else 1.0


def _relative(a: Tensor, b: Tensor) -> float:
    scale = float(torch.maximum(a.norm(), b.norm()))
    return float((a - b).norm()) / scale if scale else 0.0


def _product(curvature: Curvature, vectors: Sequence[Tensor]) -> list[Tensor]:
    """`H v` for vectors of all parameters, in the system or not."""
    products = iter(curvature(list(compress(vectors, curvature.in_system))))
    return [
        next(products) if inside else torch.zeros_like(v)
        for v, inside in zip(vectors, curvature.in_system, strict=True)
    ]


def _scales(params: Sequence[Tensor]) -> Tensor:
    """(n,): the size of each entry, or of its tensor if that is larger; where a tensor is zero, of all parameters."""
    overall = float(_flat(params).square().mean().sqrt()) or 1.0
    means = [float(_flat([param]).square().mean().sqrt()) or overall if param.numel() else 1.0 for param in params]
    return _flat([param.detach().abs().clamp(min=mean) for param, mean in zip(params, means, strict=True)])


def _cut(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """(n,) -> tensors of the shapes, the dtypes and on the devices of `params`"""
    parts = flat.split([param.numel() for param in params])
    return [part.view(param.shape).to(param) for part, param in zip(parts, params, strict=True)]


def _masks(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    return [part.bool() for part in _cut(flat, params)]


def _assign(params: Sequence[Tensor], values: Tensor) -> None:
    with torch.no_grad():
        for param, part in zip(params, _cut(values, params), strict=True):
            param.copy_(part)


def _add_(params: Sequence[Tensor], values: Sequence[Tensor], scale: float) -> None:
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.add_(value, alpha=scale)


def _epsilon(params: Iterable[Tensor]) -> float:
    """Precision of the narrowest dtype."""
    return max(torch.finfo(param.dtype).eps for param in params)


def _directions(size: int, most: int) -> Tensor:
    """(m, size)"""
    if size <= most:
        return torch.eye(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    basis: Tensor = torch.linalg.qr(torch.randn(size, most, dtype=torch.float64, generator=generator)).Q
    return basis.T


def _normal(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """(n,), float64, on the CPU"""
    return torch.cat([tensor.detach().reshape(-1).to("cpu", torch.float64) for tensor in tensors])
