"""Networks that turn losses into one loss, with the names, parameters and values of `auxilearn.hypernet`.

Their layers are torch modules that hold the parameters. Where a fused op computes the same, it runs on these parameters
in their place; elsewhere (other nonlinearities, dropout in training, hooks, replaced layers) the modules run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from auxfast.autograd.hooks import module_has_hooks
from auxfast.compat.auxilearn.layers import Layer, clamp, flat_parameters, weight_normalized
from auxfast.ops.combiner import combiner
from auxfast.ops.loss_image import loss_image
from auxfast.ops.network import Activation, CombinerNetwork, LossImageNetwork

_combiner_network = lru_cache(CombinerNetwork)
_loss_image_network = lru_cache(LossImageNetwork)


class HyperNet(nn.Module):
    """Base of all networks, from the losses of all tasks, (batch, input_dim) or an image of them, to one loss.

    Args:
        main_task: column (channel) of the main loss.
        input_dim: number of losses.
    """

    __call__: Callable[..., Tensor]  # nn.Module's is typed Any; the arguments are those of `forward`

    def __init__(self, main_task: int | None, input_dim: int) -> None:
        super().__init__()
        self.main_task = main_task
        self.input_dim = input_dim

    def forward(self, losses: Tensor, outputs: Any = None, labels: Any = None, data: Any = None) -> Tensor:
        """`outputs`, `labels` and `data` are for subclasses of yours that want them."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")

    def get_weights(self) -> list[nn.Parameter]:
        return list(self.parameters())


