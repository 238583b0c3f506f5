"""scikit-learn's diabetes data: 442 patients, ten measurements of each, and the disease a year later.

Efron, Hastie, Johnstone and Tibshirani, "Least Angle Regression", Annals of Statistics 2004. Comes with
scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auxfast.experiments.data.checks import check_array
from auxfast.experiments.data.extras import import_extra

_PATIENTS = 442
_FEATURES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")


@dataclass(frozen=True)
class DiabetesData:
    """features: (442, 10) float32, as measured (not standardised). target: (442,) float32, 25 to 346."""

    features: Tensor
    target: Tensor
    feature_names: tuple[str, ...] = _FEATURES


def load_diabetes() -> DiabetesData:
    """Reads the data set that is installed with scikit-learn.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: the data are not what this reader knows (features, shapes, ranges, finite numbers).
    """
    # The usual, scaled copy is not used: it is centred with statistics of all patients, test patients included.
    bunch = import_extra("sklearn.datasets", "scikit-learn").load_diabetes(scaled=False)
    if tuple(bunch.feature_names) != _FEATURES:
        raise ValueError(f"diabetes features: {list(bunch.feature_names)}, expected {list(_FEATURES)}")
    features, target = np.asarray(bunch.data), np.asarray(bunch.target)
    check_array("diabetes features", features, shape=(_PATIENTS, len(_FEATURES)), low=0, high=1000)
    check_array("diabetes target", target, shape=(_PATIENTS,), low=25, high=346)
    return DiabetesData(torch.tensor(features, dtype=torch.float32), torch.tensor(target, dtype=torch.float32))
