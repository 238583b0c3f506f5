"""The architecture of a loss-image network, and where its parameters lie in the flat `phi`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from auxfast.ops.network import ACTIVATIONS, REDUCTIONS, Activation, Network, Reduction

MAX_CONVOLUTIONS, MAX_CHANNELS = 4, 64  # of the kernels (csrc/loss_image/loss_image.h); the reference has no limits

MainReduction = Literal["mean", "sum", "valid_mean"]
MAIN_REDUCTIONS: tuple[MainReduction, ...] = ("mean", "sum", "valid_mean")


@dataclass(frozen=True)
class LossImageNetwork(Network):
    """The architecture of a loss-image network, and where its parameters lie in the flat `phi`.

    Args:
        num_losses: channels of the loss image.
        channels: outputs of each 3x3 convolution, at least one; every convolution is followed by the activation and an
            average pool of 2.
        activation: "softplus", or "identity" for a deep linear network.
        main: channel of the main loss, which is added to the network's output; None for no such skip.
        main_reduction: over the main loss's pixels: "mean", "sum", or "valid_mean", the mean over those that the mask
            keeps (0 for an image that has none).
        reduction: "mean" or "sum" over the batch, or "none".

    Raises:
        ValueError: for anything outside of that.
    """

    num_losses: int
    channels: tuple[int, ...] = (8, 16)
    activation: Activation = "softplus"
    main: int | None = None
    main_reduction: MainReduction = "mean"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.num_losses < 1:
            raise ValueError(f"num_losses must be at least 1, got {self.num_losses}")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels must hold one positive number for each convolution, got {self.channels!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.main is not None and not 0 <= self.main < self.num_losses:
            raise ValueError(f"main must be None or a channel 0 to {self.num_losses - 1}, got {self.main}")
        if self.main_reduction not in MAIN_REDUCTIONS:
            raise ValueError(f"main_reduction must be one of {', '.join(MAIN_REDUCTIONS)}, got {self.main_reduction!r}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {self.reduction!r}")
        super().__post_init__()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every part of phi, in its order: `0.weight`, `0.bias`, ..., `out.weight`."""
        shapes: dict[str, tuple[int, ...]] = {}
        inputs = self.num_losses
        for layer, outputs in enumerate(self.channels):
            shapes[f"{layer}.weight"] = (outputs, inputs, 3, 3)
            shapes[f"{layer}.bias"] = (outputs,)
            inputs = outputs
        shapes["out.weight"] = (inputs,)
        return shapes

    @cached_property
    def packed(self) -> list[int]:
        """[activation, main or -1, main loss's mean, reduction, channels...]: what the kernels are told."""
        main = -1 if self.main is None else self.main
        main_mean = int(self.main_reduction != "sum")
        return [ACTIVATIONS[self.activation], main, main_mean, REDUCTIONS[self.reduction], *self.channels]

    @cached_property
    def fits_kernels(self) -> bool:
        return len(self.channels) <= MAX_CONVOLUTIONS and max(self.num_losses, *self.channels) <= MAX_CHANNELS

    def main_weight(self, losses: Tensor) -> float:
        """What the sum over the main loss's pixels is multiplied with, without a mask."""
        return 1.0 if self.main_reduction == "sum" else 1.0 / max(losses.shape[-1] * losses.shape[-2], 1)
