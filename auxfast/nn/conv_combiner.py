"""The combiner of per-pixel losses (the paper's convolutional loss network, sections 3.2 and 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from torch import Tensor

from auxfast.nn.combiner_base import Positive
from auxfast.nn.network_combiner import NetworkCombiner
from auxfast.ops.loss_image import loss_image
from auxfast.ops.network import Activation, LossImageNetwork, MainReduction, Reduction, layer_sizes


class ConvCombiner(NetworkCombiner):
    """A monotone convolutional network over an image of losses, with one channel for each task.

    3x3 convolutions, each followed by softplus and an average pool of 2; then a linear output without bias, and the
    mean over positions. Losses, masks and loss weights are (batch, num_losses, H, W), and an image's combined value is
    one number. A pixel's weight in a plain mean would be 1 / (H W).

    Runs on fused kernels for up to 4 convolutions of up to 64 channels (`auxfast.ops.loss_image`).

    Args:
        num_losses, main, monotone, reduction, positive: see `Combiner`.
        channels: outputs of each convolution, at least one. The paper's code has (8, 16) and (8, 16, 32).
        activation: "softplus", or "identity" for a deep linear network.
        main_reduction: how the main loss's pixels are reduced: "mean", "sum", or "valid_mean", the mean over those
            that the mask keeps. The network's own mean is always over all positions.
        init_range: weights start uniform in it, as in the paper's code; biases at 0.
        weight_norm: train what leads to each channel as direction and length (see `NetworkCombiner`).

    Raises:
        TypeError: `num_losses` or `main` is no int, or `channels` no sequence.
        ValueError: an argument is outside its range.
    """

    op = staticmethod(loss_image)
    network: LossImageNetwork

    def __init__(
        self,
        num_losses: int,
        channels: Sequence[int] = (8, 16),
        main: int | None = 0,
        *,
        monotone: bool = True,
        activation: Activation = "softplus",
        main_reduction: MainReduction = "mean",
        init_range: tuple[float, float] = (0.0, 0.1),
        weight_norm: bool = False,
        reduction: Reduction = "mean",
        positive: Positive = "clip",
    ) -> None:
        low, high = init_range
        if not -inf < low <= high < inf or (monotone and low < 0):
            lowest = "0 <= low" if monotone else "low"
            raise ValueError(f"init_range must be finite (low, high) with {lowest} <= high, got {init_range}")
        sizes = layer_sizes("channels", channels)
        network = LossImageNetwork(num_losses, sizes, activation, main, main_reduction, reduction)
        super().__init__(network, monotone, weight_norm, positive)
        self.init_range = (low, high)
        self.reset_parameters()

    def _draw(self, weight: Tensor) -> None:
        weight.uniform_(*self.init_range)

    def weight_of_skip(self, losses: Tensor) -> float:
        pixels = losses[0, 0].numel() if self.network.main_reduction == "sum" else 1
        return super().weight_of_skip(losses) * pixels

    def extra_repr(self) -> str:
        network = self.network
        return (
            f"{super().extra_repr()}, channels={network.channels}, activation={network.activation!r}, "
            f"main_reduction={network.main_reduction!r}, weight_norm={self.weight_norm}"
        )
