import shutil

import numpy as np
import pytest
import torch

from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.nyuv2 import check_nyuv2, load_nyuv2
from auxfast.experiments.data.scenes import UNKNOWN
from experiments.data.fixtures_scenes import write_nyuv2


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return write_nyuv2(tmp_path_factory.mktemp("nyuv2"), train=3, val=2, height=8, width=6)


@pytest.fixture
def broken(copy, tmp_path):
    """A copy to break."""
    return shutil.copytree(copy, tmp_path / "nyuv2")


def test_scenes_are_those_of_the_files_with_channels_first(copy):
    data = load_nyuv2(copy)
    assert len(data) == 5
    assert data.size == (8, 6)
    assert data.training.tolist() == [0, 1, 2]
    assert data.test.tolist() == [3, 4]
    batch = data[torch.tensor([4, 0])]
    assert batch.images.shape == batch.normals.shape == (2, 3, 8, 6)
    assert batch.depths.shape == (2, 1, 8, 6)
    assert batch.images.dtype == batch.depths.dtype == batch.normals.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    for k, (part, number) in enumerate([("val", 1), ("train", 0)]):
        image, label, depth, normal = (
            np.load(copy / part / name / f"{number}.npy") for name in ("image", "label", "depth", "normal")
        )
        assert np.array_equal(batch.images[k].permute(1, 2, 0), image.astype(np.float32))
        assert np.array_equal(batch.labels[k], label)
        assert np.array_equal(batch.depths[k, 0], depth[..., 0].astype(np.float32))
        assert np.array_equal(batch.normals[k].permute(1, 2, 0), normal.astype(np.float32))


def test_unknown_labels_and_depths_stay_what_they_are(copy):
    batch = load_nyuv2(copy)[torch.arange(5)]
    assert batch.labels.unique().tolist() == [UNKNOWN, *range(13)]
    assert (batch.depths[:, 0, 0, 0] == 0).all()


def test_flipping_mirrors_the_chosen_scenes_and_turns_their_normals(copy):
    batch = load_nyuv2(copy)[torch.arange(2)]
    flipped = batch.flipped(torch.tensor([True, False]))
    for name in ("images", "labels", "depths"):
        before, after = getattr(batch, name), getattr(flipped, name)
        assert torch.equal(after[0], before[0].flip(-1))
        assert torch.equal(after[1], before[1])
    mirror = torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
    assert torch.equal(flipped.normals[0], mirror * batch.normals[0].flip(-1))
    assert torch.equal(flipped.normals[1], batch.normals[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.dtype(">f8")])
def test_arrays_of_any_floating_point_type_are_read(broken, dtype):
    path = broken / "train/depth/1.npy"
    depth = np.load(path).astype(dtype)
    np.save(path, depth)
    assert np.array_equal(load_nyuv2(broken).depths[torch.tensor([1])][0, 0], depth[..., 0].astype(np.float32))


def test_batches_of_no_scenes_are_empty(copy):
    assert load_nyuv2(copy).images[torch.tensor([], dtype=torch.int64)].shape == (0, 3, 8, 6)


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _save(name, make):
    return lambda folder: np.save(folder / name, make(np.load(folder / name)), allow_pickle=True)


def _truncate(folder):
    path = folder / "val/normal/1.npy"
    path.write_bytes(path.read_bytes()[:-8])


def _without_brace(folder):
    path = folder / "val/depth/0.npy"
    path.write_bytes(path.read_bytes().replace(b"}", b" ", 1))


