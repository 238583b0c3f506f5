import shutil

import numpy as np
import pytest
import torch

from auxfast.experiments.data.cub import load_cub
from auxfast.experiments.data.files import DatasetError
from experiments.data.fixtures_scenes import write_cub

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cub")
    write_cub(folder)
    return folder


@pytest.fixture
def home(copy, tmp_path):
    """A copy to break, as it is unpacked."""
    return shutil.copytree(copy, tmp_path / "copy") / "CUB_200_2011"


def test_cub_has_species_attributes_and_the_official_split(copy):
    data = load_cub(copy, size=16)
    assert data.images[torch.tensor([0, 8])].shape == (2, 3, 16, 16)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.labels.dtype == torch.int64
    assert data.is_test.tolist() == [False, False, True] * 3
    assert data.class_names == ("Some Bird 1", "Some Bird 2", "Some Bird 3")
    assert data.attributes.dtype == torch.float32
    assert data.attributes.shape == (9, 312)
    assert data.attribute_names[:2] == ("has_trait::value_1", "has_trait::value_2")


def test_attributes_are_those_of_the_file_whatever_their_certainty_and_the_fields_that_follow(copy):
    data = load_cub(copy)
    for line in (copy / "CUB_200_2011/attributes/image_attribute_labels.txt").read_text().splitlines():
        image, attribute, present = (int(field) for field in line.split()[:3])
        assert data.attributes[image - 1, attribute - 1] == present


def test_a_grey_photograph_has_three_equal_channels(copy):
    image = load_cub(copy).images[torch.tensor([0])][0]
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("place", ["attributes/attributes.txt", "attributes.txt", "../attributes.txt"])
def test_the_names_of_attributes_are_found_where_copies_have_them(home, place):
    (home.parent / "attributes.txt").rename(home / place)
    assert load_cub(home).attribute_names[311] == "has_trait::value_312"


def _replace(name, old, new):
    def change(home):
        text = (home / name).read_text()
        assert old in text
        (home / name).write_text(text.replace(old, new, 1))

    return change


def _remove(name):
    return lambda home: (home / name).unlink()


ATTRIBUTE_FILE = "attributes/image_attribute_labels.txt"


def _truncate(home):
    text = (home / ATTRIBUTE_FILE).read_text()
    (home / ATTRIBUTE_FILE).write_text(text[: text.rindex(" 312 ") + 4])


def _repeat_a_row(home):
    lines = (home / ATTRIBUTE_FILE).read_text().splitlines(keepends=True)
    (home / ATTRIBUTE_FILE).write_text("".join([*lines[:5], lines[4], *lines[6:]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, r"copy/CUB_200_2011: no such folder, expected one with CUB-200-2011 and so with images\.txt$"),
        (_remove("classes.txt"), r"classes\.txt: no such file, expected in a copy of CUB-200-2011"),
        (_remove("../attributes.txt"), r"attributes/attributes\.txt: no such file, expected in a copy of CUB-200"),
        (_remove("images/001.Some_Bird_1/Bird_0001.jpg"), r"Bird_0001\.jpg: no such file"),
        (
            _replace("images.txt", "2 001", "7 001"),
            r"images\.txt: '7 001\..*' in line 2, expected the number 2 and a name",
        ),
        (_replace("image_class_labels.txt", "4 2", "4 4"), r"labels\.txt: 4 at \(3,\), expected .* from 1 to 3"),
        (
            _replace("image_class_labels.txt", "4 2\n", ""),
            r"labels\.txt: images 1 to 9 in 8 lines, expected 1 to 9 in their",
        ),
        (_replace("image_class_labels.txt", "4 2", "4 x"), r"labels\.txt: .*row 3.*expected 2 whole numbers a line"),
        (
            lambda home: (home / "train_test_split.txt").write_text(""),
            r"train_test_split\.txt: no numbers, expected 2 whole numbers a line",
        ),
        (lambda home: (home / ATTRIBUTE_FILE).write_text("\n\n"), r"labels\.txt: no numbers, expected 4 whole numbers"),
        (_replace("image_class_labels.txt", "4 2", "4 1.5"), r"labels\.txt: 1\.5 at \(3,\), expected whole numbers"),
        (_replace("../attributes.txt", "312 has_trait::value_312\n", ""), r"attributes\.txt: 311 lines, expected 312"),
        (
            _replace(ATTRIBUTE_FILE, "1 3 1 ", "1 3 2 "),
            r"labels\.txt, is present: 2 at \(2,\), expected .* from 0 to 1",
        ),
        (
            _replace(ATTRIBUTE_FILE, "\n1 3 1 ", "\n1 313 1 "),
            r"labels\.txt, attribute: 313 at \(2,\), expected .* to 312",
        ),
        (_truncate, r"image_attribute_labels\.txt: .*2808.*expected 4 whole numbers a line"),
        (_repeat_a_row, r"image_attribute_labels\.txt: no line for image 1 and attribute 6"),
    ],
)
def test_a_copy_that_is_not_as_known_is_refused_with_the_file(home, change, message):
    change(home)
    with pytest.raises(DatasetError, match=message):
        load_cub(home)


def test_a_copy_that_an_editor_has_saved_under_windows_is_read(home):
    before = load_cub(home)
    for path in (*home.glob("*.txt"), *home.glob("*/*.txt"), *home.parent.glob("*.txt")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    after = load_cub(home)
    assert after.class_names == before.class_names
    assert after.attribute_names == before.attribute_names
    assert torch.equal(after.attributes, before.attributes)


def test_a_copy_without_a_test_part_is_refused(home):
    (home / "train_test_split.txt").write_text("".join(f"{image} 1\n" for image in range(1, 10)))
    with pytest.raises(DatasetError, match=r"train_test_split\.txt: 9 of 9 images are for training"):
        load_cub(home)


@pytest.mark.slow
def test_the_attributes_of_the_full_size_are_read_in_seconds(home):
    """The real file has 3,677,856 lines."""
    images = 11_788
    head = np.char.mod("%d ", np.arange(1, images + 1))
    for name, value in (("images.txt", "001.Some_Bird_1/Bird_0001.jpg"), ("image_class_labels.txt", "1")):
        (home / name).write_text("".join(f"{number}{value}\n" for number in head))
    (home / "train_test_split.txt").write_text("".join(f"{number}{i % 2}\n" for i, number in enumerate(head)))
    tail = "".join(f"#{attribute} {attribute % 2} 4 12.125\n" for attribute in range(1, 313))
    (home / ATTRIBUTE_FILE).write_text("".join(tail.replace("#", number) for number in head))
    attributes = load_cub(home).attributes
    assert attributes.shape == (images, 312)
    assert torch.equal(attributes, (torch.arange(1, 313) % 2).float().expand(images, 312))
