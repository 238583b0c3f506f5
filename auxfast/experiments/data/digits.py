"""scikit-learn's digits: 1797 scans of handwritten digits, 8x8 pixels of 17 grey levels.

The test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI, 1998). Comes with
scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auxfast.experiments.data.checks import check_array
from auxfast.experiments.data.extras import import_extra

_SCANS = 1797
_PIXELS = 64

# Somebody who cannot read digits could still see these in a scan. They are those of printed forms: handwriting differs.
DIGIT_ATTRIBUTES: dict[str, frozenset[int]] = {
    "closed loop": frozenset({0, 6, 8, 9}),
    "long vertical stroke": frozenset({1, 4, 7, 9}),
    "straight top": frozenset({5, 7}),
    "straight bottom": frozenset({1, 2}),
    "opens to the left": frozenset({2, 3, 5, 7, 9}),
    "opens to the right": frozenset({2, 5, 6}),
    "round": frozenset({0, 3, 6, 8, 9}),
    "crossing lines": frozenset({4, 8}),
}


@dataclass(frozen=True)
class DigitsData:
    """images: (1797, 64) float32 in [0, 1]. labels: (1797,) int64 in 0..9."""

    images: Tensor
    labels: Tensor

    def attributes(self) -> Tensor:
        """(1797, 8) float32: 1 for each of `DIGIT_ATTRIBUTES` that the scan's class has, else 0."""
        columns = [torch.isin(self.labels, torch.tensor(sorted(d))) for d in DIGIT_ATTRIBUTES.values()]
        return torch.stack(columns, dim=1).float()


def load_digits() -> DigitsData:
    """Reads the data set that is installed with scikit-learn.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: the data are not what this reader knows (shapes, grey levels 0..16, labels 0..9).
    """
    bunch = import_extra("sklearn.datasets", "scikit-learn").load_digits()
    images, labels = np.asarray(bunch.data), np.asarray(bunch.target)
    check_array("digits images", images, shape=(_SCANS, _PIXELS), low=0, high=16, whole=True)
    check_array("digits labels", labels, shape=(_SCANS,), low=0, high=9, whole=True)
    # The scale is fixed, and no statistic of the data: nothing of the test part can leak in.
    return DigitsData(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64))
