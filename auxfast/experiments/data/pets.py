"""Oxford-IIIT Pet: 7,349 photographs of cats and dogs of 37 breeds.

By Parkhi, Vedaldi, Zisserman and Jawahar (2012), https://www.robots.ox.ac.uk/~vgg/data/pets/: the archives
`images.tar.gz` and `annotations.tar.gz`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from auxfast.experiments.data.files import DatasetError, brief, class_labels, inner_folder, need_file, read_text
from auxfast.experiments.data.image_data import ImageData
from auxfast.experiments.data.image_files import PAPER_SIZE, ImageFiles

_BREEDS = 37
_CLASSES = frozenset(str(number) for number in range(1, _BREEDS + 1))


def load_pets(folder: str | Path, size: int = PAPER_SIZE) -> ImageData:
    """Lists the images of a copy: `folder`, or `oxford-iiit-pet` in it, holds `images` and `annotations`.

    images: `ImageFiles` (n, 3, size, size), those of `test.txt` last. class_names: as the images' names have them.

    Raises:
        DatasetError: a file is missing, or a line of a list is not name, class (1 to 37), species (1 or 2) and breed;
            when images are asked for, one cannot be decoded.
        MissingExtraError: Pillow is not installed.
    """
    folder = inner_folder(Path(folder), "oxford-iiit-pet")
    lists = inner_folder(folder / "annotations", "annotations")
    pictures = inner_folder(folder / "images", "images")
    paths, labels, is_test = [], [], []
    names: dict[int, str] = {}
    for part in ("trainval", "test"):
        path = need_file(lists, f"{part}.txt", "Oxford-IIIT Pet")
        numbers = []
        for image, number in _read_list(path):
            breed = image.rpartition("_")[0]
            if names.setdefault(number, breed) != breed:
                raise DatasetError(
                    f"{path}: class {number} of {image}, expected that of {breed}, not of {names[number]}"
                )
            numbers.append(number)
            paths.append(pictures / f"{image}.jpg")
        labels.append(class_labels(path, numbers, first=1, last=_BREEDS))
        is_test.append(torch.full((len(numbers),), part == "test"))
    if missing := sorted(set(range(1, max(names) + 1)) - set(names)):
        raise DatasetError(f"{lists}: no image of class {missing[0]}, expected some of each from 1 to {max(names)}")
    class_names = tuple(names[number] for number in sorted(names))
    return ImageData(ImageFiles(paths, size), torch.cat(labels), torch.cat(is_test), class_names)


def _read_list(path: Path) -> list[tuple[str, int]]:
    """Name and class of each image in a list."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        match line.split():
            case [name, label, "1" | "2", _] if label in _CLASSES:
                rows.append((name, int(label)))
            case _:
                raise DatasetError(
                    f"{path}, line {number}: {brief(line)}, expected name, class (1 to 37), species (1 or 2), breed"
                )
    return rows
