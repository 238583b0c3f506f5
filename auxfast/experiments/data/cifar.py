"""CIFAR-10 and CIFAR-100: 60,000 photographs of 32 x 32 pixels, of 10 and of 100 classes.

By Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html: the archives "CIFAR-10 python version" and "CIFAR-100
python version", which hold pickles of Python 2. A pickle can run any program when it is loaded. Here none does: the
few names that these files hold stand for classes of this module, and any other name is an error.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from auxfast.experiments.data.files import DatasetError, brief, class_labels, inner_folder, need_file
from auxfast.experiments.data.image_data import ImageData

_SHAPE = (3, 32, 32)
_ROW = math.prod(_SHAPE)  # bytes of an image: a red, a green and a blue picture, line by line


def load_cifar10(folder: str | Path) -> ImageData:
    """Reads CIFAR-10 from `cifar-10-batches-py` or the folder that holds it.

    images: (n, 3, 32, 32) uint8, those of the official test part last.

    Raises:
        DatasetError: a file is missing, damaged, holds what these files do not hold, or does not fit the others.
    """
    folder = inner_folder(Path(folder), "cifar-10-batches-py")
    training = [f"data_batch_{number}" for number in range(1, 6)]
    return _load(folder, "CIFAR-10", training, ["test_batch"], ("batches.meta", "label_names"), "labels", classes=10)


def load_cifar100(folder: str | Path) -> ImageData:
    """Reads CIFAR-100 from `cifar-100-python` or the folder that holds it. The labels are the 100 fine ones.

    images: (n, 3, 32, 32) uint8, those of the official test part last.

    Raises:
        DatasetError: a file is missing, damaged, holds what these files do not hold, or does not fit the others.
    """
    folder = inner_folder(Path(folder), "cifar-100-python")
    return _load(folder, "CIFAR-100", ["train"], ["test"], ("meta", "fine_label_names"), "fine_labels", classes=100)


def _load(
    folder: Path,
    dataset: str,
    training: list[str],
    test: list[str],
    names: tuple[str, str],
    label_key: str,
    *,
    classes: int,
) -> ImageData:
    path = need_file(folder, names[0], dataset)
    class_names = _member(path, _read_pickle(path), names[1], list)
    if len(class_names) != classes or not all(isinstance(name, str) for name in class_names):
        raise DatasetError(f"{path}: {names[1]} holds {len(class_names)} entries, expected {classes} names")
    images, labels, is_test = [], [], []
    for name in training + test:
        path = need_file(folder, name, dataset)
        content = _read_pickle(path)
        pixels = _member(path, content, "data", _Array).pixels
        labels.append(class_labels(path, _member(path, content, label_key, list), first=0, last=classes - 1))
        if len(labels[-1]) != len(pixels):
            raise DatasetError(f"{path}: {len(labels[-1])} {label_key} and {len(pixels)} images, expected as many")
        images.append(torch.from_numpy(pixels).view(-1, *_SHAPE))
        is_test.append(torch.full((len(pixels),), name in test))
    return ImageData(torch.cat(images), torch.cat(labels), torch.cat(is_test), tuple(class_names))


def _member(path: Path, content: object, key: str, kind: type) -> Any:
    """The entry `key` of a pickled dictionary."""
    if not isinstance(content, dict) or not isinstance(content.get(key), kind):
        there = brief(list(content)) if isinstance(content, dict) else type(content).__name__
        expected = "array" if kind is _Array else kind.__name__
        raise DatasetError(f"{path}: holds {there}, expected a dictionary with the {expected} {key!r}")
    return content[key]


class _Dtype:
    """numpy.dtype in a pickle: keeps the name of the type."""

    def __init__(self, name: str, align: object, copy: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which say nothing of single bytes."""


class _Array:
    """numpy.ndarray in a pickle, and the function `_reconstruct` that makes one: keeps an array of images."""

    pixels = np.empty((0, _ROW), dtype=np.uint8)  # an array without a state is empty

    def __init__(self, kind: type, shape: object, code: object) -> None:
        """What stands here in such a file is that of an empty array: the state has the rest."""

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple(shape), _Dtype(name="u1"), bool() | int() as by_column, bytes() | str() as content):
                if len(shape) != 2 or not isinstance(shape[0], int) or shape[1] != _ROW:
                    raise pickle.UnpicklingError(f"data of shape {brief(shape)}, expected (n, {_ROW})")
                # Python 2 has no bytes: they come as text, of which each character is a byte.
                values = np.frombuffer(
                    content.encode("latin1") if isinstance(content, str) else content, dtype=np.uint8
                )
                if values.size != math.prod(shape):
                    raise pickle.UnpicklingError(
                        f"{values.size} bytes of data, expected {math.prod(shape)} for {shape}"
                    )
                self.pixels = values.reshape(shape[::-1]).T.copy() if by_column else values.reshape(shape).copy()
            case _:
                raise pickle.UnpicklingError("data of another type, expected an array of unsigned bytes")


class _Encoded(bytes):
    """_codecs.encode in a pickle, as which Python 3 writes bytes into an old format."""

    def __new__(cls, text: str, encoding: str) -> _Encoded:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes as {encoding}")
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("bytes with a state")


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _Encoded,
}


class _Unpickler(pickle.Unpickler):
    """An unpickler of dictionaries, lists, numbers, strings and arrays of bytes, which imports nothing."""

    def find_class(self, module: str, name: str) -> type:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"holds {module}.{name}, which is not loaded") from None


def _read_pickle(path: Path) -> object:
    try:
        content = path.read_bytes()
        # Python makes room for as many objects as the largest number that one is kept under, however few there are.
        for opcode, number, _ in pickletools.genops(content):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (number or 0) > len(content):
                raise pickle.UnpicklingError(f"object {brief(number)} in {len(content)} bytes")
        return _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # what a damaged pickle raises depends on the byte that is wrong
        raise DatasetError(f"{path}: {str(error) or type(error).__name__}, expected a whole pickle of CIFAR") from error
