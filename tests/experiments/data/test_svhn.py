import numpy as np
import pytest
import torch

from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.svhn import load_svhn
from tests.experiments.data.fixtures import write_svhn

scipy_io = pytest.importorskip("scipy.io")


def test_svhn_is_what_the_files_hold(tmp_path):
    data = load_svhn(write_svhn(tmp_path))
    train = scipy_io.loadmat(tmp_path / "train_32x32.mat")
    assert data.images.shape == (70, 3, 32, 32)
    assert data.images.is_contiguous()
    for k in (0, 49):
        assert np.array_equal(data.images[k].permute(1, 2, 0), train["X"][:, :, :, k])
    assert data.labels.dtype == torch.int64
    assert data.labels[:50].tolist() == [int(digit) % 10 for digit in train["y"][:, 0]]
    assert data.is_test.tolist() == [False] * 50 + [True] * 20


def test_the_digit_0_is_class_0(tmp_path):
    data = load_svhn(write_svhn(tmp_path))
    assert data.class_names == tuple("0123456789")
    assert data.labels.bincount().tolist() == [7] * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros((4, 1), np.uint8)}, "label 0 at 0, expected labels from 1 to 10"),
        ({"y": np.full((4, 1), 11, np.uint8)}, "label 11 at 0, expected labels from 1 to 10"),
        ({"y": np.full((4, 1), 1.5)}, "label 1.5 at 0, expected labels from 1 to 10"),
        ({"y": np.ones((3, 1), np.uint8)}, r"y of shape \(3, 1\), expected \(4, 1\)"),
        ({"X": np.zeros((32, 32, 3, 4))}, r"X of shape \(32, 32, 3, 4\), float64; expected \(32, 32, 3, n\), uint8"),
        ({"X": np.zeros((4, 32, 32, 3), np.uint8)}, r"X of shape \(4, 32, 32, 3\), uint8; expected \(32, 32, 3, n\)"),
        ({"X": np.zeros((32, 32), np.uint8)}, r"X of shape \(32, 32\), uint8; expected"),
    ],
)
def test_a_file_that_is_not_as_known_is_refused(tmp_path, change, message):
    path = write_svhn(tmp_path) / "test_32x32.mat"
    good = {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((4, 1), np.uint8)}
    scipy_io.savemat(path, good | change)
    with pytest.raises(DatasetError, match=rf"^{path}: {message}"):
        load_svhn(tmp_path)


def test_a_file_without_labels_is_refused(tmp_path):
    path = write_svhn(tmp_path) / "train_32x32.mat"
    scipy_io.savemat(path, {"X": np.zeros((32, 32, 3, 4), np.uint8)})
    with pytest.raises(DatasetError, match=rf"^{path}: no variable y, expected X and y"):
        load_svhn(tmp_path)


@pytest.mark.parametrize("length", [0, 60, 150, 5000, -20])
def test_a_truncated_file_is_refused(tmp_path, length):
    path = write_svhn(tmp_path) / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DatasetError, match=rf"^{path}: "):
        load_svhn(tmp_path)


def test_a_web_page_in_place_of_the_file_is_refused(tmp_path):
    path = write_svhn(tmp_path) / "train_32x32.mat"
    path.write_bytes(b"<!DOCTYPE html><html>Not found</html>" * 20)
    with pytest.raises(DatasetError, match=rf"^{path}: .*expected a whole MATLAB file"):
        load_svhn(tmp_path)


def test_a_missing_file_and_a_wrong_folder_are_named(tmp_path):
    path = write_svhn(tmp_path) / "test_32x32.mat"
    path.unlink()
    with pytest.raises(DatasetError, match=rf"^{path}: no such file, expected in a copy of SVHN"):
        load_svhn(tmp_path)
    with pytest.raises(DatasetError, match="no such folder, expected one with SVHN"):
        load_svhn(tmp_path / "elsewhere")
