"""What auxfast is compared with: the same networks as torch.nn modules, and the textbook loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from auxfast.nn import NonlinearCombiner
from auxfast.ops.network import LossImageNetwork


class EagerCombiner(nn.Module):
    """A `NonlinearCombiner` with the main loss in column 0, written with torch.nn, with a copy of its parameters."""

    def __init__(self, combiner: NonlinearCombiner) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        widths = [combiner.num_losses, *combiner.network.hidden]
        for inputs, outputs in pairwise(widths):
            modules += [nn.Linear(inputs, outputs), nn.Softplus()]
        self.net = nn.Sequential(*modules, nn.Linear(widths[-1], 1, bias=False))
        with torch.no_grad():
            for parameter, layer in zip(self.parameters(), combiner.layers().values(), strict=True):
                parameter.copy_(layer.reshape(parameter.shape))

    def forward(self, losses: Tensor) -> Tensor:
        """(batch, num_losses) -> ()"""
        return self.net(losses).mean() + losses[:, 0].mean()


def eager_loss_image(network: LossImageNetwork, phi: Tensor) -> nn.Sequential:
    """The network as torch.nn modules, but for the main loss, with a copy of its parameters."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise((network.num_losses, *network.channels)):
        modules += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2)]
    eager = nn.Sequential(*modules, nn.Conv2d(network.channels[-1], 1, 1, bias=False))
    for parameter, part in zip(eager.parameters(), network.split(phi.detach()).values(), strict=True):
        parameter.data.copy_(part.view(parameter.shape))
    return eager


def derivatives(
    value: Callable[[Tensor], Tensor], losses: Tensor, tangent: Tensor, parameters: list[Tensor]
) -> dict[str, Callable[[], Any]]:
    """What is timed of one implementation, by name.

    "full" is what one hypergradient asks of an op besides the Hessian products: the gradient in the losses, and the vjp
    of that in losses and parameters. "Hessian" is one Hessian product through a graph that is recorded here; "gradient"
    is value and gradient.
    """
    losses = losses.requires_grad_()
    (retained,) = torch.autograd.grad(value(losses), losses, create_graph=True)

    def full() -> Any:
        (gradient,) = torch.autograd.grad(value(losses), losses, create_graph=True)
        return torch.autograd.grad(gradient, [losses, *parameters], tangent, allow_unused=True)

    return {
        "full": full,
        "Hessian": lambda: torch.autograd.grad(retained, losses, tangent, retain_graph=True),
        "gradient": lambda: torch.autograd.grad(value(losses), losses),
    }


def textbook_neumann(
    outer_loss: Tensor, inner_loss: Tensor, w: Sequence[Tensor], phi: Sequence[Tensor], steps: int, step_size: float
) -> list[Tensor]:
    """The paper's Algorithm 2 with list comprehensions (and the factor `step_size`)."""
    v = torch.autograd.grad(outer_loss, w)
    grads = torch.autograd.grad(inner_loss, w, create_graph=True)
    p = [t.clone() for t in v]
    for _ in range(steps):
        hv = torch.autograd.grad(grads, w, v, retain_graph=True)
        v = [a - step_size * b for a, b in zip(v, hv, strict=True)]
        p = [a + b for a, b in zip(p, v, strict=True)]
    return [-step_size * g for g in torch.autograd.grad(grads, phi, p)]
