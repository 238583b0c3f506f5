import io
import os
import pickle
import re
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch

from auxfast.experiments.data.cifar import load_cifar10, load_cifar100
from auxfast.experiments.data.files import DatasetError
from tests.experiments.data.fixtures import (
    CIFAR10_NAMES,
    python2_opcodes,
    write_cifar10,
    write_cifar100,
    write_python2_pickle,
)


def unrestricted(path):
    """What Python's own unpickler reads in a file that this test has written."""
    content = path.read_bytes().replace(b"numpy.core.multiarray", b"numpy._core.multiarray")  # the old name warns
    return pickle.load(io.BytesIO(content), encoding="latin1")


def change(path, **entries):
    """Writes a batch again, with other entries; an entry None is left out."""
    content = {**unrestricted(path), **entries}
    write_python2_pickle(path, {key: value for key, value in content.items() if value is not None})


def test_cifar10_is_what_the_pickles_hold(tmp_path):
    folder = write_cifar10(tmp_path)
    data = load_cifar10(folder)
    batches = [unrestricted(folder / name) for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")]
    pixels = np.concatenate([batch["data"] for batch in batches])
    assert torch.equal(data.images, torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
    assert data.labels.tolist() == [label for batch in batches for label in batch["labels"]]
    assert data.labels.dtype == torch.int64
    assert data.is_test.tolist() == [False] * 50 + [True] * 20
    assert data.class_names == CIFAR10_NAMES


def test_cifar100_has_the_fine_labels(tmp_path):
    folder = write_cifar100(tmp_path)
    data = load_cifar100(folder)
    assert data.images.shape == (300, 3, 32, 32)
    assert data.labels[:200].tolist() == unrestricted(folder / "train")["fine_labels"]
    assert data.is_test.sum() == 100
    assert data.class_names[99] == "fine_99"


def test_the_folder_that_holds_the_copy_does_as_well(tmp_path):
    write_cifar10(tmp_path, 1, 1)
    assert len(load_cifar10(tmp_path).images) == 20


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_copy_that_python_3_saved_again_is_read(tmp_path, protocol):
    folder = write_cifar10(tmp_path)
    before = load_cifar10(folder)
    for path in folder.iterdir():
        path.write_bytes(pickle.dumps(unrestricted(path), protocol=protocol))
    after = load_cifar10(folder)
    assert torch.equal(before.images, after.images)
    assert torch.equal(before.labels, after.labels)


def test_an_array_that_is_stored_by_columns_is_read(tmp_path):
    folder = write_cifar10(tmp_path)
    before, path = load_cifar10(folder), folder / "test_batch"
    content = unrestricted(path)
    path.write_bytes(pickle.dumps({**content, "data": np.asfortranarray(content["data"])}, protocol=2))
    assert torch.equal(before.images, load_cifar10(folder).images)


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.mkdir, "{}", "posix.mkdir"),
        (eval, "__import__('os').mkdir({!r})", "builtins.eval|__builtin__.eval"),
        (np.load, "{}", "numpy.load"),
        (getattr, "{}", "builtins.getattr|__builtin__.getattr"),
    ],
)
def test_no_code_of_a_pickle_is_run(tmp_path, protocol, function, argument, name):
    path = write_cifar10(tmp_path) / "data_batch_3"
    trace = tmp_path / "trace"
    hostile = {"labels": [], "data": Calls(function, argument.format(str(trace)))}
    path.write_bytes(pickle.dumps(hostile, protocol=protocol))
    with pytest.raises(DatasetError, match=rf"^{path}: holds ({name}), which is not loaded"):
        load_cifar10(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cnumpy\ndtype\n}b.",  # a state for the class itself
        b"c_codecs\nencode\n(N}U\x08__code__K\x01s\x86b.",
        b"(inumpy\nndarray\n.",
        b"cnumpy.core.multiarray\n_reconstruct\n.",
        b"c_codecs\nencode\n(U\x01aU\x03rottR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
        b"\x82\x01.",
        b"Pid\n.",
        b"0",
    ],
)
def test_a_pickle_of_anything_else_is_an_error_that_names_the_file(tmp_path, opcodes):
    path = write_cifar10(tmp_path) / "test_batch"
    path.write_bytes(opcodes)
    with pytest.raises(DatasetError, match=rf"^{path}: "):
        load_cifar10(tmp_path)
    write_cifar10(tmp_path)
    assert len(load_cifar10(tmp_path).images) == 70  # and it has changed nothing for the next file


