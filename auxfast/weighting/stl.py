"""Single-task learning."""

from __future__ import annotations

import torch
from torch import Tensor

from auxfast.weighting.base import Weighting


class SingleTask(Weighting):
    """The main loss alone: weight 1, and 0 for every auxiliary loss."""

    def __init__(self, num_losses: int, main: int = 0) -> None:
        super().__init__(num_losses, main, auxiliary=0.0)

    def _weights(self, losses: Tensor, values: list[float], parameters: tuple[Tensor, ...]) -> Tensor:
        weights = torch.zeros_like(losses)
        weights[self.main] = 1
        return weights
