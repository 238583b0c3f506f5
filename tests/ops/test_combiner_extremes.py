"""The combiner on what is not ordinary: saturated units, infinities, losses that are missing, low precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from auxfast.ops.combiner import CombinerNetwork, combiner, combiner_reference

from .combiner_cases import (
    DEVICES,
    SMALL,
    TOLERANCES,
    assert_agree,
    derivatives,
    inputs,
    normal,
    of_kernels,
    of_reference,
    relative_error,
)

INF, NAN = float("inf"), float("nan")

# --------------------------------------------------------------------------------------------------- saturated units


def _softplus(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and derivatives, each to the last digit, where torch's own second derivative, s (1 - s), has none left."""
    e = (-z.abs()).exp()
    slope = torch.where(z >= 0, 1.0, e) / (1 + e)
    return z.clamp(min=0) + e.log1p(), slope, e / (1 + e) ** 2


def _chain(z: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of softplus applied `depth` times."""
    value, first, second = z, torch.ones_like(z), torch.zeros_like(z)
    for _ in range(depth):
        value, slope, curvature = _softplus(value)
        first, second = slope * first, curvature * first**2 + slope * second
    return value, first, second


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_losses", [32, 64])
def test_every_entry_keeps_its_digits_where_softplus_saturates(num_losses, depth, dtype, rtol, device):
    """A network of identity matrices takes each loss through a chain of softplus of its own. The losses are integers,
    so that no rounding of z blurs what is compared."""
    network = CombinerNetwork(num_losses, (num_losses,) * depth, bias=False, reduction="sum")
    phi = torch.cat([torch.eye(num_losses).flatten()] * depth + [torch.ones(num_losses)]).to(device, dtype)
    losses = torch.linspace(-80, 80, 5 * num_losses).round().view(5, num_losses).to(device, dtype)
    result = of_kernels(network, losses, phi, torch.ones((), dtype=dtype, device=device), torch.ones_like(losses))
    value, first, second = _chain(losses.double(), depth)
    for actual, wanted in ((result["weights"], first), (result["hessian product"], second)):
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol * depth**2, atol=0)
    torch.testing.assert_close(result["value"].double(), value.sum(), rtol=rtol, atol=0)
    output = network.split(result["mixed product"])["out.weight"].double()
    torch.testing.assert_close(output, first.sum(0), rtol=rtol, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [15.0, -15.0])
def test_float32_keeps_its_digits_around_plus_and_minus_15(bias, device):
    """One saturated layer; the exact derivatives by hand in float64."""
    network = CombinerNetwork(5, (8,), main=0, reduction="sum")
    losses, phi, grad, tangent = inputs(network, 200, torch.float32, device)
    parts = network.split(phi)
    parts["0.bias"].fill_(bias)
    result = of_kernels(network, losses, phi, grad, tangent)
    weight, offset, output = (parts[key].double() for key in ("0.weight", "0.bias", "out.weight"))
    x, t, c = losses.double(), tangent.double(), grad.double()
    _, slope, curvature = _softplus(x @ weight.T + offset)
    kappa = c * curvature * output * (t @ weight.T)  # (batch, units)
    wanted = {
        "hessian product": kappa @ weight,
        "0.weight": kappa.T @ x + c * (slope * output).T @ t,
        "0.bias": kappa.sum(0),
        "out.weight": c * (slope * (t @ weight.T)).sum(0),
    }
    actual = {**network.split(result["mixed product"]), "hessian product": result["hessian product"]}
    for key, exact in wanted.items():
        assert relative_error(actual[key], exact) <= 3e-6, key


# ------------------------------------------------------------------------------------------ infinite, huge and NaN


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", [INF, -INF, 1e30, -1e30])
@pytest.mark.parametrize("num_losses", [3, 60])
def test_extreme_losses_do_as_in_the_reference(num_losses, extreme, dtype, device):
    network = CombinerNetwork(num_losses, (4, 4), main=1, reduction="none")
    losses, phi, grad, tangent = inputs(network, 6, dtype, device)
    phi = phi.abs()
    losses[2, 0] = losses[4, 1] = extreme
    actual = of_kernels(network, losses, phi, grad, tangent)
    wanted = derivatives(lambda x, p: combiner_reference(x, p, network), losses, phi, grad, tangent)
    if extreme == INF:
        assert actual["value"][[2, 4]].tolist() == [INF, INF]
    for key, reference in wanted.items():
        assert not (actual[key].isnan() & ~reference.isnan()).any(), key
        known = reference.isfinite()
        torch.testing.assert_close(actual[key][known], reference[known], rtol=1e-5, atol=1e-6, msg=key)
    torch.testing.assert_close(actual["value"], wanted["value"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_losses", [3, 60])
def test_nan_spoils_its_own_sample(num_losses, device):
    network = CombinerNetwork(num_losses, (4, 4), reduction="none")
    losses, phi, grad, tangent = inputs(network, 70, torch.float32, device)
    losses[66, 2] = NAN
    result = of_kernels(network, losses, phi, grad, tangent)
    for key in ("value", "weights", "hessian product"):
        rows = result[key].isnan().view(70, -1).any(1)
        assert rows.nonzero().flatten().tolist() == [66], key
    for reduction in ("mean", "sum"):
        assert combiner(losses, phi, replace(network, reduction=reduction)).isnan()


# ------------------------------------------------------------------------------------------------------------- masks

MASK = (normal(70, 3, seed=3) > -0.5).index_fill(1, torch.tensor([1]), True)
MASK[3] = False


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.int64])
@pytest.mark.parametrize("masked", [NAN, INF, -INF, 7.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_losses_count_as_zero(reduction, masked, mask_dtype, device):
    network = replace(SMALL, reduction=reduction)
    losses, phi, grad, tangent = inputs(network, 70, torch.float64, device)
    mask = MASK.to(device)
    losses = losses.where(mask, masked)
    actual = derivatives(lambda x, p: combiner(x, p, network, mask.to(mask_dtype)), losses, phi, grad, tangent)
    zeroed, seen_tangent = losses.where(mask, 0), tangent * mask
    wanted = of_reference(network, zeroed, phi, grad, seen_tangent)
    wanted["weights"] = wanted["weights"] * mask
    wanted["hessian product"] = wanted["hessian product"] * mask
    assert_agree(actual, wanted, TOLERANCES[torch.float64])
    for key in ("weights", "hessian product"):
        assert (actual[key][~mask] == 0).all(), key


def test_masked_main_loss():
    losses, phi, _, _ = inputs(SMALL, 4)
    losses[:, 0] = NAN
    mask = torch.ones_like(losses)
    mask[:, 0] = 0
    losses.requires_grad_()
    value = combiner(losses, phi, SMALL, mask)
    (weights,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(value.detach(), combiner_reference(losses.detach().nan_to_num(0.0), phi, SMALL))
    assert (weights[:, 0] == 0).all()
    assert (weights[:, 1:] != 0).all()


def test_everything_masked():
    losses, phi, _, _ = inputs(SMALL, 4)
    losses = torch.full_like(losses, NAN).requires_grad_()
    value = combiner(losses, phi, SMALL, torch.zeros(4, 3, dtype=torch.bool))
    (weights,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(value.detach(), combiner_reference(torch.zeros_like(losses), phi, SMALL).detach())
    assert torch.equal(weights, torch.zeros_like(weights))


# ----------------------------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("phi_dtype", [torch.float32, None], ids=["phi float32", "phi as the losses"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_low_precision_losses_are_computed_in_float32(with_mask, phi_dtype, dtype, device):
    losses, phi, grad, tangent = inputs(SMALL, 70, torch.float32, device)
    losses, phi = losses.to(dtype), phi.to(phi_dtype or dtype)
    mask = MASK.to(device) if with_mask else torch.ones(70, 3, dtype=torch.bool, device=device)
    if with_mask:
        losses = losses.where(mask, NAN)
    given = losses.requires_grad_(), phi.requires_grad_()
    value = combiner(*given, SMALL, mask if with_mask else None)
    assert value.dtype == torch.float32
    first = torch.autograd.grad(value, given, grad, create_graph=True)
    second = torch.autograd.grad(first[0], given, tangent.to(dtype))
    exact = of_reference(SMALL, losses.detach().where(mask, 0), phi.detach(), grad, tangent.to(dtype) * mask)
    assert relative_error(value.detach(), exact["value"]) <= 1e-6
    results = (*first, *second)
    for key, result in zip(("weights", "phi", "hessian product", "mixed product"), results, strict=True):
        like, of_losses = given[key not in ("weights", "hessian product")], key in ("weights", "hessian product")
        assert result.dtype == like.dtype, key
        wanted = exact[key] * mask if of_losses else exact[key]
        tolerance = max(3e-6, torch.finfo(result.dtype).eps)
        assert relative_error(result.detach(), wanted) <= tolerance, key
