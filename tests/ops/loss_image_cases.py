"""Networks, inputs and derivatives for the tests of the loss-image op."""

from __future__ import annotations

import torch
from torch import Tensor

from auxfast.ops.loss_image import loss_image, loss_image_reference
from auxfast.ops.network import LossImageNetwork

from .combiner_cases import derivatives, normal

SMALL = LossImageNetwork(2, (3, 2), main=0)

# Relative to the largest entry: of values and gradients, and of second derivatives.
TOLERANCES = {torch.float64: (1e-12, 2e-12), torch.float32: (1e-6, 5e-6)}


def name(network: LossImageNetwork) -> str:
    options = f"{network.activation}-main {network.main} {network.main_reduction}-{network.reduction}"
    return f"{network.num_losses}-{'x'.join(map(str, network.channels))}-{options}"


def inputs(
    network: LossImageNetwork,
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (batch, num_losses, H, W), phi, an incoming gradient and a tangent of the losses. The last two are of one
    sign: sums over pixels do not cancel then, and a relative error is the kernels' own."""
    shape = batch, network.num_losses, height, width
    losses = (0.5 * normal(*shape, seed=seed)).exp()
    parts = []
    for part, part_shape in network.shapes.items():
        noise = normal(*part_shape, seed=seed + 1 + len(parts))
        fan_in = torch.Size(part_shape[1:]).numel()
        parts.append((0.3 * noise if part.endswith("bias") else (1 + noise) / fan_in).flatten())
    grad = torch.tensor(1.7) if network.reduction != "none" else 0.5 + normal(batch, seed=seed + 50).abs()
    tangent = 0.5 + normal(*shape, seed=seed + 51).abs()
    return tuple(t.to(device, dtype) for t in (losses, torch.cat(parts), grad, tangent))  # type: ignore[return-value]


def of_reference(network: LossImageNetwork, *given: Tensor) -> dict[str, Tensor]:
    """`derivatives` of the reference, in float64."""
    return derivatives(lambda x, phi: loss_image_reference(x, phi, network), *(t.double() for t in given))


def of_kernels(network: LossImageNetwork, *given: Tensor) -> dict[str, Tensor]:
    return derivatives(lambda x, phi: loss_image(x, phi, network), *given)
