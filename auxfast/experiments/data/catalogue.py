"""The data sets that are read from files: where each is to be had, its reader, and the check of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from auxfast.experiments.data.cars import load_cars
from auxfast.experiments.data.checks import check_counts
from auxfast.experiments.data.cifar import load_cifar10, load_cifar100
from auxfast.experiments.data.cityscapes import check_cityscapes, load_cityscapes
from auxfast.experiments.data.cub import load_cub
from auxfast.experiments.data.fashion_mnist import load_fashion_mnist
from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.image_data import ImageData
from auxfast.experiments.data.image_files import ImageFiles, check_image_files
from auxfast.experiments.data.nyuv2 import check_nyuv2, load_nyuv2
from auxfast.experiments.data.pets import load_pets
from auxfast.experiments.data.shapenet_part import check_shapenet_part, load_shapenet_part
from auxfast.experiments.data.svhn import load_svhn


@dataclass(frozen=True)
class Dataset:
    """A data set.

    title: its name in print.
    address: a page that says where it is to be had.
    load: its reader, which takes the folder of a copy.
    check: takes the folder of a copy, and returns lines that say what was found in it, beside the official numbers;
        raises DatasetError if the copy is not complete. Takes seconds.
    """

    title: str
    address: str
    load: Callable[[Path], object]
    check: Callable[[Path], list[str]]


@cache
def load_copy(name: str, folder: str) -> Any:
    """The data in a copy of a data set, as its reader returns them, read once in a process.

    Raises:
        DatasetError: the copy is missing, incomplete or damaged; says where one is to be had, how to name another
            folder, and how to check it.
    """
    data_set = DATASETS[name]
    try:
        return data_set.load(Path(folder))
    except DatasetError as error:
        raise DatasetError(
            f"{error}; {data_set.title} is to be had at {data_set.address}. --set task.folder=PATH says where a copy "
            f"is, and `auxfast data check {name} PATH` whether it is complete"
        ) from error


def check_images(
    load: Callable[[Path], ImageData], folder: Path, *, training: int, test: int, classes: int
) -> list[str]:
    """Lines that say what was found in a copy of a set of labelled images, one for each official number.

    Files of single images are looked at, not decoded: see `check_image_files`.

    Raises:
        DatasetError: the reader finds something wrong, an image is damaged, or a number is not the official one.
    """
    data = load(folder)
    if isinstance(data.images, ImageFiles):
        check_image_files(data.images.paths)
    in_test = int(data.is_test.sum())
    found = {
        "training images": (len(data.images) - in_test, training),
        "test images": (in_test, test),
        "classes": (len(data.class_names), classes),
    }
    return check_counts(folder, found)


def _images(
    title: str, address: str, load: Callable[[Path], ImageData], *, training: int, test: int, classes: int
) -> Dataset:
    return Dataset(title, address, load, partial(check_images, load, training=training, test=test, classes=classes))


DATASETS: dict[str, Dataset] = {
    "fashion-mnist": _images(
        "Fashion-MNIST",
        "https://github.com/zalandoresearch/fashion-mnist",
        load_fashion_mnist,
        training=60_000,
        test=10_000,
        classes=10,
    ),
    "cifar10": _images(
        "CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        load_cifar10,
        training=50_000,
        test=10_000,
        classes=10,
    ),
    "cifar100": _images(
        "CIFAR-100",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        load_cifar100,
        training=50_000,
        test=10_000,
        classes=100,
    ),
    "svhn": _images(
        "SVHN, cropped digits",
        "http://ufldl.stanford.edu/housenumbers/",
        load_svhn,
        training=73_257,
        test=26_032,
        classes=10,
    ),
    "pets": _images(
        "Oxford-IIIT Pet",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        load_pets,
        training=3_680,
        test=3_669,
        classes=37,
    ),
    "cars": _images(
        "Cars",
        "https://github.com/pytorch/vision/issues/7545",
        load_cars,
        training=8_144,
        test=8_041,
        classes=196,
    ),
    "cub": _images(
        "CUB-200-2011",
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
        load_cub,
        training=5_994,
        test=5_794,
        classes=200,
    ),
    "nyuv2": Dataset("NYUv2, MTAN's files", "https://github.com/lorenmt/mtan", load_nyuv2, check_nyuv2),
    "cityscapes": Dataset(
        "Cityscapes, MTAN's files", "https://github.com/lorenmt/mtan", load_cityscapes, check_cityscapes
    ),
    "shapenet-part": Dataset(
        "ShapeNet part, with normals",
        "https://github.com/Pang-Yatian/Point-MAE/issues/56",
        load_shapenet_part,
        check_shapenet_part,
    ),
}
