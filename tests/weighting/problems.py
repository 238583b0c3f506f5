"""Losses with gradients that are given or a network's, and what the weightings make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from auxfast.weighting import Weighting, make_weighting


def linear_losses(values: list[float], gradients: list[list[float]], **options) -> tuple[Tensor, list[Tensor]]:
    """Losses (num_losses,) of these values and these gradients in the parameters, which are two tensors."""
    rows = torch.tensor(gradients, **options)
    first = torch.zeros(1, requires_grad=True, **options)
    rest = torch.zeros(rows.shape[1] - 1, 1, requires_grad=True, **options)
    return torch.tensor(values, **options) + rows @ torch.cat([first, rest.flatten()]), [first, rest]


def network_losses(
    num_losses: int, seed: int, absent: tuple[int, ...] = (), **options
) -> tuple[Tensor, list[torch.nn.Parameter]]:
    """Positive losses of a small network on random data; those of `absent` are 0 without a graph."""
    generator = torch.Generator().manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, num_losses)).to(**options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs = torch.randn(8, 4, generator=generator).to(**options)
    targets = torch.randn(8, num_losses, generator=generator).to(**options)
    losses = (network(inputs) - targets).square().mean(dim=0)
    zero = torch.zeros((), **options)
    return torch.stack([zero if i in absent else losses[i] for i in range(num_losses)]), list(network.parameters())


def made(name: str, num_losses: int = 3, main: int = 0) -> Weighting:
    """The weighting of this name, such that its weights move within a few steps."""
    return make_weighting(name, num_losses, main, **({"period": 2} if name == "dwa" else {}))


def weights_of(weighting: Weighting, steps: range, **options) -> list[Tensor]:
    """The weights of these steps; every third one lacks a loss."""
    absent = [(), (), (1,)]
    return [weighting(*network_losses(weighting.num_losses, step, absent[step % 3], **options)) for step in steps]
