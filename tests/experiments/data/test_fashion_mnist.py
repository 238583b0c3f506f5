import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from auxfast.experiments.data.fashion_mnist import (
    CLASS_NAMES,
    DEBIAN_FOLDER,
    FASHION_ATTRIBUTES,
    PICTURE_ATTRIBUTES,
    fashion_attributes,
    load_fashion_mnist,
    picture_attributes,
)
from auxfast.experiments.data.files import DatasetError
from tests.experiments.data.fixtures import write_fashion_mnist


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return write_fashion_mnist(tmp_path_factory.mktemp("fashion-mnist"))


@pytest.fixture
def linked(copy, tmp_path):
    """A folder of links to the files of a copy, of which a test may replace some."""
    for path in copy.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


def test_a_copy_has_70_000_images_and_the_test_part_is_last(copy):
    data = load_fashion_mnist(copy)
    assert data.images.shape == (70_000, 1, 28, 28)
    assert data.images.dtype == torch.uint8
    assert data.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert data.is_test.nonzero()[[0, -1], 0].tolist() == [60_000, 69_999]
    assert data.class_names == CLASS_NAMES


def test_compressed_files_are_read(linked):
    path = linked / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.unlink()
    (linked / f"{path.name}.gz").write_bytes(gzip.compress(content[:8] + bytes([9]) + content[9:]))
    assert load_fashion_mnist(linked).labels[60_000] == 9


@pytest.mark.skipif(not Path(DEBIAN_FOLDER).is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_pictures_are_told_apart_by_their_brightness():
    data = load_fashion_mnist()
    assert data.labels.bincount().tolist() == [7000] * 10
    brightness, labels = data.images[:5000].float().mean(dim=(1, 2, 3)), data.labels[:5000]
    means = {name: brightness[labels == k].mean().item() for k, name in enumerate(CLASS_NAMES)}
    assert min(means, key=means.__getitem__) == "sandal"
    assert means["pullover"] > 2 * means["sandal"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", struct.pack(">4I", 0x0803, 100, 28, 28), r"header 0000080300000064.*, expected 0"),
        ("train-images-idx3-ubyte", struct.pack(">4I", 0x0D03, 60_000, 28, 28), "header 00000d03.*, expected 00000803"),
        ("t10k-labels-idx1-ubyte", struct.pack(">2I", 0x0801, 10_000) + bytes(99), r"107 bytes, expected 10008 for"),
        ("t10k-labels-idx1-ubyte", b"", "header , expected 00000801"),
    ],
)
def test_a_file_that_is_not_as_known_is_refused(linked, name, content, message):
    replace(linked / name, content)
    with pytest.raises(DatasetError, match=rf"^{linked / name}: {message}"):
        load_fashion_mnist(linked)


def test_a_label_out_of_range_is_refused(linked):
    path = linked / "train-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[8 + 77] = 10
    replace(path, content)
    with pytest.raises(DatasetError, match=rf"^{path}: 10 at 77, expected labels from 0 to 9"):
        load_fashion_mnist(linked)


def test_a_truncated_gzip_file_is_refused(linked):
    path = linked / "t10k-labels-idx1-ubyte"
    content = gzip.compress(np.random.default_rng(0).bytes(10_008))
    path.unlink()
    path = linked / f"{path.name}.gz"
    for damaged in (content[:-100], b"no gzip", content[:50] + bytes(50) + content[100:]):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=rf"^{path}: .*expected a whole file"):
            load_fashion_mnist(linked)


def test_a_compressed_file_that_holds_too_much_is_not_unpacked(linked):
    path = linked / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.unlink()
    path = linked / f"{path.name}.gz"
    path.write_bytes(gzip.compress(content) + gzip.compress(bytes(1_000_000)) + b"never read")
    with pytest.raises(DatasetError, match=rf"^{path}: more bytes, expected 10008 for shape \(10000,\)"):
        load_fashion_mnist(linked)


def test_a_missing_file_is_named_with_where_to_get_it(linked):
    path = linked / "train-labels-idx1-ubyte"
    path.unlink()
    with pytest.raises(DatasetError, match=rf"^{path}: no such file, .* package dataset-fashion-mnist"):
        load_fashion_mnist(linked)


def test_attributes_are_those_of_the_class():
    attributes = fashion_attributes(torch.tensor([9, 1]))
    assert attributes.shape == (2, len(FASHION_ATTRIBUTES))
    assert attributes.dtype == torch.float32
    names = [name for name, has in zip(FASHION_ATTRIBUTES, attributes[0].tolist(), strict=True) if has]
    assert names == ["covers the ankle"]
    assert attributes[1].sum() == 2


def test_attributes_of_a_picture_are_what_it_has_more_of_than_the_median_picture_of_its_class():
    plain = torch.full((4, 4), 0.5)
    bright, striped, small, lopsided, heavy_at_the_top = (
        plain + 0.25,
        plain.clone(),
        plain.clone(),
        plain.clone(),
        plain.clone(),
    )
    striped[::2] = 0.25
    small[:, [0, 3]] = 0
    lopsided[:, 0] = 0.25
    heavy_at_the_top[2:] = 0.25
    pictures = torch.stack([plain, plain, plain, plain, plain, bright, striped, small, lopsided, heavy_at_the_top])
    others = plain.expand(3, 4, 4) / 4  # of another class, which is darker
    labels = torch.tensor([1] * len(pictures) + [0] * len(others))
    attributes = picture_attributes(torch.cat([pictures, others]), labels)
    assert attributes.shape == (13, len(PICTURE_ATTRIBUTES))
    assert attributes.dtype == torch.float32
    has = [{name for name, value in zip(PICTURE_ATTRIBUTES, row, strict=True) if value} for row in attributes.tolist()]
    assert has[:5] == [set()] * 5
    assert has[10:] == [set()] * 3
    assert has[5] == {"bright"}
    assert has[6] == {"patterned", "striped across"}
    assert has[7] == set()
    assert has[8] == {"patterned", "lopsided"}
    assert has[9] == {"patterned", "heavy at the top", "striped across"}


def test_a_black_picture_has_no_attributes():
    assert picture_attributes(torch.zeros(3, 4, 4), torch.zeros(3)).tolist() == [[0.0] * len(PICTURE_ATTRIBUTES)] * 3
