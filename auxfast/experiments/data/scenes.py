"""Scenes of NYUv2 and Cityscapes in the files of MTAN (Liu, Johns and Davison, CVPR 2019), one a scene and kind.

MTAN is https://github.com/lorenmt/mtan. A copy has the folders `train` and `val`, in each a folder for each kind of
array (`image`, `label`, `depth`, ...), and in that the files `0.npy`, `1.npy` and so on. The paper tests on `val`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from auxfast.experiments.data.checks import check_array, row_numbers
from auxfast.experiments.data.files import DatasetError

UNKNOWN = -1  # the label of pixels that have none
_PARTS = ("train", "val")
# Resampling may take values a little out of their range; what is meant to be found is an image from 0 to 255.
_SLACK = 0.1


@dataclass(frozen=True)
class ArrayKind:
    """Kind of the arrays in one folder.

    channels: length of the last axis, after height and width; None where there is no such axis.
    low, high: the range of the values.
    whole: whether they are whole numbers.
    """

    channels: int | None
    low: float
    high: float
    whole: bool = False


IMAGE = ArrayKind(channels=3, low=-_SLACK, high=1 + _SLACK)
NORMAL = ArrayKind(channels=3, low=-1 - _SLACK, high=1 + _SLACK)


def label_kind(classes: int) -> ArrayKind:
    """Labels from 0 to `classes` - 1, and `UNKNOWN`."""
    return ArrayKind(channels=None, low=UNKNOWN, high=classes - 1, whole=True)


class SceneArrays:
    """Arrays of one kind, one a scene, that are read and checked when they are asked for.

    `arrays[rows]` with rows (k,) int64 is (k, channels, H, W) float32, or (k, H, W) int64 for labels.

    Args:
        paths: the files.
        kind: what they hold.
        size: their height and width, in pixels.
    """

    def __init__(self, paths: Sequence[Path], kind: ArrayKind, size: tuple[int, int]) -> None:
        self._paths = tuple(paths)
        self._kind = kind
        self._size = size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """The arrays of these scenes.

        Raises:
            DatasetError: a file is not what its kind says (shape, range, finite numbers); the message names it.
            ValueError: `rows` has another shape or dtype.
        """
        channels = () if self._kind.channels is None else (self._kind.channels,)
        stacked = np.empty((len(rows), *channels, *self._size), dtype=np.int64 if self._kind.whole else np.float32)
        for place, row in enumerate(row_numbers(rows)):
            array = _load(self._paths[row])
            check_array(
                str(self._paths[row]),
                array,
                shape=(*self._size, *channels),
                low=self._kind.low,
                high=self._kind.high,
                whole=self._kind.whole,
            )
            stacked[place] = np.moveaxis(array, -1, 0) if channels else array
        return torch.from_numpy(stacked)


@dataclass(frozen=True)
class SceneFolder:
    """A copy in MTAN's files.

    training, test: (n,) and (m,) int64: rows of the scenes in `train` and in `val`. The rows of `train` come first.
    size: height and width of all arrays, in pixels.
    arrays: those in the folders of each name, in `train` and then in `val`.
    """

    training: Tensor
    test: Tensor
    size: tuple[int, int]
    arrays: Mapping[str, SceneArrays]


def read_scene_folder(folder: Path, kinds: Mapping[str, ArrayKind], dataset: str) -> SceneFolder:
    """Finds the scenes in `folder`; reads the header of every file, and no values.

    Args:
        folder: the one that holds `train` and `val`.
        kinds: what each folder in those two holds, by its name. The first one says how large all are.
        dataset: the data set's name, for errors.

    Raises:
        DatasetError: a folder is missing or has no arrays, numbers are missing, or a file is no array, is cut off, or
            has another shape than the first.
    """
    paths: dict[str, list[Path]] = {name: [] for name in kinds}
    counts = []
    for part in _PARTS:
        numbered = {name: _numbered_files(folder / part / name, dataset) for name in kinds}
        first, *others = kinds
        counts.append(len(numbered[first]))
        for other in others:
            if len(numbered[other]) != counts[-1]:
                raise DatasetError(
                    f"{folder / part / other}: {len(numbered[other])} arrays, expected {counts[-1]} as in {first}"
                )
        for name in kinds:
            paths[name] += numbered[name]
    size = _header(first_path := paths[next(iter(kinds))][0])[:2]
    if len(size) != 2:
        raise DatasetError(f"{first_path}: shape {size}, expected axes of height and width")
    for name, kind in kinds.items():
        expected = size if kind.channels is None else (*size, kind.channels)
        for path in paths[name]:
            if (shape := _header(path)) != expected:
                raise DatasetError(
                    f"{path}: shape {shape}, expected {expected}: {dataset} in MTAN's files, all of one size"
                )
    return SceneFolder(
        torch.arange(counts[0]),
        torch.arange(counts[0], sum(counts)),
        size,
        {name: SceneArrays(paths[name], kind, size) for name, kind in kinds.items()},
    )


def mirrored(values: Tensor, chosen: Tensor) -> Tensor:
    """The arrays (k, ..., W) with left and right exchanged in those that are `chosen`: (k,) bool."""
    return torch.where(chosen.view(-1, *[1] * (values.dim() - 1)), values.flip(-1), values)


def _numbered_files(folder: Path, dataset: str) -> list[Path]:
    """The files 0.npy to (n - 1).npy in a folder."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder, expected in a copy of {dataset} in MTAN's files")
    names = {path.name for path in folder.glob("*.npy") if path.stem.isdecimal()}
    if not names:
        raise DatasetError(f"{folder}: no arrays, expected 0.npy, 1.npy and so on")
    paths = [folder / f"{number}.npy" for number in range(len(names))]
    missing = [path for path in paths if path.name not in names]
    if missing:
        raise DatasetError(
            f"{missing[0]}: no such file, though {len(names)} arrays are there: expected no number to be left out"
        )
    return paths


def _header(path: Path) -> tuple[int, ...]:
    """The shape of the array in a file, which is long enough for it."""
    return _load(path, mmap=True).shape


def _load(path: Path, *, mmap: bool = False) -> np.ndarray:
    """The array in a file; with `mmap`, its values are not read until they are used."""
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except Exception as error:  # what a damaged header raises depends on the byte that is wrong
        raise DatasetError(
            f"{path}: {str(error) or type(error).__name__}, expected a whole .npy file with an array of numbers"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        kind = array.dtype if isinstance(array, np.ndarray) else "an archive"
        raise DatasetError(f"{path}: {kind}, expected an array of whole or floating point numbers")
    return array
