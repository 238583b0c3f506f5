"""CUB-200-2011: 11,788 photographs of birds of 200 species, and 312 attributes that laymen saw in each.

By Wah, Branson, Welinder, Perona and Belongie (2011), https://www.vision.caltech.edu/datasets/cub_200_2011. The paper
(section 5.2) takes the species as the main task and the attributes as auxiliary ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from auxfast.experiments.data.checks import check_array
from auxfast.experiments.data.files import DatasetError, brief, inner_folder, need_file, read_table, read_text
from auxfast.experiments.data.image_data import ImageData
from auxfast.experiments.data.image_files import PAPER_SIZE, ImageFiles

ATTRIBUTES = 312
_NAME = "CUB-200-2011"
_FOLDER = "CUB_200_2011"
_CERTAINTIES = 4  # not visible, guessing, probably, definitely


def load_cub(folder: str | Path, size: int = PAPER_SIZE) -> ImageData:
    """Reads the copy in `folder`, which is `CUB_200_2011` or the one that holds it.

    images: (n, 3, size, size) uint8, decoded when they are asked for; grey ones have three equal channels.
    attributes: (n, 312) float32, 1 where an annotator saw the attribute. The file also says how certain they
    were, which masks nothing here, since the paper has binary attributes for all images: one that was marked "not
    visible" (certainty 1) counts as the 0 or 1 that is written beside it.

    How many images there are is not compared with the official numbers.

    Raises:
        DatasetError: a file is missing, or is not what this reader knows; the message names the file and the row.
        MissingExtraError: Pillow is not installed.
    """
    home = inner_folder(Path(folder), _FOLDER)
    paths = _image_paths(home)
    class_names = _read_names(need_file(home, "classes.txt", _NAME))
    labels = _read_column(need_file(home, "image_class_labels.txt", _NAME), len(paths), 1, len(class_names))
    in_training = _read_column(need_file(home, "train_test_split.txt", _NAME), len(paths), 0, 1)
    if in_training.all() or not in_training.any():
        raise DatasetError(
            f"{home / 'train_test_split.txt'}: {in_training.sum()} of {len(paths)} images are for training"
        )
    attribute_names = _read_attribute_names(home)
    attributes = _read_attributes(need_file(home, "attributes/image_attribute_labels.txt", _NAME), len(paths))
    return ImageData(
        ImageFiles(paths, size),
        torch.from_numpy(labels - 1),
        torch.from_numpy(in_training == 0),
        tuple(name.partition(".")[2].replace("_", " ") or name for name in class_names),
        torch.from_numpy(attributes).float(),
        attribute_names,
    )


def _image_paths(home: Path) -> list[Path]:
    return [home / "images" / name for name in _read_names(need_file(home, "images.txt", _NAME))]


def _read_names(path: Path) -> tuple[str, ...]:
    """The names in a file of lines "number name", whose numbers count from 1."""
    names = []
    for row, line in enumerate(read_text(path).splitlines(), start=1):
        number, _, name = line.strip().partition(" ")
        if number != str(row) or not name.strip():
            raise DatasetError(f"{path}: {brief(line)} in line {row}, expected the number {row} and a name")
        names.append(name.strip())
    if not names:
        raise DatasetError(f"{path}: no lines, expected numbers and names")
    return tuple(names)


def _read_attribute_names(home: Path) -> tuple[str, ...]:
    """The attributes' names. As packed, their file lies beside the data set's folder; many copies have it inside."""
    places = (home / "attributes", home, home.parent)
    place = next((place for place in places if (place / "attributes.txt").is_file()), places[0])
    path = need_file(place, "attributes.txt", _NAME)
    names = _read_names(path)
    if len(names) != ATTRIBUTES:
        raise DatasetError(f"{path}: {len(names)} lines, expected {ATTRIBUTES}")
    return names


def _read_column(path: Path, count: int, low: int, high: int) -> np.ndarray:
    """(count,) int64: the values in a file of lines "image value", whose images count from 1."""
    table = read_table(path, "2 whole numbers", columns=2)
    if not np.array_equal(table[:, 0], np.arange(1, count + 1)):
        raise DatasetError(
            f"{path}: images {_summary(table[:, 0])}, expected 1 to {count} in their order, as in images.txt"
        )
    check_array(str(path), table[:, 1], shape=(count,), low=low, high=high, whole=True)
    return table[:, 1].astype(np.int64)


def _read_attributes(path: Path, count: int) -> np.ndarray:
    """(count, 312) int8 from a file of lines "image attribute present certainty time", where some have more fields."""
    table = read_table(path, "4 whole numbers", columns=4)
    ranges = {"image": (1, count), "attribute": (1, ATTRIBUTES), "is present": (0, 1), "certainty": (1, _CERTAINTIES)}
    for column, (name, (low, high)) in zip(table.T, ranges.items(), strict=True):
        check_array(f"{path}, {name}", column, shape=(count * ATTRIBUTES,), low=low, high=high, whole=True)
    image, attribute, present, _ = table.astype(np.int64).T
    attributes = np.full((count, ATTRIBUTES), -1, dtype=np.int8)
    attributes[image - 1, attribute - 1] = present
    if (attributes < 0).any():
        missing_image, missing_attribute = np.argwhere(attributes < 0)[0] + 1
        raise DatasetError(f"{path}: no line for image {missing_image} and attribute {missing_attribute}, expected one")
    return attributes


def _summary(numbers: np.ndarray) -> str:
    return f"{numbers[0]:g} to {numbers[-1]:g} in {len(numbers)} lines"
