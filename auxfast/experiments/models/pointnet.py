"""PointNet without transforms, small: the paper's label generator for point clouds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auxfast.experiments.models.layers import Activation, Norm, point_layers


class PointNet(nn.Module):
    """The segmentation network of PointNet (Qi et al., 2017, figure 2) without input and feature transforms (paper,
    appendix C.9): (batch, in_channels, points) to (batch, outputs, points).

    Each point goes through layers of its own; the largest value of each channel over all points, which describes the
    shape, then stands beside the point's early features. With `width=64` the layers are as wide as Qi et al.'s: 64, 64,
    then 64, 128, 1024, then 512, 256, 128. The paper has "a smaller version", and no figures: the default is half as
    wide, with 222,674 parameters for 50 outputs.

    Args:
        outputs: channels of the prediction for each point.
        in_channels: coordinates of a point.
        width: channels of the first layer, in units of which the others are.
        norm, activation: see `Norm` and `Activation`.

    Raises:
        ValueError: an unknown `norm` or `activation`.
    """

    def __init__(
        self,
        outputs: int,
        *,
        in_channels: int = 3,
        width: int = 32,
        norm: Norm = "batch",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.local = point_layers([in_channels, width, width], norm, activation)
        self.shape = point_layers([width, width, 2 * width, 16 * width], norm, activation)
        self.head = nn.Sequential(
            *point_layers([17 * width, 8 * width, 4 * width, 2 * width], norm, activation),
            nn.Conv1d(2 * width, outputs, 1),
        )

    def forward(self, points: Tensor) -> Tensor:
        local = self.local(points)
        shape = self.shape(local).max(dim=2, keepdim=True).values
        out: Tensor = self.head(torch.cat([local, shape.expand(-1, -1, points.shape[2])], dim=1))
        return out
