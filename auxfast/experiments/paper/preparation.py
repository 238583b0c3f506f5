"""Stored images as inputs of a network: normalised, cropped and flipped (paper, appendix B)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from auxfast.experiments.data.image_data import ImageSource

# These are of red, green and blue over ImageNet's images, with which torchvision's weights were trained.
IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION: tuple[float, ...] = (0.229, 0.224, 0.225)
_CHUNK = 500  # images whose statistics are taken at once


@dataclass(frozen=True)
class Preparation:
    """A function of images (batch, channels, height, width), uint8, that returns inputs (batch, channels, crop, crop),
    float32, and draws from the generator that it is given alone. Without one it takes the middle of the images.

    mean, deviation: of each channel, on the scale from 0 to 1; they become 0 and 1.
    crop: height and width of the inputs, in pixels. With a generator, each image's place of them is drawn.
    padding: black pixels around the images whose crop is drawn.
    flip: whether half of the images, drawn too, are mirrored left to right.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    crop: int
    padding: int = 0
    flip: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        if min(images.shape[2:]) < self.crop:
            raise ValueError(f"crop: got {self.crop}, must be at most the images' {min(images.shape[2:])} pixels")
        cut = self._middle(images) if generator is None else self._drawn(images, generator)
        mean, deviation = (torch.tensor(t, device=cut.device)[:, None, None] for t in (self.mean, self.deviation))
        return (cut / 255 - mean) / deviation

    def _middle(self, images: Tensor) -> Tensor:
        top, left = ((size - self.crop) // 2 for size in images.shape[2:])
        return images[:, :, top : top + self.crop, left : left + self.crop]

    def _drawn(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images = F.pad(images, (self.padding,) * 4)
        count, _, height, width = images.shape
        rows, columns = (self._places(count, size, generator) for size in (height, width))
        if self.flip:
            is_flipped = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(is_flipped, columns.flip(1), columns)
        image = torch.arange(count)[:, None, None]
        pixels = images[image, :, rows[:, :, None], columns[:, None, :]]  # (count, crop, crop, channels)
        return pixels.movedim(-1, 1).contiguous()

    def _places(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """Indices of the pixels along one side, (count, crop)."""
        first = torch.randint(size - self.crop + 1, (count, 1), generator=generator)
        return first + torch.arange(self.crop)


def channel_statistics(images: ImageSource, rows: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over all pixels of the images of these indices, on the scale from 0 to 1."""
    sums, squares, pixels = torch.tensor(0.0), torch.tensor(0.0), 0
    for chunk in rows.split(_CHUNK):
        values = images[chunk].double() / 255
        sums, squares = sums + values.sum(dim=(0, 2, 3)), squares + values.square().sum(dim=(0, 2, 3))
        pixels += values[:, 0].numel()
    mean = sums / pixels
    return tuple(mean.tolist()), tuple((squares / pixels - mean.square()).sqrt().tolist())
