"""Derivatives of the outer loss after some steps of inner training, as a reference for hypergradients."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from auxfast.implicit.bilevel_problem import BilevelProblem, assign
from auxfast.implicit.losses import mean_gradient, mean_loss
from auxfast.implicit.report import Unrolled


def unrolled_differences(
    problem: BilevelProblem,
    optimizer: torch.optim.Optimizer,
    steps: int,
    point: Tensor,
    outer_values: Tensor,
    directions: Tensor,
    length: float,
) -> Unrolled:
    """Derivatives of the outer loss after `steps` steps from the inner values `point` (n,), along `directions` (m, k)
    from `outer_values` (k,), by differences over `length` to both sides.

    Differences, and no graph of all steps: the losses are functions of leaves, which autograd cannot replace by tensors
    that were computed, any torch optimizer serves, and no step needs memory.
    """

    def trained(values: Tensor) -> float:
        assign(problem.inner, point)
        assign(problem.outer, values)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        own = deepcopy(optimizer, {id(param): param for param in params})  # its state is copied, the parameters are not
        for _ in range(steps):
            for param, grad in zip(problem.inner, mean_gradient(problem.inner_fns, problem.inner), strict=True):
                param.grad = grad
            own.step()
        return mean_loss(problem.outer_fns).item()

    pairs = [[trained(outer_values + sign * length * direction) for sign in (1, -1)] for direction in directions]
    above, below = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    derivatives = (above - below) / (2 * length)
    rounding = problem.eps * torch.maximum(above.abs(), below.abs()) / length
    error = float(rounding.norm() / derivatives.norm()) if bool(rounding.any()) else 0.0
    return Unrolled(derivatives, steps, type(optimizer).__name__, error)
