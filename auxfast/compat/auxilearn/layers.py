"""Layers whose weight is normalised, under the names of `torch.nn.utils.weight_norm`, and operations on all layers.

They are not made with that function: it is deprecated, its modules cannot be copied once they have run, and their
`weight` is that of the last forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from auxfast.autograd.torch_calls import weight_norm


class WeightNorm(nn.Module):
    """A layer with `weight = weight_g * weight_v / |weight_v|`, the norm taken over all that leads to one output.

    `weight_v`: (out, ...), like the weight; `weight_g`: (out, 1, ...).
    """

    weight_v: nn.Parameter
    weight_g: nn.Parameter

    @property
    def weight(self) -> Tensor:
        return weight_norm(self.weight_v, self.weight_g)

    def restore_directions(self) -> None:
        """Gives rows of zeros, which have no direction, all of them at length 0: their weights stay 0, and they can
        grow again."""
        direction, length = self.weight_v.data, self.weight_g.data
        lost = ~direction.flatten(1).any(1).view_as(length)
        length.masked_fill_(lost, 0.0)
        direction.masked_fill_(lost, direction[0].numel() ** -0.5)


class WeightNormLinear(WeightNorm, nn.Linear):  # type: ignore[override]
    pass


class WeightNormConv2d(WeightNorm, nn.Conv2d):  # type: ignore[override]
    pass


Layer = nn.Linear | nn.Conv2d


def weight_normalized(layer: Layer) -> Layer:
    """`layer` itself, from now on with a normalised weight of the same value. Its parameters are `bias`, `weight_g`,
    `weight_v`, in the order that the state of optimizers in checkpoints goes by."""
    weight = layer.weight.detach()
    del layer.weight
    layer.weight_g = nn.Parameter(torch.norm_except_dim(weight, 2, 0))
    layer.weight_v = nn.Parameter(weight)
    layer.__class__ = WeightNormLinear if isinstance(layer, nn.Linear) else WeightNormConv2d
    assert isinstance(layer, WeightNorm)
    layer.restore_directions()
    return layer


def clamp(layers: Iterable[nn.Module], clamp_bias: bool) -> None:
    """Sets negative weights of the linear and convolutional layers among `layers` to 0; of normalised ones, negative
    directions and lengths."""
    for layer in layers:
        if not isinstance(layer, Layer):
            continue
        if isinstance(layer, WeightNorm):
            layer.weight_v.data.clamp_(0)
            layer.weight_g.data.clamp_(0)
            layer.restore_directions()
        else:
            layer.weight.data.clamp_(0)
        if clamp_bias and layer.bias is not None:
            layer.bias.data.clamp_(0)


def flat_parameters(layers: Iterable[Layer]) -> list[Tensor]:
    """The weights, normalised in layers that are, and the biases, in the order of an op's flat phi."""
    return [part for layer in layers for part in (layer.weight, layer.bias) if part is not None]
