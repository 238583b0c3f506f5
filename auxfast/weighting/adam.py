"""Adam for the few numbers that a weighting learns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from auxfast.weighting.base import check_positive

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


class Adam(nn.Module):
    """Adam (Kingma and Ba, ICLR 2015, Algorithm 1) on a vector (size,), every entry with a step count of its own.

    Unlike torch.optim's it leaves absent entries as they are (a gradient of 0 would let them drift on), and its state
    is buffers, which move and are saved with the module that owns it.
    """

    mean: Tensor  # (size,), running average of the gradient
    square: Tensor  # (size,), running average of its square
    steps: Tensor  # (size,), number of gradients in the averages

    def __init__(self, size: int, lr: float) -> None:
        check_positive("lr", lr)
        super().__init__()
        self.lr = lr
        for name in ("mean", "square", "steps"):
            self.register_buffer(name, torch.zeros(size))

    def update(self, gradient: Tensor, present: Tensor) -> Tensor:
        """The step to add to the vector, (size,). It is 0 where `present`, (size,) of bool, is false, whatever
        `gradient` (size,) holds there."""
        mean, square, steps = self.mean, self.square, self.steps
        largest = math.sqrt(torch.finfo(square.dtype).max) / 2  # a larger gradient's square would stay inf for ever
        gradient = torch.where(present, gradient, 0).to(mean).clamp_(-largest, largest)
        counted = present.to(mean)
        steps.add_(counted)
        mean.lerp_(gradient, (1 - _BETA1) * counted)
        square.lerp_(gradient.square(), (1 - _BETA2) * counted)
        steps = steps.clamp(min=1)
        mean = mean / -torch.expm1(steps * math.log(_BETA1))
        square = square / -torch.expm1(steps * math.log(_BETA2))
        return torch.where(present, -self.lr * mean / (square.sqrt() + _EPS), 0)
