"""The combiner's digits where its units are saturated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auxfast.ops.network import CombinerNetwork

from .combiner_cases import inputs, of_kernels, relative_error


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
