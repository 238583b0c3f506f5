"""scikit-learn's wine data: 178 wines of one region, thirteen chemical measurements of each, and its cultivar.

Aeberhard and Forina, UCI, 1991. Comes with scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auxfast.experiments.data.checks import check_array
from auxfast.experiments.data.extras import import_extra

_WINES, _FEATURES = 178, 13


@dataclass(frozen=True)
class WineData:
    """features: (178, 13) float32, as measured (not standardised). labels: (178,) int64 in 0..2, the cultivars."""

    features: Tensor
    labels: Tensor


def load_wine() -> WineData:
    """Reads the data set that is installed with scikit-learn.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: the data are not what this reader knows (shapes, ranges, finite numbers).
    """
    bunch = import_extra("sklearn.datasets", "scikit-learn").load_wine()
    features, labels = np.asarray(bunch.data), np.asarray(bunch.target)
    check_array("wine features", features, shape=(_WINES, _FEATURES), low=0, high=2000)
    check_array("wine labels", labels, shape=(_WINES,), low=0, high=2, whole=True)
    return WineData(torch.tensor(features, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64))
