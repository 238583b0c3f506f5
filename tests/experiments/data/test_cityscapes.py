import shutil

import numpy as np
import pytest
import torch

from auxfast.experiments.data.cityscapes import (
    CATEGORIES,
    CLASS_NAMES,
    check_cityscapes,
    coarser_labels,
    load_cityscapes,
)
from auxfast.experiments.data.files import DatasetError
from experiments.data.fixtures_scenes import write_cityscapes

ALL = {"label_19": 19, "label_7": 7, "label_2": 2}


def test_scenes_have_an_image_an_inverse_depth_and_labels_of_every_granularity(tmp_path):
    data = load_cityscapes(write_cityscapes(tmp_path, train=3, val=2, height=8, width=16, labels=ALL))
    assert (len(data), data.size) == (5, (8, 16))
    assert (data.training.tolist(), data.test.tolist()) == ([0, 1, 2], [3, 4])
    assert data.granularities == (19, 7, 2)
    batch = data[data.test]
    assert batch.images.shape == (2, 3, 8, 16)
    assert batch.inverse_depths.shape == (2, 1, 8, 16)
    assert batch.inverse_depths.dtype == torch.float32
    assert np.array_equal(batch.inverse_depths[1, 0], np.load(tmp_path / "val/depth/1.npy")[..., 0].astype(np.float32))
    for classes, labels in batch.labels.items():
        assert labels.dtype == torch.int64
        assert np.array_equal(labels[1], np.load(tmp_path / f"val/label_{classes}/1.npy"))


@pytest.mark.parametrize(
    ("labels", "granularities"),
    [
        ({"label_19": 19}, (19, 7, 2)),
        ({"label_19": 19, "label_2": 2}, (19, 7, 2)),
        ({"label_7": 7}, (7, 2)),
        ({"label_2": 2}, (2,)),
        ({"label": 19}, (19, 7, 2)),
        ({"label": 7}, (7, 2)),
    ],
)
def test_missing_labels_follow_from_those_of_more_classes(tmp_path, labels, granularities):
    whole = load_cityscapes(write_cityscapes(tmp_path / "whole", train=1, val=1, height=4, width=8, labels=ALL))
    data = load_cityscapes(write_cityscapes(tmp_path / "part", train=1, val=1, height=4, width=8, labels=labels))
    assert data.granularities == granularities
    rows = torch.arange(2)
    found, expected = data[rows].labels, whole[rows].labels
    assert set(found) == set(granularities)
    for classes, values in found.items():
        assert torch.equal(values, expected[classes])


def test_categories_are_those_of_cityscapes_by_hand():
    names = ["road", "fence", "traffic sign", "terrain", "sky", "rider", "bicycle"]
    labels = torch.tensor([CLASS_NAMES.index(name) for name in names] + [-1])
    assert labels.tolist() == [0, 4, 7, 9, 10, 12, 18, -1]
    categories = coarser_labels(labels, 19, 7)
    assert categories.tolist() == [0, 1, 2, 3, 4, 5, 6, -1]
    assert list(CATEGORIES) == ["flat", "construction", "object", "nature", "sky", "human", "vehicle"]
    assert coarser_labels(categories, 7, 2).tolist() == [0, 0, 0, 0, 0, 1, 1, -1]


def test_flipping_mirrors_all_of_the_chosen_scenes(tmp_path):
    data = load_cityscapes(write_cityscapes(tmp_path, train=2, val=1, height=4, width=8))
    batch = data[torch.arange(2)]
    flipped = batch.flipped(torch.tensor([False, True]))
    pairs = [(batch.images, flipped.images), (batch.inverse_depths, flipped.inverse_depths)]
    pairs += [(batch.labels[classes], flipped.labels[classes]) for classes in (19, 7, 2)]
    for before, after in pairs:
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[1], before[1].flip(-1))