def test_a_dictionary_of_another_class_is_refused(tmp_path):
    path = write_cifar10(tmp_path) / "batches.meta"
    path.write_bytes(pickle.dumps(OrderedDict(label_names=list(CIFAR10_NAMES)), protocol=2))
    with pytest.raises(DatasetError, match=r"holds collections\.OrderedDict, which is not loaded"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"labels": [0, 10] * 5}, "label 10 at 1, expected labels from 0 to 9"),
        ({"labels": [-1] * 10}, "label -1 at 0, expected labels from 0 to 9"),
        ({"labels": ["0"] * 10}, "label '0' at 0, expected labels from 0 to 9"),
        ({"labels": [0] * 9}, "9 labels and 10 images, expected as many"),
        ({"labels": []}, "no labels, expected at least one"),
        ({"labels": None}, "holds .*, expected a dictionary with the list 'labels'"),
        ({"data": [0]}, "holds .*, expected a dictionary with the array 'data'"),
        ({"data": np.zeros((10, 1024), np.uint8)}, r"data of shape \(10, 1024\), expected \(n, 3072\)"),
    ],
)
def test_a_batch_that_is_not_as_known_is_refused(tmp_path, entries, message):
    path = write_cifar10(tmp_path) / "data_batch_2"
    change(path, **entries)
    with pytest.raises(DatasetError, match=rf"^{path}: {message}"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "int8", "object"])
def test_images_of_another_type_are_refused(tmp_path, dtype):
    path = write_cifar10(tmp_path) / "test_batch"
    path.write_bytes(pickle.dumps({**unrestricted(path), "data": np.zeros((20, 3072), dtype)}, protocol=2))
    with pytest.raises(DatasetError, match=rf"^{path}: data of another type, expected an array of unsigned bytes"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 100, 30_000, -1])
def test_a_truncated_pickle_is_refused(tmp_path, length):
    path = write_cifar10(tmp_path) / "data_batch_5"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DatasetError, match=rf"^{path}: .*, expected a whole pickle of CIFAR"):
        load_cifar10(tmp_path)


def test_names_of_another_number_are_refused(tmp_path):
    path = write_cifar100(tmp_path) / "meta"
    write_python2_pickle(path, {"fine_label_names": ["apple"]})
    with pytest.raises(DatasetError, match=rf"^{path}: fine_label_names holds 1 entries, expected 100 names"):
        load_cifar100(tmp_path)


def test_a_missing_file_and_a_wrong_folder_are_named(tmp_path):
    path = write_cifar10(tmp_path) / "data_batch_4"
    path.unlink()
    with pytest.raises(DatasetError, match=rf"^{path}: no such file, expected in a copy of CIFAR-10"):
        load_cifar10(tmp_path)
    with pytest.raises(DatasetError, match=rf"^{re.escape(str(tmp_path / 'meta'))}: no such file, .* of CIFAR-100"):
        load_cifar100(tmp_path)
    with pytest.raises(DatasetError, match="no such folder, expected one with CIFAR-10"):
        load_cifar10(tmp_path / "elsewhere")


def _with_array(array, labels=b"](K\x00e"):
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u."


_ARRAY = python2_opcodes(np.zeros((1, 3072), np.uint8))


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"\x80\x02}r\x00\x00\x00\x08.", "object 134217728 in 9 bytes"),  # Python would make room for 2 GB
        (b"}p99999999\n.", "object 99999999 in 12 bytes"),
        (_with_array(_ARRAY.replace(b"J\x01\x00\x00\x00", b"U\x02ab")), r"data of shape \('ab', 3072\), expected"),
        (_with_array(b"cnumpy\nndarray\n)\x81"), "1 labels and 0 images"),  # an object that is not initialised
        (_with_array(_ARRAY, b"]" + b"](" * 9_999 + b"e" * 9_999 + b"a"), r"label \[\[.*\.\.\.\]*\.* at 0"),
        (
            _with_array(_ARRAY, b"]\x8b" + struct.pack("<i", 9_999) + b"\x7f" * 9_999 + b"a"),
            "label .{1,200} at 0, expected",
        ),
        (_with_array(_ARRAY, b"]" + python2_opcodes("x" * 99_999) + b"a"), "label 'x{40,60}\\.\\.\\.x{40,60}' at 0"),
    ],
)
def test_a_pickle_can_fill_neither_the_memory_nor_the_screen(tmp_path, opcodes, message):
    path = write_cifar10(tmp_path, 1, 1) / "test_batch"
    path.write_bytes(opcodes)
    with pytest.raises(DatasetError, match=rf"^{path}: {message}"):
        load_cifar10(tmp_path)
