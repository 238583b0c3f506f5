"""Helpers of the networks' tests."""

from __future__ import annotations

import pytest
import torch


def unfilled(make, *args, **options):
    """A network without values, which even for a large one takes no time: for its names and shapes."""
    with torch.device("meta"):
        return make(*args, **options)


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def torchvision_models():
    """`torchvision.models`; the test is skipped where torchvision is missing, or built for another torch."""
    try:
        import torchvision.models as models
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import: {error}")
    return models


def randomise(model) -> None:
    """Draws every weight and statistic of a network anew, so that each of them shows in its output."""
    for value in model.state_dict().values():
        if value.dim() > 1:
            torch.nn.init.kaiming_normal_(value)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5)
