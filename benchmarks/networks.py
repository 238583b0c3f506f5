"""The networks that several benchmarks train, each with its inputs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*widths: int, batch: int) -> tuple[nn.Module, Tensor]:
    """Linear layers of these widths, inputs and outputs included, with ReLU between them."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(batch, widths[0])


def cnn(*norms: nn.Module, outputs: int) -> tuple[nn.Module, Tensor]:
    """Two convolutions, of 16 and 32 channels, and a linear layer, for 16 images; `norms` follow the first one."""
    first = [nn.Conv2d(3, 16, 3, padding=1), *norms, nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, outputs)), torch.randn(16, 3, 16, 16)


def resnet18_shapes() -> list[tuple[int, ...]]:
    """The shapes of torchvision's ResNet-18: 62 tensors, 11.7 million parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, channels, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if channels != width:
                shapes += [(width, channels, 1, 1), (width,), (width,)]
            channels = width
    return [*shapes, (1000, 512), (1000,)]


class _Residual(nn.Module):
    """Two convolutions and what goes past them. Group norm has no buffers: each call does the same. The last one is
    0 in the beginning, as Goyal et al. 2017 have it: the loss then curves by some 10, and else by 10,000."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.GroupNorm(4, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(4, outputs),
        )
        nn.init.zeros_(self.body[-1].weight)
        self.past = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.past(x) + self.body(x)).relu()


def resnet(width: int, outputs: int, batch: int) -> tuple[nn.Module, Tensor]:
    """A ResNet-18 with group norm, for images of 64 x 64: 11.2 million parameters where `width` is 64."""
    widths = [width, width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
    first = [nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    blocks = [_Residual(*pair) for pair in pairwise(widths)]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, outputs)]
    return nn.Sequential(*first, *blocks, *last), torch.randn(batch, 3, 64, 64)
