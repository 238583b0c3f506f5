"""The base of all weightings: the call, and the checks of its arguments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Weighting(nn.Module, ABC):
    """A rule for the weights of the task losses: `(weights * losses).sum()` is the training loss.

    What a rule learns or remembers is in its state_dict: loading it resumes to the same numbers. Like any module it
    has to be on the device of the losses, by `.to(device)`. Losses that are minimised towards 0 are assumed.

    A loss of exactly 0 counts as absent: no sample of the batch has it. It does not enter what a rule learns, and
    its own weight, which then plays no part, is finite.

    Args:
        num_losses: how many losses there are, at least 1.
        main: index of the main loss.

    Raises:
        ValueError: for anything outside of that.
    """

    __call__: Callable[..., Tensor]  # nn.Module's is typed Any; the arguments are those of `forward`

    def __init__(self, num_losses: int, main: int = 0) -> None:
        if num_losses < 1:
            raise ValueError(f"num_losses must be at least 1, got {num_losses}")
        if not 0 <= main < num_losses:
            raise ValueError(f"main must be an index 0 to {num_losses - 1}, got {main}")
        super().__init__()
        self.num_losses, self.main = num_losses, main

    @torch.no_grad()
    def forward(self, losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The weights (num_losses,) for this step, detached, of the dtype and on the device of the losses.

        Call it once a training step, before the backward pass: the graph stays, and no `.grad` is touched.

        Args:
            losses: (num_losses,), the mean of each over the batch (0 for a sample that lacks it), with a graph to
                `parameters`.
            parameters: what the methods that look at gradients take them in: those that the tasks share.

        Raises:
            ValueError: `losses` is of another shape; or the method needs gradients, and `losses` has no graph or
                `parameters` nothing to train.
            TypeError: `parameters` is one tensor.
        """
        if losses.shape != (self.num_losses,):
            raise ValueError(f"losses must have the shape ({self.num_losses},), got {tuple(losses.shape)}")
        given: Any = parameters
        if isinstance(given, Tensor):
            raise TypeError("parameters must be a sequence of tensors, not a Tensor: pass a list")
        return self._weights(losses, tuple(given)).to(losses)

    @abstractmethod
    def _weights(self, losses: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """The weights that `forward` returns. They share no memory with the state."""

    def extra_repr(self) -> str:
        return f"num_losses={self.num_losses}, main={self.main}"


def check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_non_negative(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
