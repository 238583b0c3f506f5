"""Heads on a backbone: what a student of learned auxiliary labels needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auxfast.experiments.models.layers import Activation, make_activation


class TwoHeads(nn.Module):
    """A backbone with a main and an auxiliary head. What the backbone takes, to (batch, num_main + num_auxiliary): main
    logits, then auxiliary ones.

    Args:
        backbone: gives (batch, num_features).
        num_features: number of its features; the image networks of this package have it as an attribute.
        num_main: main outputs.
        num_auxiliary: auxiliary outputs.
        hidden: units of a hidden layer in each head, 512 for the paper's fine-grained sets (appendix B.3); None for
            linear heads.
        activation: that of the hidden layers.

    Attributes:
        backbone: the parameters that both tasks share.
        main, auxiliary: the heads.

    Raises:
        ValueError: a size below 1, or an unknown `activation`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        num_main: int,
        num_auxiliary: int,
        hidden: int | None = None,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        for name, size in [("num_features", num_features), ("num_main", num_main), ("num_auxiliary", num_auxiliary)]:
            if size < 1:
                raise ValueError(f"{name}: got {size}, must be 1 or more")
        self.backbone = backbone
        self.main = make_head(num_features, num_main, hidden, activation)
        self.auxiliary = make_head(num_features, num_auxiliary, hidden, activation)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.backbone(inputs)
        return torch.cat([self.main(features), self.auxiliary(features)], dim=1)


def make_head(features: int, outputs: int, hidden: int | None = None, activation: Activation = "relu") -> nn.Module:
    """A head on a backbone's features, (batch, features) to (batch, outputs); arguments as of `TwoHeads`."""
    if hidden is None:
        return nn.Linear(features, outputs)
    if hidden < 1:
        raise ValueError(f"hidden: got {hidden}, must be 1 or more")
    return nn.Sequential(nn.Linear(features, hidden), make_activation(activation), nn.Linear(hidden, outputs))
