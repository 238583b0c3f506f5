"""A check of the hypergradient on a user's own problem, against what needs no implicit function theorem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.hypergradient import hypergradient
from auxfast.implicit.losses import LossGraph
from auxfast.solvers import MINRES, Dense, Solver, SolveStats
from auxfast.solvers.base import check_positive, check_solver, check_steps

Loss = Callable[[], Tensor]

_NEWTON_STEPS = 20
_NEWTON_SOLVER = MINRES(steps=500, tol=1e-6)


@dataclass(frozen=True)
class Agreement:
    """How near one gradient is to another that is held for true."""

    cosine: float
    """Cosine of the angle between them; 1 is the same direction. NaN if one of them is zero."""
    relative_error: float
    """`||gradient - truth|| / ||truth||`; 0 if both are zero."""

    @staticmethod
    def of(gradient: Tensor, truth: Tensor) -> Agreement:
        """gradient, truth: (n,)"""
        norms = float(gradient.norm()) * float(truth.norm())
        error = float((gradient - truth).norm())
        scale = float(truth.norm())
        return Agreement(
            cosine=float(gradient @ truth) / norms if norms else math.nan,
            relative_error=error / scale if scale else (math.inf if error else 0.0),
        )

    def __str__(self) -> str:
        return f"cosine {self.cosine:.6f}, relative error {self.relative_error:.2e}"


@dataclass(frozen=True)
class HypergradientReport:
    """What `verify_hypergradient` found; `print` it for a reading.

    Derivatives are along `directions` of the outer parameters, all flattened behind one another in their order.
    """

    directions: Tensor
    """(m, n): unit vectors; the coordinate axes if there are few outer parameters, else random and orthogonal."""
    hypergradient: Tensor
    """(m,): the solver's hypergradient at the given inner parameters."""
    dense: Tensor | None
    """(m,): the hypergradient with an exact solve at the same parameters; `None` if the system was too large."""
    finite_differences: Tensor
    """(m,): differences of the outer loss, with the inner problem solved anew on both sides."""
    stats: SolveStats
    """Statistics of the linear solve."""
    inner_gradient_norm: float
    """Norm of the inner gradient at the given parameters. The implicit function theorem assumes 0."""
    resolved_gradient_norm: float
    """Largest norm of the inner gradient where the inner problem was solved anew. It limits how far the finite
    differences can be trusted."""

    @property
    def solver(self) -> Agreement | None:
        """The solver's hypergradient against the dense solve: is the linear system solved?"""
        return None if self.dense is None else Agreement.of(self.hypergradient, self.dense)

    @property
    def total(self) -> Agreement:
        """The solver's hypergradient against the finite differences: is it the derivative of what training does?"""
        return Agreement.of(self.hypergradient, self.finite_differences)

    def __str__(self) -> str:
        solver = "not done: the system is too large" if self.solver is None else str(self.solver)
        residual = "not certified" if math.isnan(self.stats.residual) else f"{self.stats.residual:.2e}"
        return "\n".join(
            [
                f"against the dense solve       {solver}",
                f"against finite differences    {self.total}",
                f"linear system                 residual {residual} after {self.stats.matvecs} "
                f"products, {self.stats.stop_reason}",
                f"norm of the inner gradient    {self.inner_gradient_norm:.2e} as given, "
                f"{self.resolved_gradient_norm:.2e} where solved anew",
            ]
        )


