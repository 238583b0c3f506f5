"""The solver that differentiates one update of the inner training's own optimizer: SAMA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxfast.solvers.base import Matvec, SolverState, SolveStats
from auxfast.solvers.known_solution import KnownSolution, MixedProduct, check_mixed, without_certificate
from auxfast.solvers.param_groups import groups_of


@dataclass(frozen=True)
class SAMA(KnownSolution):
    """`x = D b`, where D is the derivative, a diagonal, of the inner optimizer's last update in the gradient that it
    was made with: one step back through the optimizer instead of `H^-1` (Choe et al. 2023; betty has it by this name).

    For `torch.optim.SGD` D is the learning rate of the group, times `1 - dampening` with momentum, and `1 + momentum`
    with Nesterov's. For `torch.optim.Adam` and `AdamW`, with the bias-corrected moments m and v of the state, the
    gradient g, `s = sqrt(v)` and step t,

        D = lr * d/dg [ m / (s + eps) ]  =  lr / (s + eps) * (a - c m g / (s (s + eps))),
        a = (1 - beta1) / (1 - beta1^t),    c = (1 - beta2) / (1 - beta2^t).

    That is betty's formula with the bias corrections, which betty leaves out. g is read from `.grad`, so call this
    before `zero_grad()` clears it. Where it is None the second term is left out, a percent of the first once training
    is under way. A parameter that has made no step yet has D = 0, as Adam's first step has.

    No product with H is spent, so `stats.residual` is NaN, not known, and `converged` is False. Cost in gradients: see
    `OneStep`.

    Args:
        optimizer: that of the inner parameters. Its state and settings are read at each call.
        mixed: "difference", betty's choice, which needs functions for `inner_loss`; or "exact". See `OneStep`.

    Raises:
        TypeError: an optimizer other than SGD, Adam and AdamW.
        ValueError: another `mixed`, or an optimizer with `maximize` or `amsgrad`.
    """

    optimizer: torch.optim.Optimizer
    mixed: MixedProduct = "difference"

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)):
            raise TypeError(
                f"optimizer must be a torch.optim.SGD, Adam or AdamW, not a {type(self.optimizer).__name__}: take "
                "OneStep(lr)"
            )
        for name in ("maximize", "amsgrad"):
            if any(group.get(name) for group in self.optimizer.param_groups):
                raise ValueError(f"optimizer must be without {name}: take OneStep(lr)")
        check_mixed(self.mixed)

    def __repr__(self) -> str:
        return f"SAMA({type(self.optimizer).__name__}, mixed={self.mixed!r})"

    @torch.no_grad()
    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """`D rhs`; see `Solver.solve`. `matvec` is not called, and `state` is left as it is. The right-hand side is for
        `matvec.params`, or for all parameters of the optimizer in order where `matvec` does not tell.

        Raises:
            ValueError: a parameter that the optimizer does not have, or parameters of other shapes than `rhs`; an
                Adam that has made no step; or see `LinearSystem`.
        """
        stats = without_certificate(matvec, rhs, batched)
        params = getattr(matvec, "params", None)
        if params is None:
            params = [param for group in self.optimizer.param_groups for param in group["params"]]
        shapes = [tuple(b.shape[1:] if batched else b.shape) for b in rhs]
        if shapes != (wanted := [tuple(_own_piece(param).shape) for param in params]):
            raise ValueError(f"rhs must have the shapes of the optimizer's parameters, {wanted}, not {shapes}")
        groups = groups_of(self.optimizer, params)
        if not isinstance(self.optimizer, torch.optim.SGD) and not any(map(self.optimizer.state.get, params)):
            raise ValueError("optimizer must have made a step of inner_params: its state is empty")
        triples = zip(rhs, params, groups, strict=True)
        return [(b * _own_piece(self._derivative(param, group))).to(b.dtype) for b, param, group in triples], stats

    def _derivative(self, param: Tensor, group: dict[str, Any]) -> Tensor | float:
        """The derivative of `param`'s update in its gradient, elementwise."""
        if isinstance(self.optimizer, torch.optim.SGD):
            momentum = float(group["momentum"])
            of_buffer = 1 - float(group["dampening"]) if momentum else 1.0
            return float(group["lr"]) * (1 + momentum * of_buffer if group["nesterov"] else of_buffer)
        state = self.optimizer.state.get(param)
        return _derivative_of_adam(param, group, state) if state else 0.0


def _own_piece(values: Any) -> Any:
    """The entries that this rank has, of the state of a parameter of `fully_shard`; else the values themselves."""
    return values.to_local() if hasattr(values, "to_local") else values


def _derivative_of_adam(param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    beta1, beta2 = map(float, group["betas"])
    lr, decay, step = float(group["lr"]), float(group["weight_decay"]), float(state["step"])
    rate1, rate2 = (1 - beta1) / (1 - beta1**step), (1 - beta2) / (1 - beta2**step)
    mean: Tensor = state["exp_avg"]
    root = state["exp_avg_sq"].div(1 - beta2**step).sqrt_()
    denominator: Tensor = root + group["eps"]
    if param.grad is None:
        return denominator.reciprocal().mul_(lr * rate1)
    gradient = param.grad
    if decay and not group.get(
        "decoupled_weight_decay"
    ):  # which was added to the gradient, at the parameter as it was before the update
        update = mean / denominator * (lr / (1 - beta1**step))
        gradient = gradient + decay * (param + update)
    # Where v is 0, so are m and g.
    second = (mean * gradient).div_(root.clamp_(min=torch.finfo(root.dtype).tiny)).div_(denominator)
    return second.mul_(-rate2 / (1 - beta1**step)).add_(rate1).div_(denominator).mul_(lr)
