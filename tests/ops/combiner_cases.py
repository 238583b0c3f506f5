"""Networks, inputs and derivatives for the tests of the combiner op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from auxfast.ops.combiner import combiner, combiner_reference
from auxfast.ops.network import CombinerNetwork

HIDDENS = [(1,), (10,) * 5, (7, 3, 64), (64, 64), (5,) * 8]
SMALL = CombinerNetwork(3, (4, 2), main=0)

# Relative to the largest entry: of values and gradients, and of second derivatives.
TOLERANCES = {torch.float64: (1e-12, 2e-12), torch.float32: (1e-6, 3e-6)}
FIRST_ORDER = ("value", "weights", "phi")


def name(network: CombinerNetwork) -> str:
    options = f"{network.activation}-{'bias' if network.bias else 'no bias'}-main {network.main}-{network.reduction}"
    return f"{network.num_losses}-{'x'.join(map(str, network.hidden))}-{options}"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def inputs(
    network: CombinerNetwork, batch: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (batch, num_losses), phi, an incoming gradient and a tangent of the losses. These two are of one sign:
    sums over the batch do not cancel then, and a relative error is the kernels' own."""
    losses = (0.5 * normal(batch, network.num_losses, seed=seed)).exp()
    parts = []
    for part, shape in network.shapes.items():
        noise = normal(*shape, seed=seed + 1 + len(parts))
        parts.append((0.3 * noise if part.endswith("bias") else (1 + noise) / shape[-1]).flatten())
    grad = torch.tensor(1.7) if network.reduction != "none" else 0.5 + normal(batch, seed=seed + 50).abs()
    tangent = 0.5 + normal(batch, network.num_losses, seed=seed + 51).abs()
    return tuple(t.to(device, dtype) for t in (losses, torch.cat(parts), grad, tangent))  # type: ignore[return-value]


def derivatives(
    function: Callable[[Tensor, Tensor], Tensor], losses: Tensor, phi: Tensor, grad: Tensor, tangent: Tensor
) -> dict[str, Tensor]:
    """Everything up to second order: of the value, and of <grad * weights, tangent>."""
    losses, phi, grad = (t.detach().requires_grad_() for t in (losses, phi, grad))
    value = function(losses, phi)
    weights, phi_gradient = torch.autograd.grad(value, (losses, phi), grad, retain_graph=True, materialize_grads=True)
    (with_graph,) = torch.autograd.grad(value, losses, grad, create_graph=True)
    second = torch.autograd.grad(with_graph, (losses, phi, grad), tangent, materialize_grads=True)
    names = ("value", "weights", "phi", "hessian product", "mixed product", "grad")
    return dict(zip(names, (value.detach(), weights, phi_gradient, *second), strict=True))


def of_reference(network: CombinerNetwork, *given: Tensor) -> dict[str, Tensor]:
    """`derivatives` of the reference, in float64."""
    return derivatives(lambda x, phi: combiner_reference(x, phi, network), *(t.double() for t in given))


def of_kernels(network: CombinerNetwork, *given: Tensor) -> dict[str, Tensor]:
    return derivatives(lambda x, phi: combiner(x, phi, network), *given)


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """Error of the worst entry, relative to the largest one."""
    assert actual.shape == wanted.shape
    error, largest = (actual.double() - wanted).abs().max().item(), wanted.abs().max().item()
    return error / largest if error else 0.0


def assert_agree(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerances: tuple[float, float]) -> None:
    for key, tensor in actual.items():
        error = relative_error(tensor, wanted[key])
        assert error <= tolerances[key not in FIRST_ORDER], f"{key}: relative error {error:.1e}"
