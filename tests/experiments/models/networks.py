"""What tests of networks share."""

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


def randomise_norms(model, generator) -> None:
    """Gives each BatchNorm statistics and factors that a test can see."""
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5, generator=generator)
