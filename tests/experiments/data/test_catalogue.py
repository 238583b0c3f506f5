import re
from pathlib import Path

import pytest

from auxfast.cli import main
from auxfast.experiments.data.catalogue import DATASETS, check_images
from auxfast.experiments.data.cifar import load_cifar10
from auxfast.experiments.data.fashion_mnist import DEBIAN_FOLDER
from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.pets import load_pets
from tests.experiments.data import fixtures, fixtures_scenes

pytest.importorskip("scipy.io")
pytest.importorskip("PIL.Image")

WRITERS = {
    "cifar10": lambda folder: fixtures.write_cifar10(folder, 1, 1),
    "cifar100": lambda folder: fixtures.write_cifar100(folder, 1, 1),
    "svhn": lambda folder: fixtures.write_svhn(folder, 1, 1),
    "pets": lambda folder: fixtures.write_pets(folder, 1, 1),
    "cars": lambda folder: fixtures.write_cars(folder, 1, 1, classes=3),
    "cub": fixtures_scenes.write_cub,
    "nyuv2": fixtures_scenes.write_nyuv2,
    "cityscapes": lambda folder: fixtures_scenes.write_cityscapes(folder, 2, 1, 128, 256),
    "shapenet-part": fixtures_scenes.write_shapenet_part,
}


def test_each_data_set_is_listed_with_its_title_and_where_it_is(capsys):
    assert main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(DATASETS)
    for line, (name, dataset) in zip(lines, DATASETS.items(), strict=True):
        assert line.split()[0] == name
        assert dataset.title in line
        assert line.split()[-1].startswith("http")


@pytest.mark.parametrize("name", WRITERS)
def test_a_copy_that_is_too_small_is_read_but_does_not_pass(tmp_path, capsys, name):
    folder = WRITERS[name](tmp_path)
    assert DATASETS[name].load(folder)
    assert main(["data", "check", name, str(folder)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{folder}: " in said.err
    assert re.search("training (images|scenes|shapes), expected ", said.err)
    assert DATASETS[name].address in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("name", list(DATASETS))
def test_an_empty_folder_is_no_copy(tmp_path, capsys, name):
    assert main(["data", "check", name, str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


_NO_FILE = Path("/proc/self/mem")  # of Linux; reading its first byte is an error, for the administrator too


@pytest.mark.skipif(not _NO_FILE.is_file(), reason="there is no file that cannot be read")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "data_batch_1"),
        ("svhn", "test_32x32.mat"),
        ("pets", "annotations/test.txt"),
        ("pets", "images/beagle_1.jpg"),
        ("cub", "images.txt"),
        ("cub", "train_test_split.txt"),
        ("nyuv2", "val/label/0.npy"),
        ("shapenet-part", "train_test_split/shuffled_val_file_list.json"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, name, file):
    path = WRITERS[name](tmp_path) / file
    path.unlink()
    path.symlink_to(_NO_FILE)
    assert main(["data", "check", name, str(tmp_path)]) == 1
    assert f"{path}: " in capsys.readouterr().err


def test_numbers_are_said_beside_the_official_ones(tmp_path):
    folder = fixtures.write_cifar10(tmp_path, 3, 2)
    found = check_images(load_cifar10, folder, training=30, test=20, classes=10)
    assert found == ["training images: 30 of 30", "test images: 20 of 20", "classes: 10 of 10"]
    with pytest.raises(DatasetError, match=rf"^{folder}: 30 training images, expected 50,000; 10 classes, expected 9$"):
        check_images(load_cifar10, folder, training=50_000, test=20, classes=9)


def test_an_image_that_the_reader_has_not_decoded_is_looked_at(tmp_path):
    folder = fixtures.write_pets(tmp_path, 2, 1, classes=3)
    check_images(load_pets, folder, training=6, test=3, classes=3)
    path = folder / "images" / "Abyssinian_2.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    load_pets(folder)
    with pytest.raises(DatasetError, match=rf"^{path}: "):
        check_images(load_pets, folder, training=6, test=3, classes=3)


@pytest.mark.skipif(not Path(DEBIAN_FOLDER).is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_a_whole_copy_passes(capsys):
    assert main(["data", "check", "fashion-mnist", DEBIAN_FOLDER]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training images: 60,000 of 60,000"
    assert lines[-1] == f"Fashion-MNIST in {DEBIAN_FOLDER} is complete"


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path, capsys):
    assert main(["data", "check", "mnist", str(tmp_path)]) == 2
    assert "no data set mnist, there are fashion-mnist, cifar10" in capsys.readouterr().err
