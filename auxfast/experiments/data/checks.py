"""Checks of what a reader has read: wrong data should stop there, with a name, and not in a NaN later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from auxfast.experiments.data.files import DatasetError


def check_array(
    name: str, array: np.ndarray, *, shape: tuple[int, ...], low: float, high: float, whole: bool = False
) -> None:
    """Checks that `array` has this shape, is within [low, high] and, if `whole`, holds whole numbers.

    Raises:
        DatasetError: names the array, what was found (and where, for the first bad entry), what is allowed.
    """
    if array.shape != shape:
        raise DatasetError(f"{name}: shape {array.shape}, expected {shape}")
    if not np.issubdtype(array.dtype, np.number):
        raise DatasetError(f"{name}: dtype {array.dtype}, expected numbers")
    good = np.isfinite(array) & (array >= low) & (array <= high)
    if whole:
        good &= array == np.round(array)
    if not good.all():
        index = tuple(int(i) for i in np.argwhere(~good)[0])
        kind = "whole numbers" if whole else "finite numbers"
        raise DatasetError(f"{name}: {array[index]:.10g} at {index}, expected {kind} from {low:g} to {high:g}")


def row_numbers(rows: Tensor) -> list[int]:
    """The numbers in `rows`, (k,) int64.

    Raises:
        ValueError: it is something else, such as a mask, which would pick rows 0 and 1.
    """
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows: got shape {tuple(rows.shape)}, {rows.dtype}; must be (k,), torch.int64")
    return rows.tolist()


def check_counts(folder: Path, counts: Mapping[str, tuple[int, int]]) -> list[str]:
    """A line for each count. counts: how many were found and how many are official, by what was counted, in the plural.

    Raises:
        DatasetError: some differ.
    """
    wrong = [
        f"{found:,} {what}, expected {official:,}" for what, (found, official) in counts.items() if found != official
    ]
    if wrong:
        raise DatasetError(f"{folder}: {'; '.join(wrong)}")
    return [f"{what}: {found:,} of {official:,}" for what, (found, official) in counts.items()]
