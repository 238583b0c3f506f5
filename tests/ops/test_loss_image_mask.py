"""The loss image on pixels that have no loss, on NaN and infinities, and on low precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from auxfast.ops.loss_image import loss_image, loss_image_reference
from auxfast.ops.loss_image_network import LossImageNetwork

from .combiner_cases import assert_agree, derivatives, normal, relative_error
from .loss_image_cases import SMALL, TOLERANCES, inputs, of_reference

INF, NAN = float("inf"), float("nan")
SHAPE = 4, 2, 9, 35
MASK = normal(*SHAPE, seed=3) > -0.5
MASK[3] = False


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.int64])
@pytest.mark.parametrize("masked", [NAN, INF, -INF, 7.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_losses_count_as_zero(reduction, masked, mask_dtype):
    network = replace(SMALL, reduction=reduction)
    losses, phi, grad, tangent = inputs(network, 4, *SHAPE[2:])
    losses = losses.where(MASK, masked)
    actual = derivatives(lambda x, p: loss_image(x, p, network, MASK.to(mask_dtype)), losses, phi, grad, tangent)
    wanted = of_reference(network, losses.where(MASK, 0), phi, grad, tangent * MASK)
    wanted["weights"] = wanted["weights"] * MASK
    wanted["hessian product"] = wanted["hessian product"] * MASK
    assert_agree(actual, wanted, TOLERANCES[torch.float64])
    for key in ("weights", "hessian product"):
        assert (actual[key][~MASK] == 0).all(), key


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


def test_everything_masked():
    losses, phi, _, _ = inputs(SMALL, 2, 6, 7)
    losses = torch.full_like(losses, NAN).requires_grad_()
    value = loss_image(losses, phi, SMALL, torch.zeros_like(losses))
    (weights,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(value.detach(), loss_image_reference(torch.zeros_like(losses), phi, SMALL).detach())
    assert torch.equal(weights, torch.zeros_like(weights))


@pytest.mark.parametrize("wrong", [NAN, INF])
@pytest.mark.parametrize("width", [1, 5, 30])
def test_nan_spoils_its_own_image(width, wrong):
    """Images lie side by side in the kernels' memory."""
    network = LossImageNetwork(2, (4, 4), main=0, reduction="none")
    losses, phi, grad, tangent = inputs(network, 12, 6, width, torch.float32)
    clean = derivatives(lambda x, p: loss_image(x, p, network), losses, phi, grad, tangent)
    losses[7, :, 3, [0, -1]] = wrong
    result = derivatives(lambda x, p: loss_image(x, p, network), losses, phi, grad, tangent)
    others = torch.arange(12) != 7
    for key in ("value", "weights", "hessian product"):
        assert torch.equal(result[key][others], clean[key][others]), key
    assert not result["value"][7].isfinite()
    assert loss_image(losses, phi, replace(network, reduction="mean")).isfinite().logical_not()


@pytest.mark.parametrize("extreme", [1e30, -1e30, INF, -INF])
def test_extreme_losses_do_as_in_the_reference(extreme):
    network = LossImageNetwork(2, (4, 4), main=1, reduction="none")
    losses, phi, grad, tangent = inputs(network, 3, 8, 9)
    losses[1, 0, 4, 4] = extreme
    actual = derivatives(lambda x, p: loss_image(x, p, network), losses, phi.abs(), grad, tangent)
    wanted = derivatives(lambda x, p: loss_image_reference(x, p, network), losses, phi.abs(), grad, tangent)
    for key, reference in wanted.items():
        assert not (actual[key].isnan() & ~reference.isnan()).any(), key
        known = reference.isfinite()
        torch.testing.assert_close(actual[key][known], reference[known], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_losses_are_computed_in_float32(dtype):
    losses, phi, grad, tangent = inputs(SMALL, 3, 9, 20, torch.float32)
    given = losses.to(dtype).requires_grad_(), phi.requires_grad_()
    value = loss_image(*given, SMALL)
    assert value.dtype == torch.float32
    first = torch.autograd.grad(value, given, grad, create_graph=True)
    second = torch.autograd.grad(first[0], given, tangent.to(dtype))
    exact = of_reference(SMALL, given[0].detach(), phi.detach(), grad, tangent.to(dtype))
    assert relative_error(value.detach(), exact["value"]) <= 1e-6
    for key, result in zip(("weights", "phi", "hessian product", "mixed product"), (*first, *second), strict=True):
        assert result.dtype == (torch.float32 if key in ("phi", "mixed product") else dtype), key
        assert relative_error(result.detach(), exact[key]) <= max(5e-6, torch.finfo(result.dtype).eps), key


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
