"""Writers of tiny copies of the classification data sets, in the files that the real ones have.

Images are of a colour pattern that their class decides, with noise, so that a network can learn something of them. Each
writer is deterministic, makes the folder, and returns what its reader takes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

FASHION_COUNTS = {"train": 60_000, "t10k": 10_000}
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BREEDS = (
    "Abyssinian",
    "american_bulldog",
    "american_pit_bull_terrier",
    "basset_hound",
    "beagle",
    "Bengal",
    "Birman",
    "Bombay",
    "boxer",
    "British_Shorthair",
    "chihuahua",
    "Egyptian_Mau",
    "english_cocker_spaniel",
    "english_setter",
    "german_shorthaired",
    "great_pyrenees",
    "havanese",
    "japanese_chin",
    "keeshond",
    "leonberger",
    "Maine_Coon",
    "miniature_pinscher",
    "newfoundland",
    "Persian",
    "pomeranian",
    "pug",
    "Ragdoll",
    "Russian_Blue",
    "saint_bernard",
    "samoyed",
    "scottish_terrier",
    "shiba_inu",
    "Siamese",
    "Sphynx",
    "staffordshire_bull_terrier",
    "wheaten_terrier",
    "yorkshire_terrier",
)


def write_fashion_mnist(folder: Path) -> Path:
    """Fashion-MNIST of full size, since its files' headers are fixed, of black pixels; labels 0 to 9 in turn.

    The files are not compressed. Their pixels take no room on a disk, and 55 MB in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in FASHION_COUNTS.items():
        with (folder / f"{part}-images-idx3-ubyte").open("wb") as file:
            file.write(struct.pack(">4I", 0x0803, count, 28, 28))
            file.truncate(16 + count * 28 * 28)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x0801, count) + labels.tobytes())
    return folder


def write_cifar10(folder: Path, count_per_class: int = 5, test_per_class: int = 2) -> Path:
    """CIFAR-10 in `folder / "cifar-10-batches-py"`: five training batches, a test batch, `batches.meta`.

    count_per_class: training images of a class, in all five batches. test_per_class: test images of a class.
    """
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    labels = _labels(10, count_per_class)
    images = _images(labels, 32, 32)
    for number, rows in enumerate(np.array_split(np.arange(len(labels)), 5), start=1):
        batch = _cifar_batch(f"training batch {number} of 5", images[rows], labels[rows], "labels")
        write_python2_pickle(folder / f"data_batch_{number}", batch)
    labels = _labels(10, test_per_class)
    batch = _cifar_batch("testing batch 1 of 1", _images(labels, 32, 32, seed=1), labels, "labels")
    write_python2_pickle(folder / "test_batch", batch)
    meta = {"num_cases_per_batch": 10_000, "label_names": list(CIFAR10_NAMES), "num_vis": 3072}
    write_python2_pickle(folder / "batches.meta", meta)
    return folder


