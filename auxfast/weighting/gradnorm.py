"""Weights that balance the norms of the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from auxfast.weighting.adam import Adam
from auxfast.weighting.base import Weighting, check_finite, check_non_negative
from auxfast.weighting.gradients import gradient_norms

_MIN_WEIGHT = 1e-6  # weights must stay positive, and a step of Adam, about lr, can pass 0


class GradNorm(Weighting):
    """Gradient normalisation (Chen, Badrinarayanan, Lee and Rabinovich, ICML 2018, equations 1 and 2, Algorithm 1).

    Minimises `sum_i |G_i - mean(G) r_i^alpha|` in the weights `w_i`, one Adam step a call. `G_i = w_i |grad L_i|`;
    `r_i`, the relative inverse training rate, is `L_i / L_i(0)` over its mean. With the target `mean(G) r_i^alpha` held
    constant, as in the paper, the derivative is `sign(G_i - target_i) |grad L_i|`. Then the weights, positive, are
    scaled to the sum `num_losses`. A call returns those before its step; the first ones are 1.

    The norms are those in the `parameters` of the call. The paper takes the last shared layer's, to save time: pass
    those alone for that. `L_i(0)` is the loss at the first call that has it.

    Args:
        alpha: how strongly training rates are balanced, at least 0. The paper's for NYUv2 is 1.5.
        lr: Adam's step size for the weights. The paper's is 0.025.
    """

    weights: Tensor  # (num_losses,)
    initial_losses: Tensor  # (num_losses,); 0 where unknown

    def __init__(self, num_losses: int, main: int = 0, alpha: float = 1.5, lr: float = 0.025) -> None:
        check_non_negative("alpha", alpha)
        super().__init__(num_losses, main)
        self.alpha = alpha
        self.adam = Adam(num_losses, lr)
        self.register_buffer("weights", torch.ones(num_losses))
        self.register_buffer("initial_losses", torch.zeros(num_losses))

    def _weights(self, losses: Tensor, values: list[float], parameters: tuple[Tensor, ...]) -> Tensor:
        if min(values) < 0:
            raise ValueError(f"losses must not be negative for gradnorm, got {values}")
        weights, initial_losses = self.weights, self.initial_losses
        present, now = losses != 0, losses.double()
        norms = gradient_norms(losses, values, parameters)
        initial = torch.where(initial_losses == 0, now, initial_losses)
        rates = torch.where(present, now / initial, 0)
        rates = rates / _mean(rates, present)
        weighted = weights * norms
        target = _mean(weighted, present) * rates**self.alpha
        gradient = torch.where(present, torch.sign(weighted - target) * norms, 0)
        check_finite(gradient.where(present, norms).tolist())  # the norm of an absent loss must be finite too
        returned = weights.clone()
        initial_losses.copy_(initial.clamp(max=torch.finfo(initial_losses.dtype).max))
        weights.add_(self.adam.update(gradient, present)).clamp_(min=_MIN_WEIGHT)
        weights.mul_(self.num_losses / weights.sum())
        return returned


def _mean(values: Tensor, present: Tensor) -> Tensor:
    """The mean over the losses that are present; values, present: (num_losses,)."""
    return torch.where(present, values, 0).sum() / present.sum()
