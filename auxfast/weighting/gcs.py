"""Auxiliary losses kept while they help the main one."""

from __future__ import annotations

import torch
from torch import Tensor

from auxfast.weighting.base import Weighting
from auxfast.weighting.gradients import loss_gradient


class GradientCosineSimilarity(Weighting):
    """Gradient cosine similarity (Du et al., 2018, "Adapting auxiliary losses using gradient similarity").

    The main loss has weight 1. An auxiliary loss has weight 1 if the cosine of its gradient with the main loss's is at
    least 0, else 0 (the paper's unweighted variant); or, if `weighted`, the weight `max(0, cosine)`. The cosine of
    a gradient that is 0 counts as 0. Two gradients are held at a time, however many losses there are.

    The cosines are those in the `parameters` of the call: the paper takes what the tasks share.
    """

    def __init__(self, num_losses: int, main: int = 0, weighted: bool = False) -> None:
        super().__init__(num_losses, main)
        self.weighted = weighted

    def _weights(self, losses: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        main = _unit(loss_gradient(losses, self.main, parameters))
        weights = torch.ones_like(losses)
        for i in range(self.num_losses):
            if i != self.main:
                cosine = main @ _unit(loss_gradient(losses, i, parameters))
                weights[i] = cosine.clamp(min=0) if self.weighted else cosine >= 0
        return weights


def _unit(gradient: Tensor) -> Tensor:
    """The gradient scaled to length 1; 0 stays 0."""
    norm: Tensor = gradient.norm()
    return gradient / norm.clamp(min=torch.finfo(gradient.dtype).tiny)
