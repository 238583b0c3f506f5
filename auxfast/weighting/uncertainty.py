"""Weights from the homoscedastic uncertainty of every task."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from auxfast.weighting.adam import Adam
from auxfast.weighting.base import Weighting

_SMALL = 1e-4  # below it the weight that a loss leads to, 1 / (2 L), could be inf in float16; in float32, below 1e-38


class Uncertainty(Weighting):
    """Learned noise of every task (Kendall, Gal and Cipolla, CVPR 2018).

    Minimises `sum_i exp(-s_i) L_i + s_i / 2` in the log variances `s_i = log sigma_i^2` too, one Adam step a call. The
    weights are `exp(-s_i)`, those before the step: model and log variances are updated from the same point.

    This is the paper's form for classification, `L / sigma^2 + log sigma` (its equation 10), for all losses. Its form
    for regression, `L / (2 sigma^2) + log sigma` (equation 7), is the same function of `s + log 2`, up to a constant:
    both settle where the weight is `1 / (2 L_i)`. This one starts with all weights 1, as the other methods do.

    Args:
        lr: Adam's step size for the log variances; 0.025 is what Chen et al. (ICML 2018, section 5.1) gave this method.
    """

    log_variances: Tensor  # (num_losses,)

    def __init__(self, num_losses: int, main: int = 0, lr: float = 0.025) -> None:
        super().__init__(num_losses, main)
        self.adam = Adam(num_losses, lr)
        self.register_buffer("log_variances", torch.zeros(num_losses))

    def _weights(self, losses: Tensor, values: list[float], parameters: tuple[Tensor, ...]) -> Tensor:
        log_variances = self.log_variances
        weights = torch.exp(-log_variances)
        log_variances.add_(self.adam.update(0.5 - weights * losses, losses != 0))
        if min(values) < _SMALL:
            largest = min(torch.finfo(dtype).max for dtype in (losses.dtype, log_variances.dtype))
            log_variances.clamp_(min=-math.log(largest / 2))
        return weights
