"""The derivative of the outer loss after some steps of inner training, as a reference for hypergradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.engine import spread, zeros_for_none
from auxfast.implicit.derivatives import CurvatureName, derivatives_of
from auxfast.implicit.losses import LossFns, add, mean_gradient

State = dict[str, Tensor]
"""What an optimizer keeps of a parameter."""

_SAME = 0.01
"""Largest difference, relative to the move, of an optimizer's move and of what is known of it."""


def unrolled_gradient(
    outer_fns: LossFns,
    inner_fns: LossFns,
    inner: Sequence[Tensor],
    outer: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    curvature: CurvatureName,
) -> list[Tensor]:
    """Gradient of the outer loss after `steps` steps, in each of `outer`. The inner parameters are moved.

    The steps are taken on the parameters themselves, since the losses are functions of these, and pulled back one by
    one, the last first: through the optimizer's update, and through the inner gradient by a product with the Hessian
    and a mixed one. So one graph is in memory at a time, and the parameters, gradient and state before each step.
    """
    held = [w for group in optimizer.param_groups for w in group["params"]]
    own = deepcopy(optimizer, {id(w): w for w in held})  # its state is copied, the parameters are not
    groups = {id(w): group for group in own.param_groups for w in group["params"]}
    trajectory: list[list[_Move]] = []
    for _ in range(steps):
        gradient = mean_gradient(inner_fns, inner)
        trajectory.append([_Move.of(w, g, own, groups[id(w)]) for w, g in zip(inner, gradient, strict=True)])
        for w, g in zip(inner, gradient, strict=True):
            w.grad = None if g is None else g.clone()  # optimizers may write to it
        own.step()
    ends = [w.detach().clone() for w in inner]
    gradient = mean_gradient(outer_fns, [*inner, *outer])
    adjoint, total = zeros_for_none(gradient[: len(inner)], inner), gradient[len(inner) :]
    states: list[State] = [{} for _ in inner]
    for moves in reversed(trajectory):
        pulled = [m.pull_back(end, a, state) for m, end, a, state in zip(moves, ends, adjoint, states, strict=True)]
        ends, states = [move.value for move in moves], [state for _, _, state in pulled]
        with torch.no_grad():
            for w, value in zip(inner, ends, strict=True):
                w.copy_(value)
            derivatives = derivatives_of(curvature, inner_fns, inner, outer, retain_graph=False)
            chosen = list(compress([of_gradient for _, of_gradient, _ in pulled], derivatives.in_system))
            terms = spread(derivatives(chosen) if chosen else (), derivatives.in_system)
            adjoint = zeros_for_none(add([of_value for of_value, _, _ in pulled], terms), inner)
            total = add(total, derivatives.mixed(chosen, outer))
    return zeros_for_none(total, outer)


@dataclass(frozen=True)
class _Move:
    """What an optimizer's step starts from, for one parameter."""

    value: Tensor
    gradient: Tensor | None
    state: State
    group: dict[str, Any]
    update: Callable[[dict[str, Any], Tensor, Tensor, State], tuple[Tensor, State]]

    @staticmethod
    def of(w: Tensor, gradient: Tensor | None, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> _Move:
        kept = optimizer.state.get(w, {})
        state = {name: entry.clone() for name, entry in kept.items() if _is_real(entry)}
        return _Move(w.detach().clone(), gradient, state, group, _update_of(optimizer))

    def pull_back(self, end: Tensor, adjoint: Tensor, states: State) -> tuple[Tensor, Tensor, State]:
        """Cotangents of the parameter (but for what goes through its gradient), of the gradient and of the state before
        the step, from those after it.

        Raises:
            RuntimeError: the update is not the one that led to `end`.
        """
        if self.gradient is None:  # the optimizer has left the parameter as it was
            return adjoint, torch.zeros_like(adjoint), states
        value, gradient = (tensor.detach().requires_grad_() for tensor in (self.value, self.gradient))
        state = {name: entry.detach().requires_grad_(name != "step") for name, entry in self.state.items()}
        with torch.enable_grad():
            moved, after = self.update(self.group, value, gradient, state)
        rounding = 10 * torch.finfo(end.dtype).eps * end.norm()
        if bool((moved.detach() - end).norm() > _SAME * (end - self.value).norm() + rounding):
            raise RuntimeError(
                "optimizer moves the inner parameters in another way than torch's SGD, Adam or AdamW: its steps cannot "
                "be unrolled"
            )
        leaves = {name: entry for name, entry in state.items() if entry.requires_grad}
        outputs = [(moved, adjoint), *((after[name], cotangent) for name, cotangent in states.items() if name in after)]
        of_value, of_gradient, *of_state = torch.autograd.grad(
            [output for output, _ in outputs],
            [value, gradient, *leaves.values()],
            [cotangent for _, cotangent in outputs],
            allow_unused=True,
            materialize_grads=True,
        )
        return of_value, of_gradient, dict(zip(leaves, of_state, strict=True))


def _is_real(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.is_floating_point()


def _update_of(optimizer: torch.optim.Optimizer) -> Callable[..., tuple[Tensor, State]]:
    if isinstance(optimizer, torch.optim.SGD):
        return _sgd
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return _adam
    raise TypeError(
        "optimizer must be a torch.optim.SGD, Adam or AdamW, whose steps can be unrolled, not a "
        f"{type(optimizer).__name__}"
    )


# Written out, since torch's own updates with differentiable=True hold the first momentum of SGD constant, count Adam's
# steps in float32, and have no derivative where a gradient is 0.


def _sgd(group: dict[str, Any], w: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
    direction = (-gradient if group["maximize"] else gradient) + group["weight_decay"] * w
    if not group["momentum"]:
        return w - group["lr"] * direction, {}
    last = state.get("momentum_buffer")
    momentum = direction
    if last is not None:
        momentum = group["momentum"] * last + (1 - group["dampening"]) * direction
    if group["nesterov"]:
        return w - group["lr"] * (direction + group["momentum"] * momentum), {"momentum_buffer": momentum}
    return w - group["lr"] * momentum, {"momentum_buffer": momentum}


def _adam(group: dict[str, Any], w: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
    (beta, beta_squares), lr = map(float, group["betas"]), group["lr"]
    step = float(state.get("step", 0)) + 1
    direction = -gradient if group["maximize"] else gradient
    if group.get("decoupled_weight_decay"):
        w = w * (1 - lr * group["weight_decay"])
    else:
        direction = direction + group["weight_decay"] * w
    zero = torch.zeros_like(direction)
    mean = beta * state.get("exp_avg", zero) + (1 - beta) * direction
    squares = beta_squares * state.get("exp_avg_sq", zero) + (1 - beta_squares) * direction.square()
    after = {"exp_avg": mean, "exp_avg_sq": squares}
    if group["amsgrad"]:
        squares = after["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", zero), squares)
    size = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)  # no derivative at 0, as of dead units
    size = size / (1 - beta_squares**step) ** 0.5 + group["eps"]
    return w - lr * (mean / (1 - beta**step)) / size, after


def check_unrollable(optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError where `optimizer` is none whose update is known here."""
    _update_of(optimizer)
