"""Weights from which a network adapts to a new sinusoid by ten samples: iMAML, with all tasks side by side.

Each task is a sine wave. A copy of the network adapts to its samples, kept near shared weights by a penalty. These are
learned: their hypergradient goes through the minimum of each copy, and needs nothing of the way there. All copies of a
parameter are one tensor, so that `BlockDiagonal` solves the systems of all tasks with one backward pass a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import auxfast
from auxfast.solvers import MINRES, BlockDiagonal

TASKS, SHOTS, STRENGTH = 16, 10, 0.1
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
Weights = dict[str, Tensor]


def sinusoids() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples to adapt to and held-out ones of new tasks: x, y, x, y, each (TASKS, SHOTS, 1)."""
    amplitude, phase = 0.1 + 2 * torch.rand(TASKS, 1, 1), math.pi * torch.rand(TASKS, 1, 1)
    x, held_out_x = 4 * torch.rand(2, TASKS, SHOTS, 1) - 2
    return x, amplitude * (2 * x + phase).sin(), held_out_x, amplitude * (2 * held_out_x + phase).sin()


def errors(copies: Weights, x: Tensor, y: Tensor) -> Tensor:
    """The mean squared error of each copy on the samples of its task (TASKS,)."""
    predictions: Tensor = vmap(lambda copy, x: functional_call(net, copy, (x,)))(copies, x)
    return (predictions - y).square().mean(dim=(1, 2))


def inner_loss(copies: Weights, shared: Weights, x: Tensor, y: Tensor) -> Tensor:
    """The sum over tasks of the error and the penalty on the way from the shared weights."""
    away = torch.stack([(copies[name] - shared[name]).square().sum() for name in shared]).sum()
    return errors(copies, x, y).sum() + STRENGTH / 2 * away


def adapt(shared: Weights, x: Tensor, y: Tensor, steps: int = 30) -> Weights:
    """Copies for each task, near the minimum of their inner loss."""
    copies = {name: w.detach().expand(TASKS, *w.shape).clone().requires_grad_() for name, w in shared.items()}
    optimizer = torch.optim.Adam(copies.values(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        inner_loss(copies, {name: w.detach() for name, w in shared.items()}, x, y).backward()
        optimizer.step()
    return copies


def main(outer_steps: int = 80) -> dict[str, float]:
    """The errors on held-out samples of new tasks, from weights as they are drawn and from the learned ones."""
    torch.manual_seed(0)
    as_drawn: Weights = dict(net.named_parameters())
    shared = {name: w.detach().clone().requires_grad_() for name, w in as_drawn.items()}
    optimizer = torch.optim.Adam(shared.values(), lr=0.01)
    solver = BlockDiagonal(MINRES(steps=10, tol=None))
    outer = auxfast.HyperOptimizer(optimizer, solver=solver, warn=False)  # adapted copies are near a minimum, not at it
    for _ in range(outer_steps):
        x, y, held_out_x, held_out_y = sinusoids()
        copies = adapt(shared, x, y)
        outer_loss = errors(copies, held_out_x, held_out_y).mean()
        stats = outer.step(outer_loss, inner_loss(copies, shared, x, y), copies.values())
    found: dict[str, float] = {}
    for name, weights in {"as drawn": as_drawn, "learned": shared}.items():
        torch.manual_seed(1)
        tests = [errors(adapt(weights, x, y), *held_out).mean() for x, y, *held_out in (sinusoids() for _ in range(5))]
        found[name] = torch.stack(tests).mean().item()
        print(f"error on new tasks, adapted from weights {name}: {found[name]:.3f}")
    print(f"residuals of the last solve, task by task: {min(stats.residuals):.1e} to {stats.residual:.1e}")
    print(f"products with the Hessians of all {TASKS} tasks: {stats.matvecs}")
    return found


if __name__ == "__main__":
    main()
