"""Cars: 16,185 photographs of cars of 196 models.

By Krause, Stark, Deng and Fei-Fei (2013). Its page is gone; https://github.com/pytorch/vision/issues/7545 says where
copies are: images, the "devkit", and `cars_test_annos_withlabels.mat`, since the devkit lacks the test part's labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from auxfast.experiments.data.files import DatasetError, brief, class_labels, inner_folder
from auxfast.experiments.data.image_data import ImageData
from auxfast.experiments.data.image_files import PAPER_SIZE, ImageFiles
from auxfast.experiments.data.mat_files import read_mat

_PARTS = (("cars_train", "cars_train_annos.mat"), ("cars_test", "cars_test_annos_withlabels.mat"))


def load_cars(folder: str | Path, size: int = PAPER_SIZE) -> ImageData:
    """Lists the images of a copy: `folder`, or `stanford_cars` in it, holds `cars_train`, `cars_test` and `devkit`.

    Copies may hold `cars_train` in another `cars_train`, `cars_test` likewise, and `devkit` in `car_devkit`. MATLAB's
    files may lie in the devkit or beside it. images: `ImageFiles` (n, 3, size, size), those of the test part last.

    Raises:
        DatasetError: a file is missing or damaged, or a class has no name in `cars_meta.mat`; when images are asked
            for, one cannot be decoded.
        MissingExtraError: Pillow or SciPy is not installed.
    """
    folder = inner_folder(Path(folder), "stanford_cars")
    path = _need_mat(folder, "cars_meta.mat")
    (names,) = read_mat(path, "class_names", squeeze=True)
    class_names = tuple(np.atleast_1d(names).tolist())
    if not class_names or not all(isinstance(name, str) for name in class_names):
        raise DatasetError(f"{path}: class_names {brief(class_names)}, expected a list of names")
    paths, labels, is_test = [], [], []
    for part, name in _PARTS:
        path = _need_mat(folder, name)
        (rows,) = read_mat(path, "annotations", squeeze=True)
        rows = np.atleast_1d(rows)
        if not {"class", "fname"} <= set(rows.dtype.names or ()):
            raise DatasetError(f"{path}: annotations with {rows.dtype.names}, expected class and fname among them")
        labels.append(class_labels(path, rows["class"].tolist(), first=1, last=len(class_names)))
        pictures = inner_folder(folder / part, part)
        paths += [pictures / str(image) for image in rows["fname"]]
        is_test.append(torch.full((len(rows),), part == "cars_test"))
    return ImageData(ImageFiles(paths, size), torch.cat(labels), torch.cat(is_test), class_names)


def _need_mat(folder: Path, name: str) -> Path:
    """A file of labels or names, wherever copies have it."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder, expected one with cars_train, cars_test and devkit of Cars")
    for place in (folder / "devkit", folder / "car_devkit" / "devkit", folder):
        if (place / name).is_file():
            return place / name
    raise DatasetError(f"{folder / 'devkit' / name}: no such file, nor {folder / name}; expected in a copy of Cars")
