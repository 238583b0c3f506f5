"""The 4-layer ConvNet of the paper's SVHN experiment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auxfast.experiments.models.layers import Activation, Norm, block, convolution, make_classifier

_BLOCKS = 4


class ConvNet(nn.Module):
    """Four blocks of a 3x3 convolution, BatchNorm, activation and 2x2 max-pooling, then the mean over the pixels that
    are left. (batch, in_channels, H, W) to (batch, num_features), or to (batch, classes).

    The paper says no more than "4-layer" (section 5.4); the block is that of few-shot learning (Vinyals et al., 2016),
    with 64 channels. So, with 3 channels and 10 classes, it has 113,482 parameters. H and W may be anything from 1,
    since pooling keeps the odd row and column.

    Args:
        classes: outputs of a linear classifier; None for the features themselves, of which there are `width`.
        in_channels: channels of the images.
        width: channels of each block.
        norm, activation: see `Norm` and `Activation`.

    Raises:
        ValueError: an unknown `norm` or `activation`.
    """

    def __init__(
        self,
        classes: int | None = None,
        *,
        in_channels: int = 3,
        width: int = 64,
        norm: Norm = "batch",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.num_features = width
        layers: list[nn.Module] = []
        for inputs in [in_channels, *[width] * (_BLOCKS - 1)]:
            layers += block(convolution(inputs, width, bias=norm != "batch"), norm, activation)
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.blocks = nn.Sequential(*layers)
        self.classifier = make_classifier(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = torch.mean(self.blocks(images), dim=(2, 3))
        out: Tensor = self.classifier(x)
        return out
