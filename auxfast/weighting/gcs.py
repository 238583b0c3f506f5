"""Auxiliary losses kept while they help the main one."""

from __future__ import annotations

import torch
from torch import Tensor

from auxfast.weighting.base import Weighting, check_finite
from auxfast.weighting.gradients import loss_gradient, out_of_range, scaled_gradient


class GradientCosineSimilarity(Weighting):
    """Gradient cosine similarity (Du et al., 2018, "Adapting auxiliary losses using gradient similarity").

    The main loss has weight 1. An auxiliary loss has weight 1 if the cosine of its gradient with the main loss's is at
    least 0, else 0 (the paper's unweighted variant); or, if `weighted`, the weight `max(0, cosine)`. The cosine of
    a gradient that is 0 counts as 0. Two gradients are held at a time, however many losses there are.

    The cosines are those in the `parameters` of the call: the paper takes what the tasks share.

    If `summed`, the auxiliary losses are one, their sum, and have one weight: two gradients a step, where hundreds of
    losses would take hundreds. So the AuxiLearn paper compares with it on CUB (Navon et al., 2021, appendix B.1).
    """

    def __init__(self, num_losses: int, main: int = 0, weighted: bool = False, summed: bool = False) -> None:
        super().__init__(num_losses, main)
        self.weighted = weighted
        self.summed = summed

    def _weights(self, losses: Tensor, values: list[float], parameters: tuple[Tensor, ...]) -> Tensor:
        if self.summed:
            is_main = torch.arange(self.num_losses, device=losses.device) == self.main
            with torch.enable_grad():
                pair = torch.stack([losses[self.main], losses[~is_main].sum()])
            of_pair = GradientCosineSimilarity(2, weighted=self.weighted)._weights(pair, pair.tolist(), parameters)
            return torch.where(is_main, of_pair[0], of_pair[1])
        main, norm = _unit(loss_gradient(losses, self.main, parameters))
        units = (_unit(loss_gradient(losses, i, parameters)) for i in range(self.num_losses) if i != self.main)
        pairs = [(main @ unit, norm) for unit, norm in units]
        pairs.insert(self.main, (norm, norm))  # its own cosine plays no part
        cosines, norms = (torch.stack(column) for column in zip(*pairs, strict=True))
        if wrong := out_of_range(norms.tolist(), values, norms.dtype):
            self._correct(cosines, wrong, losses, parameters)
        weights = cosines.clamp(min=0) if self.weighted else cosines >= 0
        weights[self.main] = 1
        return weights

    def _correct(self, cosines: Tensor, wrong: list[int], losses: Tensor, parameters: tuple[Tensor, ...]) -> None:
        """Writes anew the cosines (num_losses,) of the gradients at the indices `wrong`, whose squares are out of range
        unless they are scaled."""
        main, _ = _unit(scaled_gradient(losses, self.main, parameters)[0])
        for i in range(self.num_losses) if self.main in wrong else wrong:
            cosines[i] = main @ _unit(scaled_gradient(losses, i, parameters)[0])[0]
        check_finite(cosines.tolist())


def _unit(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient scaled to length 1, and its length; 0 stays 0."""
    norm = gradient.norm()
    return gradient / norm.clamp(min=torch.finfo(gradient.dtype).tiny), norm
