"""Files of data sets: errors that name the file and say what was expected of it."""

from __future__ import annotations

from pathlib import Path


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
