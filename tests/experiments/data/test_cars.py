import numpy as np
import pytest
import torch

from auxfast.experiments.data.cars import load_cars
from auxfast.experiments.data.files import DatasetError
from tests.experiments.data.fixtures import write_cars

scipy_io = pytest.importorskip("scipy.io")
pytest.importorskip("PIL.Image")


def write_annotations(path, **fields):
    """A file of one car, in MATLAB's struct array of the fields given."""
    rows = np.empty((1, 1), dtype=[(field, object) for field in fields])
    rows[0, 0] = tuple(fields.values())
    scipy_io.savemat(path, {"annotations": rows})


def test_cars_are_what_the_annotations_say(tmp_path):
    data = load_cars(write_cars(tmp_path, 3, 2, classes=4), size=16)
    train = scipy_io.loadmat(tmp_path / "devkit" / "cars_train_annos.mat")["annotations"][0]
    assert data.labels.dtype == torch.int64
    assert data.labels[:12].tolist() == [int(row["class"][0, 0]) - 1 for row in train]
    assert data.is_test.tolist() == [False] * 12 + [True] * 8
    assert data.class_names[1] == "Maker Model 1 Sedan 1992"
    assert len(data.class_names) == 4
    batch = data.images[torch.tensor([0, 19])]
    assert batch.shape == (2, 3, 16, 16)
    assert batch.dtype == torch.uint8


@pytest.mark.parametrize("moved", ["twice", "by themselves", "beside the images"])
def test_copies_with_other_folders_are_read(tmp_path, moved):
    folder = write_cars(tmp_path / "stanford_cars", 2, 1, classes=3)
    before = load_cars(folder)
    if moved == "twice":
        for name in ("cars_train", "cars_test"):
            (folder / name).rename(folder / "moved")
            (folder / name).mkdir()
            (folder / "moved").rename(folder / name / name)
    elif moved == "by themselves":
        (folder / "car_devkit").mkdir()
        (folder / "devkit").rename(folder / "car_devkit" / "devkit")
        labels = folder / "cars_test_annos_withlabels.mat"
        labels.rename(folder / "car_devkit" / "devkit" / labels.name)
    else:
        for path in (folder / "devkit").iterdir():
            path.rename(folder / path.name)
    after = load_cars(tmp_path)
    assert after.labels.tolist() == before.labels.tolist()
    assert len(after.images) == 9


def test_one_class_with_one_image_a_part_is_read(tmp_path):
    assert len(load_cars(write_cars(tmp_path, 1, 1, classes=1)).images) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class": 4, "fname": "00001.jpg"}, "label 4 at 0, expected labels from 1 to 3"),
        ({"class": 0, "fname": "00001.jpg"}, "label 0 at 0, expected labels from 1 to 3"),
        ({"class": "two", "fname": "00001.jpg"}, "label 'two' at 0, expected labels from 1 to 3"),
        ({"bbox_x1": 1, "fname": "00001.jpg"}, r"annotations with \('bbox_x1', 'fname'\), expected class and fname"),
    ],
)
def test_annotations_that_are_not_as_known_are_refused(tmp_path, fields, message):
    path = write_cars(tmp_path, 1, 1, classes=3) / "cars_test_annos_withlabels.mat"
    write_annotations(path, **fields)
    with pytest.raises(DatasetError, match=rf"^{path}: {message}"):
        load_cars(tmp_path)


def test_annotations_of_no_image_are_refused(tmp_path):
    path = write_cars(tmp_path, 1, 1, classes=3) / "devkit" / "cars_train_annos.mat"
    scipy_io.savemat(path, {"annotations": np.empty((1, 0), dtype=[("class", object), ("fname", object)])})
    with pytest.raises(DatasetError, match=rf"^{path}: "):
        load_cars(tmp_path)


@pytest.mark.parametrize("name", ["devkit/cars_meta.mat", "devkit/cars_train_annos.mat"])
def test_a_truncated_file_is_refused(tmp_path, name):
    path = write_cars(tmp_path, 1, 1, classes=3) / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=rf"^{path}: "):
        load_cars(tmp_path)


def test_names_that_are_numbers_are_refused(tmp_path):
    path = write_cars(tmp_path, 1, 1, classes=3) / "devkit" / "cars_meta.mat"
    scipy_io.savemat(path, {"class_names": np.arange(196)})
    with pytest.raises(DatasetError, match=rf"^{path}: class_names \(0, 1, .*\), expected a list of names"):
        load_cars(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    write_cars(tmp_path, 1, 1, classes=3)
    (tmp_path / "cars_test" / "00002.jpg").unlink()
    with pytest.raises(DatasetError, match=r"cars_test/00002\.jpg: no such file; of 6 images, 1 are missing"):
        load_cars(tmp_path)
    (tmp_path / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DatasetError, match=r"cars_test_annos_withlabels\.mat: no such file, .*in a copy of Cars"):
        load_cars(tmp_path)
    with pytest.raises(DatasetError, match="elsewhere: no such folder, expected one with cars_train"):
        load_cars(tmp_path / "elsewhere")
