"""One weight for all auxiliary losses."""

from __future__ import annotations

import torch
from torch import Tensor

from auxfast.weighting.base import Weighting, check_non_negative


class Equal(Weighting):
    """The main loss has weight 1, every auxiliary loss `auxiliary_weight`, at least 0."""

    def __init__(self, num_losses: int, main: int = 0, auxiliary_weight: float = 1.0) -> None:
        check_non_negative("auxiliary_weight", auxiliary_weight)
        super().__init__(num_losses, main, auxiliary=auxiliary_weight)
        self.auxiliary_weight = auxiliary_weight

    def _weights(self, losses: Tensor, values: list[float], parameters: tuple[Tensor, ...]) -> Tensor:
        weights = torch.full_like(losses, self.auxiliary_weight)
        weights[self.main] = 1
        return weights
