"""All combiners, small, and losses for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auxfast.nn import Combiner, ConvCombiner

from .test_combiners import MAKERS, normal, positive_losses
from .test_conv_combiner import images

CONV = {
    "conv": lambda *args, **options: ConvCombiner(*args, channels=(4, 2), **options),
    "conv, normalised": lambda *args, **options: ConvCombiner(*args, channels=(4, 2), weight_norm=True, **options),
}
ALL_MAKERS = MAKERS | CONV
ALL = pytest.mark.parametrize("make", ALL_MAKERS.values(), ids=ALL_MAKERS.keys())
MAPS = pytest.mark.parametrize("positive", ["clip", "exp"])


def moved(combiner: Combiner, size: float = 0.3) -> Combiner:
    """The combiner in float64, away from its start, and monotone; no weight is 0."""
    combiner, by = combiner.double(), size * normal(combiner.phi.numel(), seed=1)
    with torch.no_grad():
        combiner.phi += by.abs() if combiner.positive == "clip" else by
    return combiner


def losses_of(combiner: Combiner, batch: int = 3) -> Tensor:
    columns = combiner.num_losses
    return images(batch, columns, 4, 5) if isinstance(combiner, ConvCombiner) else positive_losses(batch, columns)
