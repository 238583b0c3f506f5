"""NYUv2: 1449 photographs of rooms with 13 classes of things, depths and surface normals for their pixels.

By Silberman, Hoiem, Kohli and Fergus (ECCV 2012), with the classes of Couprie et al. (2013) and the normals of Eigen
and Fergus (2015), in the files of MTAN. The paper (section 5.3) takes the classes as the main task, depth and normals
as auxiliary ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auxfast.experiments.data.checks import check_counts
from auxfast.experiments.data.scenes import (
    IMAGE,
    NORMAL,
    ArrayKind,
    SceneArrays,
    label_kind,
    mirrored,
    read_scene_folder,
)

CLASSES = 13
_LARGEST_DEPTH = 100.0  # metres: rooms are smaller, and depths in millimetres are found
_KINDS = {
    "image": IMAGE,
    "label": label_kind(CLASSES),
    "depth": ArrayKind(channels=1, low=0, high=_LARGEST_DEPTH),
    "normal": NORMAL,
}
_OFFICIAL_TRAINING, _OFFICIAL_TEST = 795, 654
_OFFICIAL_HEIGHT, _OFFICIAL_WIDTH = 288, 384


@dataclass(frozen=True)
class NYUv2Scenes:
    """A batch of k scenes.

    images: (k, 3, H, W) float32 from 0 to 1, red, green, blue.
    labels: (k, H, W) int64 from 0 to 12, `scenes.UNKNOWN` where there is none.
    depths: (k, 1, H, W) float32, in metres, 0 where unknown.
    normals: (k, 3, H, W) float32, unit vectors. They are known where the depth is (AuxiLearn's rule); MTAN takes them
        as known where their three numbers do not add up to 0.
    """

    images: Tensor
    labels: Tensor
    depths: Tensor
    normals: Tensor

    def flipped(self, chosen: Tensor) -> NYUv2Scenes:
        """The batch with left and right exchanged in the `chosen` scenes, (k,) bool: their normals turn with them."""
        sign = torch.where(chosen, -1.0, 1.0).view(-1, 1, 1)
        normals = mirrored(self.normals, chosen)
        normals[:, 0] *= sign
        return NYUv2Scenes(
            mirrored(self.images, chosen), mirrored(self.labels, chosen), mirrored(self.depths, chosen), normals
        )


@dataclass(frozen=True)
class NYUv2Data:
    """The scenes of a copy, read from their files when they are asked for: `data[rows]` with rows (k,) int64.

    training, test: (n,) and (m,) int64: rows of the official parts.
    size: height and width, in pixels.
    images, labels, depths, normals: the arrays of all scenes, each by itself, as in `NYUv2Scenes`.
    """

    training: Tensor
    test: Tensor
    size: tuple[int, int]
    images: SceneArrays
    labels: SceneArrays
    depths: SceneArrays
    normals: SceneArrays

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor, /) -> NYUv2Scenes:
        """The scenes in these rows, (k,) int64.

        Raises:
            DatasetError: a file is not what it should be; the message names it.
        """
        return NYUv2Scenes(self.images[rows], self.labels[rows], self.depths[rows], self.normals[rows])


def load_nyuv2(folder: str | Path) -> NYUv2Data:
    """Finds the scenes in `folder`, which holds `train` and `val`, each with `image`, `label`, `depth` and `normal`.

    Headers are read now, values when they are asked for. All arrays must have one height and width; that there are as
    many scenes as in the official copy, 288 x 384 pixels each, is for `check_nyuv2` to say.

    Raises:
        DatasetError: a folder or a number is missing, or a file is no whole array of the shape that all have.
    """
    scenes = read_scene_folder(Path(folder), _KINDS, "NYUv2")
    images, labels, depths, normals = (scenes.arrays[name] for name in _KINDS)
    return NYUv2Data(scenes.training, scenes.test, scenes.size, images, labels, depths, normals)


def check_nyuv2(folder: str | Path) -> list[str]:
    """Lines that say what is in the copy in `folder`, one a count. Values are looked at in the first and last scene of
    each part.

    Raises:
        DatasetError: as `load_nyuv2`; values are out of their range; a count is not the official one.
    """
    data, folder = load_nyuv2(folder), Path(folder)
    data[torch.cat([data.training[[0, -1]], data.test[[0, -1]]])]
    counts = {
        "training scenes": (len(data.training), _OFFICIAL_TRAINING),
        "test scenes": (len(data.test), _OFFICIAL_TEST),
        "pixels in height": (data.size[0], _OFFICIAL_HEIGHT),
        "pixels in width": (data.size[1], _OFFICIAL_WIDTH),
    }
    return check_counts(folder, counts)
