"""An optimizer of outer parameters: hypergradient, clipping, a torch optimizer's step, and projection."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor

from auxfast.implicit.hypergradient import CurvatureName, hypergradient
from auxfast.implicit.losses import Loss
from auxfast.solvers import MINRES
from auxfast.solvers.base import Solver, SolverState, SolveStats, check_positive, check_solver

_DEFAULT_SOLVER = MINRES()


class Projectable(Protocol):
    """Something that can move its parameters back into the set where they belong, as a combiner can."""

    def project_(self) -> Any: ...


class HyperOptimizer:
    """Updates the parameters of a torch optimizer along their hypergradient, as the paper's Algorithm 1 does.

    Args:
        optimizer: holds the outer parameters, in its parameter groups, and makes the update.
        solver, curvature, warn: see `hypergradient`. What the solver learns in one step, and which warnings were given,
            is kept for the next in `state`.
        max_grad_norm: hypergradients of a larger total norm are scaled down to it; `None`: as they are.
        project: modules whose `project_()` is called after each update.

    Raises:
        TypeError: `optimizer` is not a torch optimizer, `solver` no solver, or something in `project` has no
            `project_()`.
        ValueError: `max_grad_norm` is not above 0.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        solver: Solver = _DEFAULT_SOLVER,
        curvature: CurvatureName = "hessian",
        max_grad_norm: float | None = None,
        project: Sequence[Projectable] = (),
        warn: bool = True,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not a {type(optimizer).__name__}")
        check_solver(solver)
        if max_grad_norm is not None:
            check_positive("max_grad_norm", max_grad_norm)
        modules: Any = project
        if isinstance(modules, torch.nn.Module) or not all(hasattr(module, "project_") for module in modules):
            raise TypeError("project must be a list of modules that have project_()")
        self.optimizer = optimizer
        self.solver = solver
        self.curvature = curvature
        self.warn = warn
        self.state = SolverState()
        self.max_grad_norm = max_grad_norm
        self.project = tuple(project)

    def step(
        self,
        outer_loss: Loss,
        inner_loss: Loss,
        inner_params: Iterable[Tensor],
        *,
        outputs: Tensor | Sequence[Tensor] | None = None,
        retain_graph: bool = False,
    ) -> SolveStats:
        """One update of the outer parameters; arguments and errors are those of `hypergradient`.

        The hypergradient replaces their `.grad`. If not even x = 0 could be certified (`stats.residual` is `inf`: the
        products overflow), the parameters stay as they are.
        """
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        result = hypergradient(
            outer_loss,
            inner_loss,
            inner_params,
            params,
            solver=self.solver,
            curvature=self.curvature,
            outputs=outputs,
            state=self.state,
            retain_graph=retain_graph,
            warn=self.warn,
        )
        if math.isinf(result.stats.residual):
            return result.stats
        for param, grad in zip(params, self._clipped(result.grads), strict=True):
            param.grad = grad if param.requires_grad else None
        self.optimizer.step()
        for module in self.project:
            module.project_()
        return result.stats

    def _clipped(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.max_grad_norm is None:
            return grads
        norm = torch.nn.utils.get_total_norm(grads)
        scale = (self.max_grad_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
        return [grad * scale.to(grad.device, grad.dtype) for grad in grads]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears `.grad` of the outer parameters, where the inner loss's backward() leaves its own."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of the torch optimizer, and `state`, which the solver keeps. A run that goes on from here gives the
        same numbers as one without a break."""
        return {**self.optimizer.state_dict(), "solver_state": dict(vars(self.state))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or the state of a torch optimizer, from which the solver learns nothing."""
        self.optimizer.load_state_dict(state_dict)
        self.state = SolverState(**deepcopy(state_dict.get("solver_state", {})))