class MonoHyperNet(HyperNet):
    """Base of the networks that `clamp()` keeps monotone, to be called after every outer step.

    `clamp_bias`: whether negative biases are set to 0 as well.
    """

    def __init__(self, main_task: int | None, input_dim: int, clamp_bias: bool = False) -> None:
        super().__init__(main_task, input_dim)
        self.clamp_bias = clamp_bias

    def clamp(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define clamp()")


class Identity(nn.Identity):
    """The `nonlinearity` that makes a monotone network deep linear: without biases."""


class LinearHyperNet(HyperNet):
    """The mean over the batch of sum_j w_j l_j, plus the main loss's mean with `skip_connection`."""

    def __init__(
        self,
        main_task: int | None,
        input_dim: int,
        skip_connection: bool = False,
        init_value: float = 1.0,
        weight_normalization: bool = True,
    ) -> None:
        if skip_connection:
            _check_main_task(main_task, input_dim)
        super().__init__(main_task, input_dim)
        self.init_value = init_value
        self.skip_connection = skip_connection
        self.weight_normalization = weight_normalization
        self.linear: Layer = nn.Linear(input_dim, 1, bias=False)
        nn.init.constant_(self.linear.weight, init_value)
        if weight_normalization:
            weight_normalized(self.linear)

    def forward(self, losses: Tensor, outputs: Any = None, labels: Any = None, data: Any = None) -> Tensor:
        """losses: (batch, input_dim). Returns ()."""
        loss: Tensor = self.linear(losses).mean()
        return loss + losses[:, self.main_task].mean() if self.skip_connection else loss


class MonoLinearHyperNet(LinearHyperNet, MonoHyperNet):
    def __init__(
        self,
        main_task: int | None,
        input_dim: int,
        skip_connection: bool = False,
        clamp_bias: bool = False,
        init_value: float = 1.0,
        weight_normalization: bool = True,
    ) -> None:
        super().__init__(main_task, input_dim, skip_connection, init_value, weight_normalization)
        self.clamp_bias = clamp_bias

    def clamp(self) -> None:
        clamp([self.linear], self.clamp_bias)


class NonlinearHyperNet(HyperNet):
    """The mean over the batch of a network's output and of the main loss.

    Args:
        main_task, input_dim: see `HyperNet`.
        hidden_sizes: width of the hidden layer, or of each of them.
        nonlinearity: a module; softplus by default. Softplus and identities run on the fused op.
        bias: whether hidden layers have biases; they start at 0. The output has none.
        dropout_rate: the probability that a hidden unit is dropped in training.
        init_upper, init_lower: weights start uniform between them, 1 and 0 by default.
        weight_normalization: train each row of the weights as direction and length.
    """

    def __init__(
        self,
        main_task: int,
        input_dim: int,
        hidden_sizes: int | Sequence[int] = 1,
        nonlinearity: nn.Module | None = None,
        bias: bool = True,
        dropout_rate: float = 0.0,
        init_upper: float | None = None,
        init_lower: float | None = None,
        weight_normalization: bool = True,
    ) -> None:
        _check_main_task(main_task, input_dim)
        super().__init__(main_task, input_dim)
        self.nonlinearity = nn.Softplus() if nonlinearity is None else nonlinearity
        self.dropout = nn.Dropout(dropout_rate)
        self.weight_normalization = weight_normalization
        self.bias = bias = bias and self._may_have_biases(nonlinearity)
        hidden = _widths(hidden_sizes)
        bounds = 0.0 if init_lower is None else init_lower, 1.0 if init_upper is None else init_upper
        self.layers: list[nn.Module] = []
        for inputs, width in pairwise([input_dim, *hidden]):
            layer = _initialized(nn.Linear(inputs, width, bias=bias), bounds, weight_normalization)
            self.layers += [layer, self.nonlinearity, self.dropout]
        output = nn.Linear([input_dim, *hidden][-1], 1, bias=False)
        self.layers.append(_initialized(output, bounds, weight_normalization))
        self.net = nn.Sequential(*self.layers)

    @staticmethod
    def _may_have_biases(nonlinearity: nn.Module | None) -> bool:
        """Whether `bias` counts, with this nonlinearity."""
        return True

    def forward(self, losses: Tensor, outputs: Any = None, labels: Any = None, data: Any = None) -> Tensor:
        """losses: (batch, input_dim). Returns ()."""
        activation = self._fused_activation()
        if activation is None:
            value: Tensor = self.net(losses).mean()
            return value + losses[:, self.main_task].mean()
        linear: list[Any] = self.layers[::3]
        widths = tuple(layer.out_features for layer in linear[:-1])
        bias = linear[0].bias is not None
        network = _combiner_network(linear[0].in_features, widths, activation, bias, self._main(), "mean")
        return combiner(losses, _flat(flat_parameters(linear)), network)

    def _main(self) -> int:
        _check_main_task(self.main_task, self.input_dim)
        assert self.main_task is not None
        return self.main_task % self.input_dim

    def _fused_activation(self) -> Activation | None:
        """The network's activation, if the fused op computes what the network does; else None."""
        if len(self.layers) == 1 or _is_changed(self.net, self.layers) or (self.training and self.dropout.p > 0):
            return None
        nonlinearity = self.layers[1]
        if type(nonlinearity) in (Identity, nn.Identity):
            return "identity"
        if type(nonlinearity) is nn.Softplus and (nonlinearity.beta, nonlinearity.threshold) == (1, 20):
            return "softplus"
        return None


class MonoNonlinearHyperNet(NonlinearHyperNet, MonoHyperNet):
    """`NonlinearHyperNet` with `clamp()`; without biases if `nonlinearity` is an `Identity`."""

    @staticmethod
    def _may_have_biases(nonlinearity: nn.Module | None) -> bool:
        return not isinstance(nonlinearity, Identity)

    def clamp(self) -> None:
        clamp(self.net, self.clamp_bias)


class _ConvHyperNet(HyperNet):
    """3x3 convolutions with softplus and average pools of 2, a 1x1 convolution, and the mean over positions."""

    def __init__(
        self,
        main_task: int | None,
        reduction: Literal["mean", "sum"],
        channels: Sequence[int],
        bounds: tuple[float, float],
        output_bounds: tuple[float, float],
        weight_normalization: bool,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if main_task is not None:
            _check_main_task(main_task, channels[0])
        super().__init__(main_task, input_dim=-1)
        self.reduction = reduction
        self.weight_normalization = weight_normalization
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            layer = _initialized(nn.Conv2d(inputs, outputs, 3, padding=1), bounds, weight_normalization)
            layers += [layer, nn.Softplus(), nn.AvgPool2d(2)]
        output = nn.Conv2d(channels[-1], 1, 1, padding=1, bias=False)  # AuxiLearn pads it: see _border
        layers.append(_initialized(output, output_bounds, weight_normalization))
        self.conv = nn.Sequential(*layers)
        self._layers = layers

    def forward(self, losses: Tensor, outputs: Any = None, labels: Any = None, data: Any = None) -> Tensor:
        """losses: (batch, input_channels, H, W). Returns ()."""
        convolutions: list[Any] = self._layers[::3]
        border = _border(losses, len(convolutions) - 1)
        if border is None or _is_changed(self.conv, self._layers):
            value: Tensor = self.conv(losses).mean()
            return value if self.main_task is None else value + self._main_loss(losses[:, self.main_task])
        *parts, output = flat_parameters(convolutions)
        num_losses, channels = convolutions[0].in_channels, tuple(layer.out_channels for layer in convolutions[:-1])
        main = None if self.main_task is None else self.main_task % num_losses
        network = _loss_image_network(num_losses, channels, "softplus", main, self.reduction, "mean")
        return loss_image(losses, _flat([*parts, output * border]), network)

    def _main_loss(self, losses: Tensor) -> Tensor:
        return losses.mean() if self.reduction == "mean" else losses.sum((1, 2)).mean()


class NoFCCNNHyperNet(_ConvHyperNet):
    """A network of pixel losses: convolutions to 8, 16 and 32 channels. The output's weights start in [0, 1]."""

    def __init__(
        self,
        main_task: int | None,
        reduction: Literal["mean", "sum"] = "mean",
        input_channels: int = 3,
        init_upper: float = 0.1,
        init_lower: float = 0.0,
        weight_normalization: bool = False,
    ) -> None:
        bounds, channels = (init_lower, init_upper), (input_channels, 8, 16, 32)
        super().__init__(main_task, reduction, channels, bounds, (0.0, 1.0), weight_normalization)


class MonoNoFCCNNHyperNet(_ConvHyperNet, MonoHyperNet):
    """A network of pixel losses: convolutions to 8 and 16 channels, with `clamp()`."""

    def __init__(
        self,
        main_task: int | None,
        reduction: Literal["mean", "sum"] = "mean",
        init_upper: float = 0.1,
        init_lower: float = 0.0,
        input_channels: int = 3,
        weight_normalization: bool = False,
    ) -> None:
        bounds, channels = (init_lower, init_upper), (input_channels, 8, 16)
        super().__init__(main_task, reduction, channels, bounds, bounds, weight_normalization)

    def clamp(self) -> None:
        clamp(self.conv, self.clamp_bias)


def _widths(hidden_sizes: Any) -> list[int]:
    widths = list(hidden_sizes) if isinstance(hidden_sizes, (list, tuple)) else [hidden_sizes]
    if not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"hidden_sizes must be a positive int or a list of them, got {hidden_sizes!r}")
    return widths


def _initialized(layer: Layer, bounds: tuple[float, float], weight_normalization: bool) -> Layer:
    nn.init.uniform_(layer.weight, *bounds)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return weight_normalized(layer) if weight_normalization else layer


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _is_changed(net: nn.Sequential, layers: Sequence[nn.Module]) -> bool:
    """Whether `net` is no longer just these layers as they were made."""
    return (
        type(net) is not nn.Sequential or [*net] != layers or any(module_has_hooks(module) for module in (net, *layers))
    )


def _border(losses: Tensor, pools: int) -> float | None:
    """The factor by which a padding of 1 in a 1x1 convolution shrinks the mean over positions: it adds a border of
    zeros. None where the pools leave nothing, and torch has an error for that."""
    if losses.dim() != 4:
        raise ValueError(f"losses must be (batch, input_channels, H, W), got {tuple(losses.shape)}")
    height, width = (size >> pools for size in losses.shape[-2:])
    return height * width / ((height + 2) * (width + 2)) if height and width else None


def _check_main_task(main_task: int | None, num_losses: int) -> None:
    if main_task is None or not -num_losses <= main_task < num_losses:
        raise ValueError(f"main_task must be the index of one of {num_losses} losses, got {main_task}")
