"""What the combiner is compared with: the same network as torch.nn modules."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from auxfast.nn import NonlinearCombiner


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
