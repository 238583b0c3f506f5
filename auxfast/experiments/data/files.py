"""Files of data sets: errors that name the file and say what was expected of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class DatasetError(ValueError):
    """A copy of a data set is missing, incomplete or not what its reader knows; the message names the file."""


def need_file(folder: Path, name: str, dataset: str) -> Path:
    """The file `name` in `folder`.

    Raises:
        DatasetError: there is none.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder, expected one with {dataset} and so with {name}")
    path = folder / name
    if not path.is_file():
        raise DatasetError(f"{path}: no such file, expected in a copy of {dataset}")
    return path


def inner_folder(folder: Path, name: str) -> Path:
    """The folder `name` in `folder`, where there is one, else `folder` itself.

    A user may name the folder that an archive holds or the one where it was unpacked, and some copies hold a folder in
    another of the same name.
    """
    return folder / name if (folder / name).is_dir() else folder


def class_labels(path: Path, labels: Sequence[int], *, first: int, last: int) -> Tensor:
    """(n,) int64, from 0: labels that `path` counts from `first` to `last`.

    Raises:
        DatasetError: there is none, or one is not a whole number in this range.
    """
    if not labels:
        raise DatasetError(f"{path}: no labels, expected at least one")
    for at, label in enumerate(labels):
        if not isinstance(label, (int, np.integer)) or not first <= label <= last:
            raise DatasetError(f"{path}: label {label!r} at {at}, expected labels from {first} to {last}")
    return torch.tensor(labels, dtype=torch.int64) - first
