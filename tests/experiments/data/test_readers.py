import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from auxfast.experiments.data import load_breast_cancer, load_diabetes, load_digits, load_wine
from auxfast.experiments.data.digits import DIGIT_ATTRIBUTES
from auxfast.experiments.data.extras import MissingExtraError, import_extra

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def test_diabetes_is_what_scikit_learn_has_unscaled():
    data = load_diabetes()
    assert data.features.shape == (442, 10)
    assert data.target.shape == (442,)
    assert data.features.dtype == data.target.dtype == torch.float32
    assert data.features[0, :2].tolist() == [59, 2]  # age and sex of the first patient
    assert data.target[0] == 151


def test_digits_are_what_scikit_learn_has_scaled_to_one():
    data = load_digits()
    assert data.images.shape == (1797, 64)
    assert data.images.min() == 0
    assert data.images.max() == 1
    assert data.labels.dtype == torch.int64
    assert data.labels[:10].tolist() == list(range(10))


def test_breast_cancer_is_what_scikit_learn_has_by_kind_of_measurement():
    data, known = load_breast_cancer(), sklearn_datasets.load_breast_cancer()
    together = torch.cat([data.mean, data.error, data.worst], dim=1)
    assert torch.equal(together, torch.tensor(known.data, dtype=torch.float32))
    assert (data.worst >= data.mean).all()
    assert data.labels.bincount().tolist() == [212, 357]


def test_wine_is_what_scikit_learn_has():
    data = load_wine()
    assert torch.equal(data.features, torch.tensor(sklearn_datasets.load_wine().data, dtype=torch.float32))
    assert data.labels.bincount().tolist() == [59, 71, 48]


def test_attributes_are_those_of_the_class():
    data = load_digits()
    attributes = data.attributes()
    assert attributes.shape == (1797, len(DIGIT_ATTRIBUTES))
    names = list(DIGIT_ATTRIBUTES)
    eight = int(torch.nonzero(data.labels == 8)[0])
    assert {names[j] for j in torch.nonzero(attributes[eight]).squeeze(1)} == {
        "closed loop",
        "round",
        "crossing lines",
    }


def test_no_two_digits_have_the_same_attributes():
    patterns = {tuple(d in members for members in DIGIT_ATTRIBUTES.values()) for d in range(10)}
    assert len(patterns) == 10


def _broken(loader, **changes):
    bunch = loader()
    for name, change in changes.items():
        bunch[name] = change(bunch[name])
    return lambda **_: SimpleNamespace(**bunch)


def _with(value, *index):
    def change(array):
        array = array.astype(float)
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": lambda a: a[:400]}, r"diabetes features: shape \(400, 10\), expected \(442, 10\)"),
        ({"data": _with(np.nan, 3, 2)}, r"diabetes features: nan at \(3, 2\), expected finite numbers"),
        ({"target": _with(-1.0, 7)}, r"diabetes target: -1 at \(7,\), expected finite numbers from 25 to 346"),
        ({"target": lambda a: a.astype(str)}, "diabetes target: dtype <U.*, expected numbers"),
        ({"feature_names": lambda names: names[::-1]}, r"diabetes features: \['s6'.*expected \['age'"),
    ],
)
def test_diabetes_that_is_not_as_known_is_refused(monkeypatch, changes, message):
    broken = _broken(lambda: sklearn_datasets.load_diabetes(scaled=False), **changes)
    monkeypatch.setattr(sklearn_datasets, "load_diabetes", broken)
    with pytest.raises(ValueError, match=message):
        load_diabetes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": _with(17.0, 0, 5)}, r"digits images: 17 at \(0, 5\), expected whole numbers from 0 to 16"),
        ({"target": _with(10, 1)}, r"digits labels: 10 at \(1,\), expected whole numbers from 0 to 9"),
        ({"target": _with(0.5, 1)}, r"digits labels: 0.5 at \(1,\), expected whole numbers"),
        ({"target": lambda a: a[:-1]}, r"digits labels: shape \(1796,\), expected \(1797,\)"),
    ],
)
def test_digits_that_are_not_as_known_are_refused(monkeypatch, changes, message):
    monkeypatch.setattr(sklearn_datasets, "load_digits", _broken(sklearn_datasets.load_digits, **changes))
    with pytest.raises(ValueError, match=message):
        load_digits()


@pytest.mark.parametrize(
    ("load", "changes", "message"),
    [
        (load_breast_cancer, {"data": _with(-1.0, 0, 5)}, r"breast cancer features: -1 at \(0, 5\), expected finite"),
        (load_breast_cancer, {"target": _with(2, 1)}, r"breast cancer labels: 2 at \(1,\), expected whole numbers"),
        (load_breast_cancer, {"feature_names": lambda names: names[::-1]}, r"breast cancer features: \['worst fractal"),
        (load_wine, {"data": lambda a: a[:, 1:]}, r"wine features: shape \(178, 12\), expected \(178, 13\)"),
        (load_wine, {"target": _with(3, 1)}, r"wine labels: 3 at \(1,\), expected whole numbers from 0 to 2"),
    ],
)
def test_other_data_that_are_not_as_known_are_refused(monkeypatch, load, changes, message):
    name = load.__name__
    monkeypatch.setattr(sklearn_datasets, name, _broken(getattr(sklearn_datasets, name), **changes))
    with pytest.raises(ValueError, match=message):
        load()


@pytest.mark.parametrize("load", [load_breast_cancer, load_diabetes, load_digits, load_wine])
def test_without_scikit_learn_the_message_says_how_to_get_it(monkeypatch, load):
    monkeypatch.delitem(sys.modules, "sklearn.datasets")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn is not installed.*pip install scikit-learn$"):
        load()


def test_a_package_that_is_there_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "brokenpackage.py").write_text("import a_module_that_does_not_exist")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_does_not_exist") as caught:
        import_extra("brokenpackage", "brokenpackage")
    assert not isinstance(caught.value, MissingExtraError)
