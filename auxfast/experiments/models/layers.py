"""Layers of all networks: a layer with its normalisation and activation, in the variants of the paper's appendix D.

The paper asks for a smooth network in W: softplus for ReLU, and weight normalisation (Salimans and Kingma, 2016) for
BatchNorm, which ties the samples of a batch to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

Activation = Literal["relu", "leaky_relu", "softplus"]
"""The activation of all layers; leaky_relu has the slope 0.2 below 0, as in DGCNN."""

Norm = Literal["batch", "weight", "none"]
"""BatchNorm after each layer; weight normalisation of each layer and no BatchNorm; or neither. Without BatchNorm, which
makes them useless, all layers have biases."""

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "softplus": nn.Softplus,
}
_NORMS = ("batch", "weight", "none")

Layer = TypeVar("Layer", bound=nn.Conv1d | nn.Conv2d | nn.Linear)


class _WeightNorm(nn.Module):
    """The weight `g v / |v|`, the norm taken over all axes but the first.

    Its parameters have the names that `torch.nn.utils.parametrizations.weight_norm` gives them, `original0` for g and
    `original1` for v. That one has the same values and gradients, but torch (2.13) takes the `|v|` in its gradients for
    a constant when they are differentiated in v: Hessian-vector products are wrong, and `auxfast.hypergradient` refuses
    such a network.
    """

    def forward(self, length: Tensor, direction: Tensor) -> Tensor:
        return direction * (length / _row_norms(direction))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _row_norms(weight), weight


def _row_norms(weight: Tensor) -> Tensor:
    """The norm of each row: (out, ...) to (out, 1, ...)."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
    return norms


def make_activation(name: Activation) -> nn.Module:
    """The activation of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


def make_classifier(features: int, classes: int | None) -> nn.Module:
    """A linear classifier of features; without `classes`, what gives the features themselves."""
    return nn.Identity() if classes is None else nn.Linear(features, classes)


def normalised(layer: Layer, norm: Norm) -> tuple[Layer, nn.Module]:
    """The layer, whose weight is normalised if `norm` says so, and what follows it: BatchNorm, or nothing.

    Raises:
        ValueError: there is no such `norm`.
    """
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
    if norm == "batch":
        channels = layer.weight.shape[0]
        return layer, nn.BatchNorm2d(channels) if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d(channels)
    if norm == "weight":
        register_parametrization(layer, "weight", _WeightNorm())
    return layer, nn.Identity()


def block(layer: Layer, norm: Norm, activation: Activation) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The layer, what follows it by `norm` (see `normalised`), and its activation."""
    return (*normalised(layer, norm), make_activation(activation))


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1, *, bias: bool) -> nn.Conv2d:
    """A convolution that keeps height and width at stride 1. Its weights are drawn as He et al. (2015) do, by the
    number of outputs, and its biases are 0."""
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def point_layers(
    widths: Sequence[int], norm: Norm, activation: Activation, kind: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv1d
) -> nn.Sequential:
    """Blocks that each point goes through by itself: (batch, widths[0], points) to (batch, widths[-1], points); or,
    with `nn.Conv2d`, each edge, (batch, widths[0], points, neighbours) to (batch, widths[-1], points, neighbours)."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += block(kind(inputs, outputs, 1, bias=norm != "batch"), norm, activation)
    return nn.Sequential(*layers)


def check_size(images: Tensor, least: int) -> None:
    """Checks that images are large enough to be halved as often as the network does.

    Raises:
        ValueError: they have another number of dimensions than 4, or are smaller.
    """
    if images.dim() != 4 or min(images.shape[2:]) < least:
        raise ValueError(
            f"images: got shape {tuple(images.shape)}, must be (batch, channels, height, width), {least} x {least} "
            "pixels or more"
        )
