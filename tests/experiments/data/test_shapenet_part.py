import json
import shutil

import numpy as np
import pytest
import torch

from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.shapenet_part import CATEGORIES, PARTS, check_shapenet_part, load_shapenet_part
from experiments.data.fixtures_scenes import SYNSETS, write_shapenet_part


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return write_shapenet_part(tmp_path_factory.mktemp("shapenet"), points=12)


@pytest.fixture
def broken(copy, tmp_path):
    """A copy to break."""
    return shutil.copytree(copy, tmp_path / "shapenet")


def test_parts_are_numbered_through_all_categories():
    assert len(CATEGORIES) == 16
    assert [part for parts in PARTS.values() for part in parts] == list(range(50))
    assert max(len(parts) for parts in PARTS.values()) == 6


def test_shapes_are_those_of_the_files(copy):
    data = load_shapenet_part(copy)
    assert len(data) == 64
    for row in (0, 40, 63):
        shape, table = data.shape(row), np.loadtxt(data.files[row], dtype=np.float32)
        assert np.array_equal(shape.points, table[:, :3])
        assert np.array_equal(shape.normals, table[:, 3:6])
        assert np.array_equal(shape.parts, table[:, 6])
        assert shape.points.dtype == torch.float32
        assert shape.parts.dtype == torch.int64


def test_the_official_split_is_that_of_the_lists(copy):
    data = load_shapenet_part(copy)
    parts = {"train": data.training, "val": data.validation, "test": data.test}
    assert torch.cat(list(parts.values())).tolist() == list(range(64))
    for part, rows in parts.items():
        listed = json.loads((copy / f"train_test_split/shuffled_{part}_file_list.json").read_text())
        assert [f"shape_data/{data.files[row].parent.name}/{data.files[row].stem}" for row in rows] == listed
    assert data.categories[data.training].bincount().tolist() == [2] * 16
    for row, category in enumerate(data.categories.tolist()):
        assert data.files[row].parent.name == SYNSETS[category]


def test_a_shape_is_read_once(broken):
    data = load_shapenet_part(broken)
    first = data.shape(5)
    data.files[5].unlink()
    assert data.shape(5) is first


def test_normals_are_not_required(broken):
    data = load_shapenet_part(broken)
    table = np.loadtxt(data.files[3])
    np.savetxt(data.files[3], table[:, [0, 1, 2, 6]])
    shape = data.shape(3)
    assert shape.normals is None
    assert np.array_equal(shape.points, table[:, :3].astype(np.float32))


LIST = "train_test_split/shuffled_train_file_list.json"


def _list(change):
    return lambda folder: (folder / LIST).write_text(json.dumps(change(json.loads((folder / LIST).read_text()))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, r"shapenet: no such folder, expected one with ShapeNet part and so with synsetoffset2category"),
        (lambda folder: (folder / LIST).unlink(), r"shuffled_train_file_list\.json: no such file"),
        (lambda folder: (folder / LIST).write_text('["shape_data/02'), r"list\.json: .*, expected a list in JSON"),
        (lambda folder: (folder / LIST).write_text("{}"), r"list\.json: no list with entries"),
        (
            _list(lambda entries: [*entries, "02691156/train0"]),
            r"list\.json: entry '02691156/train0', expected shape_data/",
        ),
        (_list(lambda entries: [*entries, "shape_data/0/a"]), r"list\.json: synset '0', expected one of 02691156, "),
        (
            _list(lambda entries: [*entries, "shape_data/02691156/test0"]),
            r"02691156/test0\.txt is listed twice, expected",
        ),
        (
            lambda folder: (folder / "02691156/val0.txt").unlink(),
            r"02691156/val0\.txt: no such file, expected since .*val",
        ),
        (
            lambda folder: shutil.rmtree(folder / "04379243"),
            r"04379243: no such folder, expected one with the shapes of",
        ),
        (
            lambda folder: (folder / "synsetoffset2category.txt").write_text("Airplane 02691156\n"),
            r"synsetoffset2category\.txt: \[\['Airplane', '02691156'\]\], expected a category and a synset a line",
        ),
    ],
)
def test_a_copy_that_is_not_whole_is_refused_with_the_file(broken, change, message):
    change(broken)
    with pytest.raises(DatasetError, match=message):
        load_shapenet_part(broken)


def _with(value, *index):
    def change(table):
        table[index] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(4, 1, 6), r"train0\.txt, parts of Airplane: 4 at \(1,\), expected whole numbers from 0 to 3"),
        (_with(0.5, 1, 6), r"train0\.txt, parts of Airplane: 0.5 at \(1,\), expected whole numbers"),
        (_with(np.nan, 2, 1), r"train0\.txt: nan at \(2, 1\), expected finite numbers from -10 to 10"),
        (lambda table: table[:, :6], r"train0\.txt: 6 numbers a line, expected 4 or 7"),
    ],
)
def test_a_shape_that_is_not_as_known_is_refused_with_its_file(broken, change, message):
    file = broken / "02691156/train0.txt"
    np.savetxt(file, change(np.loadtxt(file)))
    data = load_shapenet_part(broken)
    with pytest.raises(DatasetError, match=message):
        data.shape(data.files.index(file))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda text: text[: text.rindex(" ")], r"train0\.txt: .*row 12.*; expected 4 or 7 numbers a line"),
        (lambda text: text.replace("0", "zero", 1), r"train0\.txt: .*zero.*; expected 4 or 7 numbers a line"),
        (lambda text: "\n\n", r"train0\.txt: no numbers, expected 4 or 7 numbers a line"),
    ],
)
def test_a_shape_that_is_cut_off_is_refused_with_its_file(broken, cut, message):
    file = broken / "02691156/train0.txt"
    file.write_text(cut(file.read_text()))
    data = load_shapenet_part(broken)
    with pytest.raises(DatasetError, match=message):
        data.shape(data.files.index(file))


def test_a_list_of_lists_without_end_is_refused(broken):
    path = broken / "train_test_split/shuffled_val_file_list.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DatasetError, match=rf"^{path}: .*, expected a list in JSON"):
        load_shapenet_part(broken)


def test_the_check_compares_with_the_official_numbers(broken, monkeypatch):
    expected = (
        "32 training shapes, expected 12,137; 16 validation shapes, expected 1,870; 16 test shapes, expected 2,874"
    )
    with pytest.raises(DatasetError, match=expected):
        check_shapenet_part(broken)
    monkeypatch.setattr("auxfast.experiments.data.shapenet_part._OFFICIAL_COUNTS", (32, 16, 16))
    assert check_shapenet_part(broken) == [
        "training shapes: 32 of 32",
        "validation shapes: 16 of 16",
        "test shapes: 16 of 16",
    ]
    (broken / "04379243/test0.txt").write_text("")
    with pytest.raises(DatasetError, match=r"04379243/test0\.txt: 0 bytes, expected a line a point"):
        check_shapenet_part(broken)
