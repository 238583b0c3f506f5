"""Tiny copies of CUB-200-2011, NYUv2, Cityscapes and ShapeNet part, in exactly the formats of the real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from auxfast.experiments.data.cityscapes import CATEGORIES, CLASS_NAMES, FOREGROUND
from auxfast.experiments.data.cub import ATTRIBUTES
from auxfast.experiments.data.nyuv2 import CLASSES
from auxfast.experiments.data.shapenet_part import PARTS

SYNSETS = (
    *("02691156", "02773838", "02954340", "02958343", "03001627", "03261776", "03467517", "03624134"),
    *("03636649", "03642806", "03790512", "03797390", "03948459", "04099429", "04225987", "04379243"),
)
"""The folders of ShapeNet part, in the order of the categories."""


def write_cub(folder: Path, classes: int = 3, train: int = 2, test: int = 1) -> Path:
    """Writes CUB-200-2011 as it is unpacked: `CUB_200_2011`, which is returned, and `attributes.txt` beside it.

    Each class has `train` and `test` JPEG files of 40 x 30 pixels; the first one is grey. The attributes are random and
    those of the first two images have rows with more fields, as some of the real file.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    home = folder / "CUB_200_2011"
    (home / "attributes").mkdir(parents=True)
    names = [f"{number + 1:03d}.Some_Bird_{number + 1}" for number in range(classes)]
    images = [
        (number, f"{names[number]}/Bird_{i:04d}.jpg", i < train)
        for number in range(classes)
        for i in range(train + test)
    ]
    for row, (number, name, _) in enumerate(images):
        path = home / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (30, 40, 3)) // 2 + 128 * number // classes
        image = Image.fromarray(pixels.astype(np.uint8))
        (image.convert("L") if row == 0 else image).save(path)
    _write_lines(home / "images.txt", [f"{row} {name}" for row, (_, name, _) in enumerate(images, 1)])
    _write_lines(home / "classes.txt", [f"{row} {name}" for row, name in enumerate(names, 1)])
    _write_lines(home / "image_class_labels.txt", [f"{row} {image[0] + 1}" for row, image in enumerate(images, 1)])
    _write_lines(home / "train_test_split.txt", [f"{row} {int(image[2])}" for row, image in enumerate(images, 1)])
    _write_lines(folder / "attributes.txt", [f"{row} has_trait::value_{row}" for row in range(1, ATTRIBUTES + 1)])
    present = rng.integers(0, 2, (len(images), ATTRIBUTES))
    certainty = rng.integers(1, 5, (len(images), ATTRIBUTES))
    rows = [
        f"{i + 1} {j + 1} {present[i, j]} {certainty[i, j]} "
        + ("0 1.509" if i < 2 and j == 9 else f"{1.25 + j / 8:.3f}")
        for i in range(len(images))
        for j in range(ATTRIBUTES)
    ]
    _write_lines(home / "attributes" / "image_attribute_labels.txt", rows)
    return home


def write_nyuv2(folder: Path, train: int = 4, val: int = 3, height: int = 32, width: int = 64) -> Path:
    """Writes NYUv2 in MTAN's files into `folder`, which is returned: `train` and `val` scenes of random values.

    In each scene are all classes and `UNKNOWN`; where a depth is 0, as at the first pixel, so is the normal.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            depth = rng.uniform(0.7, 9.9, (height, width, 1)) * (rng.random((height, width, 1)) > 0.1)
            depth[0, 0] = 0
            normal = rng.normal(size=(height, width, 3))
            normal *= (depth > 0) / np.linalg.norm(normal, axis=-1, keepdims=True)
            arrays = {
                "image": rng.random((height, width, 3)),
                "label": _labels(rng, height, width, CLASSES),
                "depth": depth,
                "normal": normal,
            }
            _save(folder / part, number, arrays)
    return folder


def write_cityscapes(
    folder: Path,
    train: int = 4,
    val: int = 3,
    height: int = 32,
    width: int = 64,
    labels: Mapping[str, int] | None = None,
) -> Path:
    """Writes Cityscapes in MTAN's files into `folder`, which is returned: `train` and `val` scenes of random values.

    labels: the folders of labels, each with its number of classes, of which every scene has all; `label_19` and
    `label_7` unless they are given. The labels of 7 and of 2 classes follow from those of 19.
    """
    rng = np.random.default_rng(0)
    category_of = [k for k, names in enumerate(CATEGORIES.values()) for name in CLASS_NAMES if name in names]
    in_foreground = [int(name in FOREGROUND) for name in CATEGORIES]
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            label = _labels(rng, height, width, len(CLASS_NAMES)).astype(int)
            categories = np.where(label < 0, -1, np.array(category_of)[label])
            by_classes = {
                19: label,
                7: categories,
                2: np.where(categories < 0, -1, np.array(in_foreground)[categories]),
            }
            depth = rng.uniform(0.01, 0.49, (height, width, 1)) * (rng.random((height, width, 1)) > 0.1)
            arrays = {"image": rng.random((height, width, 3)), "depth": depth}
            for name, classes in (labels or {"label_19": 19, "label_7": 7}).items():
                arrays[name] = by_classes[classes].astype(float)
            _save(folder / part, number, arrays)
    return folder


def write_shapenet_part(folder: Path, train: int = 2, val: int = 1, test: int = 1, points: int = 48) -> Path:
    """Writes ShapeNet part into `folder`, which is returned: `train`, `val` and `test` shapes of each of 16 categories.

    A shape has `points` or a few more points with normals, each part of the category in layers along z.
    """
    rng = np.random.default_rng(0)
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for synset, parts in zip(SYNSETS, PARTS.values(), strict=True):
        (folder / synset).mkdir(parents=True)
        for part, count in (("train", train), ("val", val), ("test", test)):
            for number in range(count):
                name = f"{part}{number}"
                height = rng.uniform(-0.5, 0.5, points + number)
                layer = np.digitize(height, np.linspace(-0.5, 0.5, len(parts) + 1)[1:-1])
                layer[: len(parts)] = range(len(parts))
                normals = rng.normal(size=(len(height), 3))
                normals /= np.linalg.norm(normals, axis=1, keepdims=True)
                plane = rng.uniform(-0.3, 0.3, (len(height), 2))
                rows = np.column_stack([plane, height, normals, layer + parts[0]])
                _write_lines(folder / synset / f"{name}.txt", [" ".join(f"{v:.6f}" for v in row) for row in rows])
                lists[part].append(f"shape_data/{synset}/{name}")
    _write_lines(
        folder / "synsetoffset2category.txt", [f"{name}\t{synset}" for name, synset in zip(PARTS, SYNSETS, strict=True)]
    )
    (folder / "train_test_split").mkdir()
    for part, entries in lists.items():
        path = folder / "train_test_split" / f"shuffled_{part}_file_list.json"
        path.write_text(json.dumps([entries[i] for i in rng.permutation(len(entries))]))
    return folder


def _labels(rng: np.random.Generator, height: int, width: int, classes: int) -> np.ndarray:
    """(height, width) float64 labels, all classes and -1 in a random order."""
    return rng.permutation(np.resize(np.arange(-1.0, classes), height * width)).reshape(height, width)


def _save(folder: Path, number: int, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / name / f"{number}.npy", array)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))
