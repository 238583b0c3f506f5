"""Two losses and their parameters as `verify_hypergradient` varies them, with the inner problem solved anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from auxfast.autograd.engine import spread, zeros_for_none
from auxfast.implicit.curvature import Curvature, in_widest_dtype, on_one_dtype
from auxfast.implicit.derivatives import CurvatureName, derivatives_of
from auxfast.implicit.free_entries import FreeCurvature, project
from auxfast.implicit.hypergradient import hypergradient
from auxfast.implicit.losses import Loss, LossFns, mean_gradient, mean_loss, mean_loss_and_gradient
from auxfast.solvers import MINRES, Solver, SolveStats

_NEWTON_STEPS = 20
_NEWTON_SOLVER = MINRES(steps=500, tol=1e-6)


@dataclass(frozen=True)
class Solved:
    """The inner problem after it was solved anew."""

    outer_loss: float
    point: Tensor  # (n,), the inner parameters
    gradient: Tensor  # (n,), of the inner loss


@dataclass(frozen=True)
class BilevelProblem:
    """Losses and the parameters that they are varied in. Vectors (n,) hold all of those, in float64."""

    outer_loss: Loss
    inner_loss: Loss
    outer_fns: LossFns  # the same two, checked
    inner_fns: LossFns
    inner: list[Tensor]  # those with requires_grad
    outer: list[Tensor]  # those with requires_grad
    masks: list[Tensor | None]  # the entries of `inner` that move
    solve_inner: Callable[[], object] | None
    curvature: CurvatureName

    @property
    def eps(self) -> float:
        """The coarsest machine precision of the inner parameters."""
        return coarsest_eps(self.inner)

    @property
    def exact_curvature(self) -> CurvatureName:
        """The curvature that stands for the Hessian, whichever is verified."""
        return "finite-difference" if self.curvature == "finite-difference" else "hessian"

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
        return directions @ flat(result.grads), result.stats

    def solved_at(self, point: Tensor, outer_values: Tensor) -> Solved:
        """The inner problem solved for `outer_values` (n,), starting from the inner values `point`."""
        assign(self.inner, point)
        assign(self.outer, outer_values)
        (self.solve_inner or self._minimise)()
        return Solved(mean_loss(self.outer_fns).item(), flat(self.inner), flat(self.inner_gradient()))

    def inner_gradient(self) -> list[Tensor]:
        """Zeros for entries that do not move."""
        return project(self._gradient(self.inner_fns), self.masks)

    def inner_gradient_at(self, point: Tensor) -> Tensor:
        """(n,) -> (n,)"""
        assign(self.inner, point)
        return flat(self.inner_gradient())

    def gradient_change(self, point: Tensor, step: Tensor) -> Tensor:
        """Half of the difference of the inner gradients at `point + step` and `point - step`; all (n,)."""
        change = (self.inner_gradient_at(point + step) - self.inner_gradient_at(point - step)) / 2
        assign(self.inner, point)
        return change

    def _gradient(self, loss_fns: LossFns) -> list[Tensor]:
        return zeros_for_none(mean_gradient(loss_fns, self.inner), self.inner)

    def hessian(self) -> Callable[[Tensor], Tensor]:
        """Products with the inner Hessian at the parameters as they are, (n,) -> (n,). They are exact where there are
        second derivatives, whatever curvature is verified."""
        operator = self._operator()

        def product(vector: Tensor) -> Tensor:
            return flat(self._of_all(operator(list(compress(cut(vector, self.inner), operator.in_system))), operator))

        return product

    def _operator(self) -> Curvature:
        derivatives = derivatives_of(self.exact_curvature, self.inner_fns, self.inner, (), retain_graph=False)
        return FreeCurvature(on_one_dtype(derivatives), self.masks)

    def _of_all(self, tensors: Sequence[Tensor], operator: Curvature) -> list[Tensor]:
        """One tensor for each of `inner`: those of parameters in the system, and zeros for the others."""
        return zeros_for_none(spread(tensors, operator.in_system), self.inner)

    def outer_solution(self) -> list[Tensor]:
        """`H^-1 d outer / d W`, by a solver that is not the one to verify."""
        return self._solve(self._gradient(self.outer_fns))

    def _solve(self, rhs: Sequence[Tensor]) -> list[Tensor]:
        operator = self._operator()
        b = in_widest_dtype(list(compress(project(rhs, self.masks), operator.in_system)))
        return self._of_all(_NEWTON_SOLVER.solve(operator, b)[0] if b else (), operator)

    def _minimise(self) -> None:
        lbfgs = torch.optim.LBFGS(
            self.inner,
            max_iter=1000,
            history_size=20,
            tolerance_grad=self.eps,
            tolerance_change=self.eps**2,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, gradient = mean_loss_and_gradient(self.inner_fns, self.inner)
            for param, grad in zip(self.inner, project(gradient, self.masks), strict=True):
                param.grad = grad
            return loss

        lbfgs.step(closure)
        self._polish()

    def _polish(self) -> None:
        """Takes steps of Newton's method: a line search stalls where the loss no longer changes in its last digits, and
        the finite differences need the minimum far more exactly than that."""
        gradient = self.inner_gradient()
        norm = float(flat(gradient).norm())
        for _ in range(_NEWTON_STEPS):
            update = self._solve(gradient)
            _add_(self.inner, update, -1)
            gradient = self.inner_gradient()
            before, norm = norm, float(flat(gradient).norm())
            if not norm < before:
                _add_(self.inner, update, 1)
            if not norm < before / 2:
                return


@contextmanager
def restored(params: Sequence[Tensor]) -> Iterator[None]:
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


def coarsest_eps(params: Iterable[Tensor]) -> float:
    """The coarsest machine precision of the parameters."""
    return max(torch.finfo(param.dtype).eps for param in params)


def cut(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """(n,) -> tensors of the shapes, the dtypes and on the devices of `params`"""
    parts = vector.split([param.numel() for param in params])
    return [part.view(param.shape).to(param) for part, param in zip(parts, params, strict=True)]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """(n,), float64, on the CPU"""
    return torch.cat([tensor.detach().reshape(-1).to("cpu", torch.float64) for tensor in tensors])


def assign(params: Sequence[Tensor], values: Tensor) -> None:
    """Writes the values (n,) into the parameters."""
    with torch.no_grad():
        for param, part in zip(params, cut(values, params), strict=True):
            param.copy_(part)


def _add_(params: Sequence[Tensor], values: Sequence[Tensor], scale: float) -> None:
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.add_(value, alpha=scale)
