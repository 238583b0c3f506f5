"""Cityscapes: 3475 photographs of streets with 19, 7 and 2 classes of things and inverse depths for their pixels.

By Cordts et al. (CVPR 2016), in the files of MTAN. The paper (C.8) takes the 19 classes as the main task, the 7 and
the 2 classes and the depth as auxiliary ones.

Where labels of fewer classes are missing they follow from those of more. The 7 classes are the categories of
Cityscapes' own table of labels (`cityscapesscripts/helpers/labels.py`), without "void"; of the 2, the foreground is
what moves: human and vehicle. A pixel without one of the 19 classes has none of the 7 then, though a file may give it
one: a parking lot is flat, but none of the 19.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auxfast.experiments.data.checks import check_counts
from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.scenes import (
    IMAGE,
    UNKNOWN,
    ArrayKind,
    SceneArrays,
    label_kind,
    mirrored,
    read_scene_folder,
)

CATEGORIES: dict[str, tuple[str, ...]] = {
    "flat": ("road", "sidewalk"),
    "construction": ("building", "wall", "fence"),
    "object": ("pole", "traffic light", "traffic sign"),
    "nature": ("vegetation", "terrain"),
    "sky": ("sky",),
    "human": ("person", "rider"),
    "vehicle": ("car", "truck", "bus", "train", "motorcycle", "bicycle"),
}
CLASS_NAMES = tuple(name for names in CATEGORIES.values() for name in names)
FOREGROUND = ("human", "vehicle")
GRANULARITIES = (19, 7, 2)
_COARSER = {  # entry k of a list is what class k becomes
    (19, 7): [category for category, names in enumerate(CATEGORIES.values()) for _ in names],
    (7, 2): [int(category in FOREGROUND) for category in CATEGORIES],
}
_LARGEST_INVERSE_DEPTH = 1.0  # MTAN's files stay below 0.5, and the disparities of the original ones are found
_OFFICIAL_TRAINING, _OFFICIAL_TEST = 2975, 500
_OFFICIAL_SIZES = ((128, 256), (256, 512))
_PROBES = 20  # scenes whose labels tell how many classes there are; a street without sky or car is rare


@dataclass(frozen=True)
class CityscapesScenes:
    """A batch of k scenes.

    images: (k, 3, H, W) float32 from 0 to 1, red, green, blue.
    labels: (k, H, W) int64 by the number of classes, of which they are from 0 up; `scenes.UNKNOWN` where there is
        none. The order of 19 classes is that of `CLASS_NAMES`, that of 7 that of `CATEGORIES`; of 2, foreground is 1.
    inverse_depths: (k, 1, H, W) float32, proportional to 1 / depth, 0 where unknown.
    """

    images: Tensor
    labels: Mapping[int, Tensor]
    inverse_depths: Tensor

    def flipped(self, chosen: Tensor) -> CityscapesScenes:
        """The batch with left and right exchanged in the `chosen` scenes, (k,) bool."""
        return CityscapesScenes(
            mirrored(self.images, chosen),
            {classes: mirrored(labels, chosen) for classes, labels in self.labels.items()},
            mirrored(self.inverse_depths, chosen),
        )


@dataclass(frozen=True)
class CityscapesData:
    """The scenes of a copy, read from their files when they are asked for: `data[rows]` with rows (k,) int64.

    training, test: (n,) and (m,) int64: rows of the official parts; the paper's test part is the official `val`.
    size: height and width, in pixels.
    images, inverse_depths: the arrays of all scenes, each by itself, as in `CityscapesScenes`.
    label_files: the arrays of labels that the copy has, by the number of classes.
    """

    training: Tensor
    test: Tensor
    size: tuple[int, int]
    images: SceneArrays
    label_files: Mapping[int, SceneArrays]
    inverse_depths: SceneArrays

    @property
    def granularities(self) -> tuple[int, ...]:
        """Numbers of classes for which there are labels, or labels of more classes from which they follow.

        They are (19, 7, 2) where the paper's main task can be trained, and (7, 2) where a copy has no labels of 19.
        """
        return tuple(classes for classes in GRANULARITIES if classes <= max(self.label_files))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor, /) -> CityscapesScenes:
        """The scenes in these rows, (k,) int64, with labels of all `granularities`.

        Raises:
            DatasetError: a file is not what it should be; the message names it.
        """
        labels: dict[int, Tensor] = {}
        for classes in self.granularities:
            if classes in self.label_files:
                labels[classes] = self.label_files[classes][rows]
            else:
                finer = min(labels)
                labels[classes] = coarser_labels(labels[finer], finer, classes)
        return CityscapesScenes(self.images[rows], labels, self.inverse_depths[rows])


def coarser_labels(labels: Tensor, classes: int, fewer: int) -> Tensor:
    """Labels of 7 classes from those of 19, or of 2 from those of 7. labels: int64 of any shape, `UNKNOWN` stays."""
    table = torch.tensor([*_COARSER[classes, fewer], UNKNOWN])  # UNKNOWN is -1, and so its own last entry
    return table[labels]


def load_cityscapes(folder: str | Path) -> CityscapesData:
    """Finds the scenes in `folder`, which holds `train` and `val`, each with `image`, `depth` and labels.

    Labels are in `label_19`, `label_7` and `label_2`, any of them, or in `label`, where the labels of some scenes tell
    of how many classes they are. Headers are read now, values when they are asked for. All arrays must have one height
    and width; that there are as many scenes as in the official copy is for `check_cityscapes` to say.

    Raises:
        DatasetError: a folder or a number is missing, or a file is no whole array of the shape that all have.
    """
    folder = Path(folder)
    named = {
        classes: f"label_{classes}" for classes in GRANULARITIES if (folder / "train" / f"label_{classes}").is_dir()
    }
    if not named:
        named = {_classes_in_label_folder(folder): "label"}
    kinds = {"image": IMAGE, "depth": ArrayKind(channels=1, low=0, high=_LARGEST_INVERSE_DEPTH)}
    kinds |= {name: label_kind(classes) for classes, name in named.items()}
    scenes = read_scene_folder(folder, kinds, "Cityscapes")
    return CityscapesData(
        scenes.training,
        scenes.test,
        scenes.size,
        scenes.arrays["image"],
        {classes: scenes.arrays[name] for classes, name in named.items()},
        scenes.arrays["depth"],
    )


def check_cityscapes(folder: str | Path) -> list[str]:
    """Lines that say what is in the copy in `folder`, one a count, and which tasks it has labels for. Values are looked
    at in the first and last scene of each part.

    Raises:
        DatasetError: as `load_cityscapes`; values are out of their range; a count is not the official one.
    """
    data, folder = load_cityscapes(folder), Path(folder)
    data[torch.cat([data.training[[0, -1]], data.test[[0, -1]]])]
    if data.size not in _OFFICIAL_SIZES:
        raise DatasetError(f"{folder}: {data.size} pixels, expected one of {_OFFICIAL_SIZES} as in the official copies")
    found = ", ".join(map(str, data.label_files))
    derived = ", ".join(str(classes) for classes in data.granularities if classes not in data.label_files)
    tasks = f"labels: of {found} classes" + (f"; those of {derived} follow from them" if derived else "")
    if GRANULARITIES[0] not in data.granularities:
        tasks += f"; the paper's main task needs those of {GRANULARITIES[0]}"
    counts = {
        "training scenes": (len(data.training), _OFFICIAL_TRAINING),
        "test scenes": (len(data.test), _OFFICIAL_TEST),
    }
    return [*check_counts(folder, counts), f"pixels: {data.size[0]} x {data.size[1]}", tasks]


def _classes_in_label_folder(folder: Path) -> int:
    """The number of classes of the labels in `label`, by the largest one in some scenes."""
    if not (folder / "train" / "label").is_dir():
        expected = ", ".join(f"label_{classes}" for classes in GRANULARITIES)
        raise DatasetError(f"{folder / 'train'}: no folder with labels, expected at least one of {expected}, label")
    scenes = read_scene_folder(folder, {"label": label_kind(max(GRANULARITIES))}, "Cityscapes")
    rows = scenes.training[:: max(1, len(scenes.training) // _PROBES)]
    largest = int(scenes.arrays["label"][rows].max())
    return min(classes for classes in GRANULARITIES if largest < classes)
