"""ShapeNet part: 16,881 shapes of 16 categories as clouds of points, each point labelled with one of 50 parts.

By Yi et al. (SIGGRAPH Asia 2016), in the text files with normals,
`shapenetcore_partanno_segmentation_benchmark_v0_normal`, which come with lists of the official split (Chang et al.,
2015). The paper (C.9) takes the parts as the main task and learns auxiliary ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from auxfast.experiments.data.checks import check_array, check_counts
from auxfast.experiments.data.files import DatasetError, brief, need_file, read_table, read_text

# The numbers of parts are global: a point of a bag is 4 or 5.
PARTS: dict[str, range] = {
    "Airplane": range(4),
    "Bag": range(4, 6),
    "Cap": range(6, 8),
    "Car": range(8, 12),
    "Chair": range(12, 16),
    "Earphone": range(16, 19),
    "Guitar": range(19, 22),
    "Knife": range(22, 24),
    "Lamp": range(24, 28),
    "Laptop": range(28, 30),
    "Motorbike": range(30, 36),
    "Mug": range(36, 38),
    "Pistol": range(38, 41),
    "Rocket": range(41, 44),
    "Skateboard": range(44, 47),
    "Table": range(47, 50),
}
CATEGORIES = tuple(PARTS)
_NAME = "ShapeNet part"
_SPLIT = ("train", "val", "test")
_OFFICIAL_COUNTS = (12137, 1870, 2874)
_COLUMNS = (4, 7)  # x y z part, or x y z, the normal's x y z, and part
_LARGEST_COORDINATE = 10.0  # shapes fit into a ball of about radius 1


@dataclass(frozen=True)
class PartShape:
    """A shape of p points.

    points: (p, 3) float32.
    parts: (p,) int64: a number in the category's range of `PARTS`.
    normals: (p, 3) float32, or None where the file has none.
    """

    points: Tensor
    parts: Tensor
    normals: Tensor | None


@dataclass(frozen=True)
class ShapeNetPartData:
    """The n shapes of a copy, read from their files when they are asked for.

    categories: (n,) int64, from 0 to 15 in the order of `CATEGORIES`.
    training, validation, test: int64 rows of the official parts, of which there are n in all.
    files: the shapes' files.
    """

    categories: Tensor
    training: Tensor
    validation: Tensor
    test: Tensor
    files: tuple[Path, ...]
    _read: dict[int, PartShape] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, row: int) -> PartShape:
        """The shape in this row, with all its points, some hundreds to some thousands, in the order of its file.

        It is kept, so that a second epoch reads no text: about 80 kB a shape, 1.4 GB for all.

        Raises:
            DatasetError: the file is not what it should be; the message names it and the row.
        """
        if row not in self._read:
            self._read[row] = _read_shape(self.files[row], CATEGORIES[int(self.categories[row])])
        return self._read[row]


def load_shapenet_part(folder: str | Path) -> ShapeNetPartData:
    """Finds the shapes in `folder`, which holds `synsetoffset2category.txt` and a folder a category.

    In the folder `train_test_split` are the lists of the split, `shuffled_train_file_list.json` and so on. No
    shape is read yet. That there are as many as in the official copy is for `check_shapenet_part` to say.

    Raises:
        DatasetError: a file is missing, a list of the split is not what this reader knows, or lists share a shape.
    """
    folder = Path(folder)
    category_of = _read_synsets(need_file(folder, "synsetoffset2category.txt", _NAME))
    present = {synset: _text_files(folder / synset) for synset in category_of}
    files: list[Path] = []
    categories: list[int] = []
    sizes = []
    for part in _SPLIT:
        path = need_file(folder, f"train_test_split/shuffled_{part}_file_list.json", _NAME)
        before = len(files)
        for synset, name in _read_list(path):
            if synset not in category_of:
                raise DatasetError(f"{path}: synset {brief(synset)}, expected one of {', '.join(category_of)}")
            if name not in present[synset]:
                raise DatasetError(f"{folder / synset / name}: no such file, expected since {path} lists it")
            files.append(folder / synset / name)
            categories.append(category_of[synset])
        sizes.append(len(files) - before)
    if len(set(files)) < len(files):
        twice, _ = Counter(files).most_common(1)[0]
        raise DatasetError(
            f"{folder / 'train_test_split'}: {twice} is listed twice, expected lists that share no shape"
        )
    training, validation, test = torch.arange(len(files)).split(sizes)
    return ShapeNetPartData(torch.tensor(categories), training, validation, test, tuple(files))


def check_shapenet_part(folder: str | Path) -> list[str]:
    """Lines that say what is in the copy in `folder`, one a count. Of each category, one shape is read; of the others,
    the size of the file is looked at.

    Raises:
        DatasetError: as `load_shapenet_part`; a file is empty, or is not what it should be; a count is not the
            official one.
    """
    data, folder = load_shapenet_part(folder), Path(folder)
    for file in data.files:
        if not file.stat().st_size:
            raise DatasetError(f"{file}: 0 bytes, expected a line a point")
    for category in range(len(CATEGORIES)):
        for row in torch.nonzero(data.categories == category)[:1].flatten().tolist():
            data.shape(row)
    parts = (data.training, data.validation, data.test)
    found = zip(("training", "validation", "test"), map(len, parts), _OFFICIAL_COUNTS, strict=True)
    return check_counts(folder, {f"{name} shapes": (count, official) for name, count, official in found})


def _read_synsets(path: Path) -> dict[str, int]:
    """The category of each synset, which is the name of a folder, from a file of lines "category synset"."""
    rows = [line.split() for line in read_text(path).splitlines() if line.strip()]
    if sorted(row[0] for row in rows) != sorted(CATEGORIES) or any(len(row) != 2 for row in rows):
        raise DatasetError(
            f"{path}: {brief(rows)}, expected a category and a synset a line, for {', '.join(CATEGORIES)}"
        )
    return {synset: CATEGORIES.index(name) for name, synset in rows}


def _text_files(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder, expected one with the shapes of a category of {_NAME}")
    return {path.name for path in folder.iterdir() if path.suffix == ".txt"}


def _read_list(path: Path) -> Iterator[tuple[str, str]]:
    """The synset and the file's name of each shape in a list of the split, of entries "shape_data/synset/shape"."""
    try:
        entries = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # lists in lists, thousands deep, are the second
        raise DatasetError(f"{path}: {error}, expected a list in JSON") from error
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"{path}: no list with entries, expected those of the shapes in this part")
    for entry in entries:
        fields = entry.split("/") if isinstance(entry, str) else ()
        if len(fields) != 3:
            raise DatasetError(f"{path}: entry {brief(entry)}, expected shape_data/synset/shape")
        yield fields[1], f"{fields[2]}.txt"


def _read_shape(path: Path, category: str) -> PartShape:
    expected = f"{' or '.join(map(str, _COLUMNS))} numbers"
    table = read_table(path, expected)
    points, columns = table.shape
    if columns not in _COLUMNS:
        raise DatasetError(f"{path}: {columns} numbers a line, expected {expected}")
    values, parts, known = table[:, :-1], table[:, -1], PARTS[category]
    check_array(str(path), values, shape=(points, columns - 1), low=-_LARGEST_COORDINATE, high=_LARGEST_COORDINATE)
    check_array(f"{path}, parts of {category}", parts, shape=(points,), low=known[0], high=known[-1], whole=True)
    return PartShape(
        torch.from_numpy(values[:, :3].astype(np.float32)),
        torch.from_numpy(parts.astype(np.int64)),
        torch.from_numpy(values[:, 3:].astype(np.float32)) if columns == max(_COLUMNS) else None,
    )