def _archive(folder):
    with (folder / "val/depth/0.npy").open("wb") as file:
        np.savez(file, depth=np.zeros(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, r"nyuv2/train/image: no such folder, expected in a copy of NYUv2 in MTAN's files"),
        (lambda folder: shutil.rmtree(folder / "val/normal"), r"val/normal: no such folder"),
        (_remove("train/image/1.npy"), r"train/image/1\.npy: no such file, though 2 arrays are there"),
        (_remove("train/depth/2.npy"), r"train/depth: 2 arrays, expected 3 as in image"),
        (
            lambda folder: [file.unlink() for file in (folder / "val/image").iterdir()],
            r"val/image: no arrays, expected 0",
        ),
        (_truncate, r"val/normal/1\.npy: .*, expected a whole \.npy file"),
        (
            lambda folder: (folder / "val/depth/0.npy").write_bytes(b""),
            r"val/depth/0\.npy: .*, expected a whole \.npy file",
        ),
        (lambda folder: (folder / "val/depth/0.npy").write_text("0.5 0.5"), r"val/depth/0\.npy: .*, expected a whole"),
        (_without_brace, r"val/depth/0\.npy: .*, expected a whole \.npy file"),
        (_archive, r"val/depth/0\.npy: an archive, expected an array of"),
        (_save("val/depth/0.npy", lambda a: a > 1), r"val/depth/0\.npy: bool, expected an array of whole or floating"),
        (
            _save("val/depth/0.npy", lambda a: a[..., 0]),
            r"val/depth/0\.npy: shape \(8, 6\), expected \(8, 6, 1\): NYUv2",
        ),
        (_save("train/label/2.npy", lambda a: a[:4]), r"train/label/2\.npy: shape \(4, 6\), expected \(8, 6\): NYUv2"),
    ],
)
def test_a_copy_that_is_not_whole_is_refused_with_the_file(broken, change, message):
    change(broken)
    with pytest.raises(DatasetError, match=message):
        load_nyuv2(broken)


def test_objects_in_a_file_are_not_unpickled(broken):
    class Hostile:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    objects = np.empty((8, 6), dtype=object)
    objects[:] = Hostile()
    np.save(broken / "val/label/0.npy", objects, allow_pickle=True)
    with pytest.raises(DatasetError, match=r"val/label/0\.npy: .*[Oo]bject.*, expected a whole \.npy file"):
        load_nyuv2(broken)


def _with(value):
    def change(array):
        array[2, 3] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image", lambda a: a * 255, r"image/0\.npy: .* at \(0, 0, .\), expected finite numbers from -0\.1 to 1\.1"),
        ("label", _with(13), r"label/0\.npy: 13 at \(2, 3\), expected whole numbers from -1 to 12"),
        ("label", _with(0.5), r"label/0\.npy: 0.5 at \(2, 3\), expected whole numbers"),
        ("depth", _with(np.nan), r"depth/0\.npy: nan at \(2, 3, 0\), expected finite numbers from 0 to 100"),
        ("depth", lambda a: a * 1000, r"depth/0\.npy: .*, expected finite numbers from 0 to 100"),
        ("normal", _with(np.inf), r"normal/0\.npy: inf at \(2, 3, 0\), expected finite numbers from -1\.1 to 1\.1"),
    ],
)
def test_values_out_of_their_range_are_refused_when_they_are_read_and_by_the_check(broken, name, change, message):
    _save(f"val/{name}/0.npy", change)(broken)
    data = load_nyuv2(broken)
    data[data.training]
    with pytest.raises(DatasetError, match=message):
        data[data.test]
    with pytest.raises(DatasetError, match=message):
        check_nyuv2(broken)


def test_the_check_compares_with_the_official_numbers(copy):
    expected = (
        r"nyuv2.*: 3 training scenes, expected 795; 2 test scenes, expected 654; 8 pixels in height, expected 288"
    )
    with pytest.raises(DatasetError, match=expected):
        check_nyuv2(copy)


def test_the_check_says_what_is_in_a_whole_copy(copy, monkeypatch):
    for name, number in (("TRAINING", 3), ("TEST", 2), ("HEIGHT", 8), ("WIDTH", 6)):
        monkeypatch.setattr(f"auxfast.experiments.data.nyuv2._OFFICIAL_{name}", number)
    assert check_nyuv2(copy) == [
        "training scenes: 3 of 3",
        "test scenes: 2 of 2",
        "pixels in height: 8 of 8",
        "pixels in width: 6 of 6",
    ]
