"""SegNet with split heads: one encoder and decoder for all tasks, and one prediction a task."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.models.layers import Activation, Norm, block, check_size, convolution
from auxfast.experiments.models.vgg import CONVOLUTIONS


class SegNet(nn.Module):
    """SegNet (Badrinarayanan et al., 2017) with split heads, as the "split" baseline of MTAN has it (Liu et al., 2019):
    (batch, in_channels, H, W) to a tuple of one (batch, outputs[i], H, W) a task.

    The encoder is that of VGG-16, and the decoder has its blocks in reverse. Each of the five poolings notes where the
    largest pixels were, and the decoder puts its pixels back there. A task predicts by a 3x3 and a 1x1 convolution
    without an activation in between. For 13, 1 and 3 outputs there are 25,055,185 parameters.

    H and W may be anything from 32. Where a block's height or width is odd, the last row or column takes no part in its
    pooling, and is 0 after the unpooling.

    Args:
        outputs: channels of each task's prediction: classes for segmentation, 1 for depth, 3 for normals.
        in_channels: channels of the images.
        widths: channels of the five blocks. AuxiLearn's code has 1024 in the last one.
        norm, activation: see `Norm` and `Activation`.

    Attributes:
        encoder, decoder: what all tasks share.
        heads: one a task.

    Raises:
        ValueError: other than five `widths`, or an unknown `norm` or `activation`; when called, images that are too
            small.
    """

    def __init__(
        self,
        outputs: Sequence[int],
        *,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        norm: Norm = "batch",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if len(widths) != len(CONVOLUTIONS):
            raise ValueError(f"widths: got {list(widths)}, must be {len(CONVOLUTIONS)}, one a block")

        def convolutions(count: int, inputs: int, outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in [inputs, *[outputs] * (count - 1)]:
                layers += block(convolution(channels, outputs, bias=True), norm, activation)
            return nn.Sequential(*layers)

        blocks = list(zip(CONVOLUTIONS, [in_channels, *widths], widths, strict=False))
        self.encoder = nn.ModuleList(convolutions(*sizes) for sizes in blocks)
        blocks = list(zip(CONVOLUTIONS, widths, [widths[0], *widths], strict=False))
        self.decoder = nn.ModuleList(convolutions(*sizes) for sizes in reversed(blocks))
        self.unpool = nn.MaxUnpool2d(2)
        self.heads = nn.ModuleList(
            nn.Sequential(convolution(widths[0], widths[0], bias=True), nn.Conv2d(widths[0], channels, 1))
            for channels in outputs
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        check_size(images, 2 ** len(CONVOLUTIONS))
        x, pooled = images, []
        for convolutions in self.encoder:
            x = convolutions(x)
            size = x.shape[2:]
            x, places = F.max_pool2d(x, 2, return_indices=True)
            pooled.append((places, size))
        for convolutions in self.decoder:
            places, size = pooled.pop()
            x = convolutions(self.unpool(x, places, output_size=size))
        return tuple(head(x) for head in self.heads)
