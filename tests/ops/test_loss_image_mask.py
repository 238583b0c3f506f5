"""What only the loss image does with pixels that have no loss, and its digits where softplus saturates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from auxfast.ops.loss_image import loss_image, loss_image_reference
from auxfast.ops.network import LossImageNetwork

from .combiner_cases import assert_agree, derivatives, normal
from .loss_image_cases import SMALL, TOLERANCES, inputs

NAN = float("nan")
SHAPE = 4, 2, 9, 35
MASK = normal(*SHAPE, seed=3) > -0.5
MASK[3] = False


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_main_loss_over_valid_pixels_only(reduction):
    network = replace(SMALL, main_reduction="valid_mean", reduction=reduction)
    losses, phi, grad, tangent = inputs(network, 4, *SHAPE[2:])
    losses = losses.where(MASK, NAN)
    actual = derivatives(lambda x, p: loss_image(x, p, network, MASK), losses, phi, grad, tangent)

    def by_hand(x, p):
        x = x.where(MASK, 0)
        values = loss_image_reference(x, p, replace(network, main=None, reduction="none"))
        values = values + x[:, 0].sum((1, 2)) / MASK[:, 0].sum((1, 2)).clamp(min=1)
        return values if reduction == "none" else values.mean() if reduction == "mean" else values.sum()

    assert_agree(actual, derivatives(by_hand, losses, phi, grad, tangent), TOLERANCES[torch.float64])


def test_a_full_mask_changes_nothing():
    for main_reduction in ("mean", "sum", "valid_mean"):
        network = replace(SMALL, main_reduction=main_reduction)
        losses, phi, *_ = inputs(network, 2, 9, 10, torch.float32)
        with_mask = loss_image(losses, phi, network, torch.ones_like(losses))
        torch.testing.assert_close(with_mask, loss_image(losses, phi, network), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_every_pixel_keeps_its_digits_where_softplus_saturates(dtype, rtol):
    """A convolution that is the identity; torch's own second derivative s (1 - s) has no digits left out there."""
    network = LossImageNetwork(1, (1,), reduction="sum")
    phi = torch.zeros(network.num_parameters, dtype=dtype)
    network.split(phi)["0.weight"][0, 0, 1, 1] = 1
    network.split(phi)["out.weight"].fill_(1)
    losses = torch.linspace(-80, 80, 2 * 40).round().view(1, 1, 2, 40).to(dtype)
    grad = torch.tensor(80.0, dtype=dtype)  # undoes the mean over positions
    result = derivatives(lambda x, p: loss_image(x, p, network), losses, phi, grad, torch.ones_like(losses))
    e = (-losses.double().abs()).exp()
    first = torch.where(losses >= 0, 1.0, e) / (1 + e)
    for key, wanted in (("weights", first), ("hessian product", e / (1 + e) ** 2)):
        torch.testing.assert_close(result[key].double(), wanted, rtol=rtol, atol=0)