def _save(folder, name, change):
    np.save(folder / name, change(np.load(folder / name)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"city/train: no folder with labels, expected at least one of label_19"),
        (lambda folder: shutil.rmtree(folder / "val/label_7"), r"val/label_7: no such folder, .* copy of Cityscapes"),
        (lambda folder: (folder / "val/depth/0.npy").unlink(), r"val/depth/0\.npy: no such file, though 1 arrays"),
        (
            lambda folder: _save(folder, "val/image/0.npy", lambda a: a[:2]),
            r"image/0\.npy: shape \(2, 8, 3\), expected",
        ),
    ],
)
def test_a_copy_that_is_not_whole_is_refused_with_the_file(tmp_path, change, message):
    folder = write_cityscapes(tmp_path / "city", train=1, val=2, height=4, width=8)
    change(folder)
    with pytest.raises(DatasetError, match=message):
        load_cityscapes(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("label_7", lambda a: a + 1, r"label_7/0\.npy: 7 at .*, expected whole numbers from -1 to 6"),
        (
            "label_19",
            lambda a: np.where(a < 0, 255, a),
            r"label_19/0\.npy: 255 at .*, expected whole numbers from -1",
        ),
        ("depth", lambda a: a * 65535, r"depth/0\.npy: .* at .*, expected finite numbers from 0 to 1"),
        ("depth", lambda a: a - 0.1, r"depth/0\.npy: -.* at .*, expected finite numbers from 0 to 1"),
    ],
)
def test_values_out_of_their_range_are_refused_when_they_are_read(tmp_path, name, change, message):
    data = load_cityscapes(write_cityscapes(tmp_path, train=1, val=1, height=4, width=8))
    _save(tmp_path, f"val/{name}/0.npy", change)
    with pytest.raises(DatasetError, match=message):
        data[data.test]


def test_labels_of_an_unknown_number_of_classes_are_refused(tmp_path):
    folder = write_cityscapes(tmp_path, train=1, val=1, height=4, width=8, labels={"label": 19})
    _save(folder, "train/label/0.npy", lambda a: a + 15)
    with pytest.raises(DatasetError, match=r"label/0\.npy: .*, expected whole numbers from -1 to 18"):
        load_cityscapes(folder)


def test_labels_without_two_axes_are_refused(tmp_path):
    folder = write_cityscapes(tmp_path, train=1, val=1, height=4, width=8, labels={"label": 19})
    _save(folder, "train/label/0.npy", np.ravel)
    with pytest.raises(DatasetError, match=r"label/0\.npy: shape \(32,\), expected axes of height and width"):
        load_cityscapes(folder)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float16])
def test_labels_of_any_type_of_numbers_are_read(tmp_path, dtype):
    folder = write_cityscapes(tmp_path, train=1, val=1, height=4, width=8)
    before = load_cityscapes(folder)[torch.tensor([0])].labels[19]
    _save(folder, "train/label_19/0.npy", lambda a: a.astype(dtype))
    assert torch.equal(load_cityscapes(folder)[torch.tensor([0])].labels[19], before)


def test_the_check_says_which_tasks_can_be_trained(tmp_path, monkeypatch):
    module = "auxfast.experiments.data.cityscapes"
    folder = write_cityscapes(tmp_path, train=2, val=1, height=4, width=8, labels={"label": 7})
    with pytest.raises(DatasetError, match=r"\(4, 8\) pixels, expected one of \(\(128, 256\), \(256, 512\)\)"):
        check_cityscapes(folder)
    monkeypatch.setattr(f"{module}._OFFICIAL_SIZES", ((4, 8),))
    with pytest.raises(DatasetError, match="2 training scenes, expected 2,975; 1 test scenes, expected 500"):
        check_cityscapes(folder)
    monkeypatch.setattr(f"{module}._OFFICIAL_TRAINING", 2)
    monkeypatch.setattr(f"{module}._OFFICIAL_TEST", 1)
    assert check_cityscapes(folder) == [
        "training scenes: 2 of 2",
        "test scenes: 1 of 1",
        "pixels: 4 x 8",
        "labels: of 7 classes; those of 2 follow from them; the paper's main task needs those of 19",
    ]
