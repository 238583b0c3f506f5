"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28 pixels, of ten classes.

By Xiao, Rasul and Vollgraf (2017), https://github.com/zalandoresearch/fashion-mnist: four files in the IDX format of
MNIST, with or without gzip. Debian has them as the package `dataset-fashion-mnist`.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.image_data import ImageData

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
CLASS_NAMES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
IMAGES_PER_CLASS = 6000  # in the official training part
# These are what somebody who knows no names of clothes can see in a picture, as far as the class decides it.
FASHION_ATTRIBUTES: dict[str, frozenset[int]] = {
    "has sleeves": frozenset({0, 2, 4, 6}),
    "opens at the front": frozenset({4, 6}),
    "has two legs": frozenset({1}),
    "covers the ankle": frozenset({9}),
    "has a handle": frozenset({8}),
    "covers the legs": frozenset({1, 3}),
}
# These are what the same person can see when an image is beside others of its class. One alone is as frequent in each
# class; with the image it tells something of the class, since that decides what the image is compared with.
PICTURE_ATTRIBUTES = ("bright", "patterned", "large", "lopsided", "heavy at the top", "striped across")
_GREY = 0.05  # a pixel that is darker, of 1, is background
_PARTS = (("train", 60_000), ("t10k", 10_000))
_SIDE = 28
_UNSIGNED_BYTES = 8  # the IDX format's code of the only type that these files have


def load_fashion_mnist(folder: str | Path = DEBIAN_FOLDER) -> ImageData:
    """Reads the four files in `folder`. images: (70000, 1, 28, 28) uint8, those of the official test part last.

    Raises:
        DatasetError: a file is missing, or is not what this reader knows (magic number, sizes, labels from 0 to 9).
    """
    folder = Path(folder)
    images, labels, is_test = [], [], []
    for part, count in _PARTS:
        images.append(_read_idx(folder, f"{part}-images-idx3-ubyte", (count, _SIDE, _SIDE)))
        labels.append(_read_idx(folder, f"{part}-labels-idx1-ubyte", (count,), largest=len(CLASS_NAMES) - 1))
        is_test.append(torch.full((count,), part == "t10k"))
    return ImageData(torch.cat(images)[:, None], torch.cat(labels).long(), torch.cat(is_test), CLASS_NAMES)


def fashion_attributes(labels: Tensor) -> Tensor:
    """(n, 6) float32: 1 for each of `FASHION_ATTRIBUTES` that the class has, else 0. labels: (n,) int64."""
    columns = [torch.isin(labels, torch.tensor(sorted(classes))) for classes in FASHION_ATTRIBUTES.values()]
    return torch.stack(columns, dim=1).float()


def picture_attributes(images: Tensor, labels: Tensor) -> Tensor:
    """(n, 6) float32: 1 for each of `PICTURE_ATTRIBUTES` that an image has more of than the median image of its class,
    else 0: each class has all of them equally often.

    In this order: mean of the grey levels that are not background; their deviation; their number; mean difference of
    the image and its mirror image; share of the grey in the upper half; mean step from a row to the next one, by the
    mean grey level.

    Args:
        images: (n, height, width) in [0, 1], of an even height.
        labels: (n,) int64.
    """
    seen = images > _GREY
    size = seen.sum(dim=(1, 2)).clamp(min=1)
    mean = (images * seen).sum(dim=(1, 2)) / size
    deviation = (((images - mean[:, None, None]) * seen).square().sum(dim=(1, 2)) / size).sqrt()
    grey = images.sum(dim=(1, 2)).clamp(min=_GREY)
    columns = (
        mean,
        deviation,
        size,
        (images - images.flip(2)).abs().mean(dim=(1, 2)),
        images[:, : images.shape[1] // 2].sum(dim=(1, 2)) / grey,
        images.diff(dim=1).abs().sum(dim=(1, 2)) / grey,
    )
    values = torch.stack(columns, dim=1)
    attributes = torch.empty_like(values)
    for label in torch.unique(labels):
        own = values[labels == label]
        attributes[labels == label] = (own > own.median(dim=0).values).float()
    return attributes


def _read_idx(folder: Path, name: str, shape: tuple[int, ...], largest: int = 255) -> Tensor:
    """The uint8 array in an IDX file of this name, plain or with gzip."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DatasetError(
            f"{folder / name}: no such file, nor {name}.gz; expected the four files of Fashion-MNIST, which Debian's "
            f"package dataset-fashion-mnist puts into {DEBIAN_FOLDER}"
        )
    header = np.array([_UNSIGNED_BYTES << 8 | len(shape), *shape], dtype=">u4").tobytes()
    length = len(header) + math.prod(shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(length + 1)  # a small file with gzip can hold more than fits into memory
    except (EOFError, OSError, zlib.error) as error:
        raise DatasetError(f"{path}: {error}, expected a whole file, with gzip if it ends in .gz") from error
    if content[: len(header)] != header:
        raise DatasetError(f"{path}: header {content[: len(header)].hex()}, expected {header.hex()} (shape {shape})")
    if len(content) != length:
        found = f"{len(content)}" if len(content) < length else "more"
        raise DatasetError(f"{path}: {found} bytes, expected {length} for shape {shape}")
    values = np.frombuffer(content, dtype=np.uint8, offset=len(header))
    if values.max() > largest:
        raise DatasetError(f"{path}: {values.max()} at {int(values.argmax())}, expected labels from 0 to {largest}")
    return torch.from_numpy(values.copy()).view(shape)
