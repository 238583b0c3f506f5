"""The configuration of one training run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import nn

from auxfast.implicit import HyperOptimizer
from auxfast.nn import Combiner
from auxfast.solvers import Solver


@dataclass(frozen=True)
class TrainConfig:
    """How to run Algorithm 1 of the paper: `outer_steps` times N = `inner_steps` inner steps and one outer.

    Inner and outer optimizer are SGD with momentum. `weight_decay` is a part of the inner loss (half of it
    times the squared norm of the inner parameters): the hypergradient has to know it. `max_grad_norm`
    clips the hypergradient.

    Raises:
        ValueError: a number is not finite, negative, or zero where that means nothing; a momentum is >= 1.
    """

    outer_steps: int
    inner_steps: int
    inner_lr: float
    outer_lr: float
    solver: Solver
    inner_momentum: float = 0.9
    outer_momentum: float = 0.9
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "solver":
                continue
            may_be_zero = field.name.endswith("momentum") or field.name == "weight_decay"
            limit = 1.0 if field.name.endswith("momentum") else math.inf
            if not (0 <= value < limit) or (value == 0 and not may_be_zero):
                allowed = f"{'at least' if may_be_zero else 'above'} 0 and below {limit:g}"
                raise ValueError(f"{field.name}: got {value}, must be {allowed}")

    def inner_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the model's parameters."""
        return torch.optim.SGD(
            parameters, lr=self.inner_lr, momentum=self.inner_momentum, weight_decay=self.weight_decay
        )

    def outer_optimizer(self, combiner: Combiner) -> HyperOptimizer:
        """The optimizer of a combiner's parameters; projects the combiner back into its monotone set."""
        optimizer = torch.optim.SGD(combiner.parameters(), lr=self.outer_lr, momentum=self.outer_momentum)
        # The progress bar and the report show every residual, so nothing needs to warn of it.
        return HyperOptimizer(
            optimizer, solver=self.solver, max_grad_norm=self.max_grad_norm, project=[combiner], warn=False
        )
