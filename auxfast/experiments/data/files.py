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


def check_count(place: Path, what: str, found: int, official: int) -> str:
    """Says how many there are, beside the official number. what: what was counted, in the plural.

    Raises:
        DatasetError: the two differ; the message names `place`.
    """
    if found != official:
        raise DatasetError(f"{place}: {found:,} {what}, expected {official:,} as in the official copy")
    return f"{found:,} {what} (official: {official:,})"