def write_cifar100(folder: Path, count_per_class: int = 2, test_per_class: int = 1) -> Path:
    """CIFAR-100 in `folder / "cifar-100-python"`: `train`, `test` and `meta`; parameters as of `write_cifar10`."""
    folder = folder / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    parts = (("train", "training", count_per_class), ("test", "testing", test_per_class))
    for seed, (name, title, count) in enumerate(parts):
        labels = _labels(100, count)
        batch = _cifar_batch(f"{title} batch 1 of 1", _images(labels, 32, 32, seed), labels, "fine_labels")
        write_python2_pickle(folder / name, {**batch, "coarse_labels": (labels // 5).tolist()})
    names = {
        "fine_label_names": [f"fine_{k}" for k in range(100)],
        "coarse_label_names": [f"coarse_{k}" for k in range(20)],
    }
    write_python2_pickle(folder / "meta", names)
    return folder


def write_svhn(folder: Path, count_per_class: int = 5, test_per_class: int = 2) -> Path:
    """SVHN's cropped digits in `folder`: `train_32x32.mat` and `test_32x32.mat`; parameters as of `write_cifar10`."""
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate((("train", count_per_class), ("test", test_per_class))):
        labels = _labels(10, count)
        pixels = _images(labels, 32, 32, seed).transpose(1, 2, 3, 0)
        digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(folder / f"{part}_32x32.mat", {"X": pixels, "y": digits}, do_compression=True)
    return folder


def write_pets(
    folder: Path, count_per_class: int = 3, test_per_class: int = 2, *, classes: int = 37, side: int = 24
) -> Path:
    """Oxford-IIIT Pet in `folder`: `images/*.jpg`, `annotations/trainval.txt` and `test.txt`.

    count_per_class, test_per_class: images of a breed in the two lists. classes: only the first so many of the 37
    breeds, numbered as there. side: height of the photographs in pixels, which are wider than high.
    """
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    number = dict.fromkeys(range(classes), 0)
    for seed, (part, count) in enumerate((("trainval", count_per_class), ("test", test_per_class))):
        labels = np.sort(_labels(classes, count))
        lines = []
        for label, image in zip(labels.tolist(), _images(labels, side, side + 8, seed), strict=True):
            number[label] += 1
            name = f"{BREEDS[label]}_{number[label]}"
            write_jpeg(folder / "images" / f"{name}.jpg", image)
            lines.append(f"{name} {label + 1} {1 if name[0].isupper() else 2} {label % 25 + 1}\n")
        (folder / "annotations" / f"{part}.txt").write_text("".join(lines))
    return folder


def write_cars(
    folder: Path, count_per_class: int = 3, test_per_class: int = 2, *, classes: int = 196, side: int = 24
) -> Path:
    """Cars in `folder`: `cars_train/*.jpg`, `cars_test/*.jpg`, `devkit/*.mat`, `cars_test_annos_withlabels.mat`.

    Parameters as of `write_pets`.
    """
    from scipy.io import savemat

    (folder / "devkit").mkdir(parents=True, exist_ok=True)
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    names = np.empty((1, classes), dtype=object)
    names[0] = [f"Maker Model {k} Sedan {1991 + k % 20}" for k in range(classes)]
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names}, do_compression=True)
    parts = (
        ("cars_train", "devkit/cars_train_annos.mat", count_per_class),
        ("cars_test", "cars_test_annos_withlabels.mat", test_per_class),
    )
    for seed, (part, file, count) in enumerate(parts):
        labels = _labels(classes, count)
        rows = np.empty((1, len(labels)), dtype=[(field, object) for field in fields])
        for k, image in enumerate(_images(labels, side, side + 8, seed)):
            write_jpeg(folder / part / f"{k + 1:05}.jpg", image)
            rows[0, k] = (1, 1, side + 8, side, int(labels[k]) + 1, f"{k + 1:05}.jpg")
        savemat(folder / file, {"annotations": rows}, do_compression=True)
    return folder


def write_jpeg(path: Path, image: np.ndarray) -> None:
    """A JPEG file of an image (height, width, 3), uint8."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


def write_python2_pickle(path: Path, content: object) -> None:
    """A pickle as Python 2 writes it at protocol 2: strings are bytes, and numpy's modules have their old names."""
    path.write_bytes(b"\x80\x02" + python2_opcodes(content) + b".")


def python2_opcodes(value: object) -> bytes:
    """Opcodes by which a Python 2 pickle makes dictionaries, lists, integers, strings and arrays of unsigned bytes."""
    match value:
        case dict():
            return b"}(" + b"".join(python2_opcodes(key) + python2_opcodes(value[key]) for key in value) + b"u"
        case list():
            return b"](" + b"".join(map(python2_opcodes, value)) + b"e"
        case int():
            return b"J" + struct.pack("<i", value)
        case str():
            return b"T" + struct.pack("<i", len(value)) + value.encode("latin1")
        case np.ndarray():
            shape = b"".join(map(python2_opcodes, value.shape))
            data = value.tobytes()
            return (
                b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
                + shape
                + b"tcnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
                + struct.pack("<i", len(data))
                + data
                + b"tb"
            )
    raise TypeError(f"cannot pickle {type(value).__name__}")


def _cifar_batch(title: str, images: np.ndarray, labels: np.ndarray, label_key: str) -> dict[str, object]:
    return {
        "batch_label": title,
        label_key: labels.tolist(),
        "data": images.transpose(0, 3, 1, 2).reshape(len(images), -1),
        "filenames": [f"picture_s_{k:06}.png" for k in range(len(images))],
    }


def _labels(classes: int, count_per_class: int) -> np.ndarray:
    """Labels, as many of each class, in random order."""
    return np.random.default_rng(0).permutation(np.arange(classes * count_per_class) % classes)


def _images(labels: np.ndarray, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(n, height, width, 3) uint8: a pattern of 4 x 4 coloured areas for each class, with noise."""
    patterns = np.random.default_rng(7).integers(40, 216, (int(labels.max()) + 1, 4, 4, 3))
    coarse = patterns[labels][:, np.arange(height) * 4 // height][:, :, np.arange(width) * 4 // width]
    return (coarse + np.random.default_rng(seed).integers(-40, 41, coarse.shape)).astype(np.uint8)
