"""scikit-learn's breast cancer data: 569 biopsies, thirty measurements of each one's cell nuclei, and the diagnosis.

Street, Wolberg and Mangasarian, "Nuclear feature extraction for breast tumor diagnosis", 1993. Comes with
scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auxfast.experiments.data.checks import check_array
from auxfast.experiments.data.extras import import_extra

_BIOPSIES = 569
MEASURES = (
    *("radius", "texture", "perimeter", "area", "smoothness"),
    *("compactness", "concavity", "concave points", "symmetry", "fractal dimension"),
)
_FEATURES = (
    *(f"mean {measure}" for measure in MEASURES),
    *(f"{measure} error" for measure in MEASURES),
    *(f"worst {measure}" for measure in MEASURES),
)


@dataclass(frozen=True)
class BreastCancerData:
    """mean, error, worst: (569, 10) float32, each of `MEASURES` over a biopsy's nuclei: its mean, that mean's standard
    error, and the mean of the three largest. labels: (569,) int64, 0 malignant, 1 benign."""

    mean: Tensor
    error: Tensor
    worst: Tensor
    labels: Tensor


def load_breast_cancer() -> BreastCancerData:
    """Reads the data set that is installed with scikit-learn.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: the data are not what this reader knows (features, shapes, ranges, finite numbers).
    """
    bunch = import_extra("sklearn.datasets", "scikit-learn").load_breast_cancer()
    names = [str(name) for name in bunch.feature_names]
    if names != list(_FEATURES):
        raise ValueError(f"breast cancer features: {names}, expected {list(_FEATURES)}")
    features, labels = np.asarray(bunch.data), np.asarray(bunch.target)
    check_array("breast cancer features", features, shape=(_BIOPSIES, len(_FEATURES)), low=0, high=5000)
    check_array("breast cancer labels", labels, shape=(_BIOPSIES,), low=0, high=1, whole=True)
    mean, error, worst = torch.tensor(features, dtype=torch.float32).split(len(MEASURES), dim=1)
    return BreastCancerData(mean, error, worst, torch.tensor(labels, dtype=torch.int64))
