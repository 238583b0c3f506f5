"""Files of data sets: errors that name the file and say what was expected of it."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_UTF8 = "utf-8-sig"  # a byte order mark, as editors under Windows write it, is no part of the text
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100  # characters: a damaged file can be one line of megabytes


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


def brief(value: object) -> str:
    """A value that a file holds, as `repr` shows it, cut to what an error can say."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python refuses to write out a number of thousands of digits
        return f"a large {type(value).__name__}"


def read_text(path: Path) -> str:
    """The text in a file in UTF-8, with or without a byte order mark; bytes that are no text become U+FFFD.

    Raises:
        DatasetError: the file cannot be read.
    """
    try:
        return path.read_text(encoding=_UTF8, errors="replace")
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}, expected a text file") from error


def read_table(path: Path, expected: str, columns: int | None = None) -> np.ndarray:
    """(lines, columns) float64: the numbers in a text file, separated by spaces.

    Args:
        path: the file.
        expected: what its lines hold, for errors.
        columns: the number of fields that are read in each line, where further ones are passed over; None for all,
            of which there must be as many in each line.

    Raises:
        DatasetError: the file cannot be read, holds nothing, or lacks a number.
    """
    try:
        with path.open(encoding=_UTF8) as file:
            is_empty = not any(map(str.strip, file))
        if not is_empty:
            usecols = None if columns is None else range(columns)
            return np.loadtxt(path, comments=None, usecols=usecols, ndmin=2, encoding=_UTF8)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: {error}; expected {expected} a line") from error
    raise DatasetError(f"{path}: no numbers, expected {expected} a line")


def class_labels(path: Path, labels: Sequence[int], *, first: int, last: int) -> Tensor:
    """(n,) int64, from 0: labels that `path` counts from `first` to `last`.

    Raises:
        DatasetError: there is none, or one is not a whole number in this range.
    """
    if not labels:
        raise DatasetError(f"{path}: no labels, expected at least one")
    for at, label in enumerate(labels):
        if not isinstance(label, (int, np.integer)) or not first <= label <= last:
            raise DatasetError(f"{path}: label {brief(label)} at {at}, expected labels from {first} to {last}")
    return torch.tensor(labels, dtype=torch.int64) - first
