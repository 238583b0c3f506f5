"""VGG-16 for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auxfast.experiments.models.layers import Activation, Norm, block, check_size, convolution, make_classifier

CONVOLUTIONS = (2, 2, 3, 3, 3)
"""The number of convolutions in each of the five blocks that end in pooling."""

_WIDTHS = (1, 2, 4, 8, 8)  # each block's channels are so many times those of the first


class VGG16(nn.Module):
    """VGG-16 with BatchNorm for small images: the 13 convolutions of configuration D (Simonyan and Zisserman, 2015),
    then the mean over what five poolings leave (one pixel of 32 x 32). (batch, in_channels, H, W) to (batch,
    num_features), or to (batch, classes) by one linear layer, in place of ImageNet's three.

    With 3 channels and 10 classes it has 14,728,266 parameters. By default, the names and shapes of `features`, the
    convolutions, in its state_dict are those of torchvision's vgg16_bn. H and W must be 32 or more; where one is
    odd, the pooling drops the last row or column.

    Args:
        classes: outputs of a linear classifier; None for the features themselves, of which there are 8 width.
        in_channels: channels of the images.
        width: channels of the first block; the others have 2, 4, 8 and 8 times as many.
        norm, activation: see `Norm` and `Activation`.

    Raises:
        ValueError: an unknown `norm` or `activation`; when called, images that are too small.
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
        self.num_features = 8 * width
        layers: list[nn.Module] = []
        inputs = in_channels
        for count, factor in zip(CONVOLUTIONS, _WIDTHS, strict=True):
            for _ in range(count):
                layers += block(convolution(inputs, factor * width, bias=True), norm, activation)
                inputs = factor * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = make_classifier(self.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        check_size(images, 2 ** len(CONVOLUTIONS))
        x: Tensor = torch.mean(self.features(images), dim=(2, 3))
        out: Tensor = self.classifier(x)
        return out