def verify_hypergradient(
    outer_loss: Loss,
    inner_loss: Loss,
    inner_params: Iterable[Tensor],
    outer_params: Iterable[Tensor],
    *,
    solver: Solver | None = None,
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

    Args:
        outer_loss, inner_loss: functions of no arguments that compute the loss from the parameters; deterministic but
            for torch's random numbers, which are replayed at each call.
        inner_params, outer_params: as for `hypergradient`; leaves, since they are varied in place.
        solver: what is verified; `None`: the default, `MINRES()`.
        solve_inner: minimises the inner loss in `inner_params`, in place; called at varied `outer_params`. `None`:
            torch's L-BFGS and then Newton's method, which suits smooth problems of moderate size.
        step: length of the finite differences, relative to max(1, norm of the outer parameters); `None`: the cube root
            of the precision of the inner parameters' dtype.
        max_directions: up to so many outer parameters are each varied; of more, so many random directions.
        max_dense: systems with more inner parameters are not solved densely.

    Raises:
        TypeError: a loss that is not a function, or a solver that is none.
        ValueError: a setting outside its range, parameters that are not leaves, or what `hypergradient` raises.
    """
    for name, loss in (("outer_loss", outer_loss), ("inner_loss", inner_loss)):
        if isinstance(loss, Tensor) or not callable(loss):
            raise TypeError(f"{name} must be a function of no arguments, since it is evaluated again: lambda: ...")
    if solver is not None:
        check_solver(solver)
    check_steps("max_directions", max_directions)
    inner, outer = list(inner_params), list(outer_params)
    if any(not param.is_leaf for param in (*inner, *outer)):
        raise ValueError("inner_params and outer_params must be leaves: their values are varied in place")
    varied = [param for param in outer if param.requires_grad]
    if not varied:
        raise ValueError("outer_params has no parameter with requires_grad=True: there is nothing to verify")
    if step is None:
        step = torch.finfo(inner[0].dtype).eps ** (1 / 3)
    check_positive("step", step)
    active = [param for param in inner if param.requires_grad]
    with preserved_state() as guard, _restored([*active, *outer]):
        problem = _Problem(
            guard.replay(outer_loss),
            guard.replay(inner_loss),
            active,
            varied,
            None if solve_inner is None else guard.replay(solve_inner),
        )
        return _verify(problem, solver or MINRES(), step, max_directions, max_dense)


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


@dataclass(frozen=True)
class _Problem:
    outer_loss: Loss
    inner_loss: Loss
    inner: list[Tensor]  # those with requires_grad
    outer: list[Tensor]  # those with requires_grad
    solve_inner: Callable[[], object] | None

    def derivatives(self, directions: Tensor, solver: Solver) -> tuple[Tensor, SolveStats]:
        """Hypergradient along the directions: (m, n) -> (m,)."""
        result = hypergradient(self.outer_loss(), self.inner_loss(), self.inner, self.outer, solver=solver, warn=False)
        return directions @ _flat(result.grads), result.stats

    def outer_at(self, point: Sequence[Tensor], outer_values: Tensor) -> tuple[float, float]:
        """Outer loss where the inner problem is solved for `outer_values` (n,), starting from the inner values
        `point`; and the norm of the inner gradient there."""
        with torch.no_grad():
            for param, value in zip(self.inner, point, strict=True):
                param.copy_(value)
            for param, part in zip(self.outer, outer_values.split([p.numel() for p in self.outer]), strict=True):
                param.copy_(part.view(param.shape))
        (self.solve_inner or self._minimise)()
        norm = float(_flat(self.inner_gradient()).norm())
        return self.outer_loss().item(), norm

    def inner_gradient(self, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            self.inner_loss(), self.inner, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )

    def _minimise(self) -> None:
        epsilon = torch.finfo(self.inner[0].dtype).eps
        lbfgs = torch.optim.LBFGS(
            self.inner,
            max_iter=1000,
            history_size=20,
            tolerance_grad=epsilon,
            tolerance_change=epsilon**2,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            lbfgs.zero_grad()
            loss = self.inner_loss()
            loss.backward(inputs=self.inner)
            return loss

        lbfgs.step(closure)
        self._polish()

    def _polish(self) -> None:
        """Takes steps of Newton's method: a line search stalls where the loss no longer changes in its last digits, and
        the finite differences need the minimum far more exactly than that."""
        norm = float(_flat(self.inner_gradient()).norm())
        for _ in range(_NEWTON_STEPS):
            hessian = Hessian(LossGraph("inner_loss", self.inner_loss()), self.inner)
            gradient = list(compress(self.inner_gradient(), hessian.in_system))
            update, _ = _NEWTON_SOLVER.solve(hessian, gradient)
            _add_(hessian.params, update, -1)
            before, norm = norm, float(_flat(self.inner_gradient()).norm())
            if not norm < before:
                _add_(hessian.params, update, 1)
            if not norm < before / 2:
                return


def _verify(problem: _Problem, solver: Solver, step: float, max_directions: int, max_dense: int) -> HypergradientReport:
    phi, w = _flat(problem.outer), [param.detach().clone() for param in problem.inner]
    directions = _directions(len(phi), max_directions)
    given_norm = float(_flat(problem.inner_gradient()).norm())
    derivatives, stats = problem.derivatives(directions, solver)
    dense = None
    if sum(param.numel() for param in problem.inner) <= max_dense:
        dense, _ = problem.derivatives(directions, Dense(max_size=max_dense))
    length = step * max(1.0, float(phi.norm()))
    differences, norms = [], []
    for direction in directions:
        above, norm_above = problem.outer_at(w, phi + length * direction)
        below, norm_below = problem.outer_at(w, phi - length * direction)
        differences.append((above - below) / (2 * length))
        norms += [norm_above, norm_below]
    return HypergradientReport(
        directions, derivatives, dense, torch.tensor(differences, dtype=torch.float64), stats, given_norm, max(norms)
    )


def _add_(params: Sequence[Tensor], values: Sequence[Tensor], scale: float) -> None:
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.add_(value, alpha=scale)


def _directions(size: int, most: int) -> Tensor:
    """(m, size)"""
    if size <= most:
        return torch.eye(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    basis: Tensor = torch.linalg.qr(torch.randn(size, most, dtype=torch.float64, generator=generator)).Q
    return basis.T


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """(n,), float64, on the CPU"""
    return torch.cat([tensor.detach().reshape(-1).to("cpu", torch.float64) for tensor in tensors])
