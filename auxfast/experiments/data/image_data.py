"""Labelled images, as the readers of image classification data sets return them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class ImageSource(Protocol):
    """Images that are picked by their indices: a tensor, or files that are decoded when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Images (len(rows), channels, height, width), uint8. rows: (k,) int64."""


@dataclass(frozen=True)
class ImageData:
    """Labelled images of a data set.

    images: n of them.
    labels: (n,) int64, from 0 to len(class_names) - 1.
    is_test: (n,) bool: the test part of the official split.
    class_names: names of the classes.
    attributes: (n, number of attributes) float32 of 0 and 1, where the data set has some.
    attribute_names: their names.
    """

    images: ImageSource
    labels: Tensor
    is_test: Tensor
    class_names: tuple[str, ...]
    attributes: Tensor | None = None
    attribute_names: tuple[str, ...] = ()
