"""SVHN, street view house numbers: 99,289 photographs of digits, 32 x 32 pixels.

By Netzer et al. (2011), http://ufldl.stanford.edu/housenumbers/: "Format 2: Cropped Digits", two files of MATLAB. The
further file `extra_32x32.mat` is not read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from auxfast.experiments.data.files import DatasetError, class_labels, need_file
from auxfast.experiments.data.image_data import ImageData
from auxfast.experiments.data.mat_files import read_mat

_SIDE = 32


def load_svhn(folder: str | Path) -> ImageData:
    """Reads `train_32x32.mat` and `test_32x32.mat` in `folder`. images: (n, 3, 32, 32) uint8, test ones last.

    The class of a digit is its value: the files say 10 for the digit 0.

    Raises:
        DatasetError: a file is missing, damaged, or not what this reader knows (shapes, types, labels from 1 to 10).
        MissingExtraError: SciPy is not installed.
    """
    images, labels, is_test = [], [], []
    for part in ("train", "test"):
        path = need_file(Path(folder), f"{part}_32x32.mat", "SVHN")
        pixels, digits = read_mat(path, "X", "y")
        if pixels.ndim != 4 or pixels.shape[:3] != (_SIDE, _SIDE, 3) or pixels.dtype != np.uint8:
            raise DatasetError(
                f"{path}: X of shape {pixels.shape}, {pixels.dtype}; expected ({_SIDE}, {_SIDE}, 3, n), uint8"
            )
        if digits.shape != (pixels.shape[3], 1):
            raise DatasetError(
                f"{path}: y of shape {digits.shape}, expected ({pixels.shape[3]}, 1), one for each image"
            )
        images.append(torch.from_numpy(pixels).permute(3, 2, 0, 1))
        labels.append((class_labels(path, digits[:, 0].tolist(), first=1, last=10) + 1) % 10)
        is_test.append(torch.full((len(digits),), part == "test"))
    return ImageData(torch.cat(images).contiguous(), torch.cat(labels), torch.cat(is_test), tuple("0123456789"))
