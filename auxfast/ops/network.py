"""The architectures of the ops with a network: where parameters lie in the flat `phi`, and what kernels are told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
Activation = Literal["softplus", "identity"]
MainReduction = Literal["mean", "sum", "valid_mean"]
REDUCTIONS: dict[str, int] = {"none": 0, "sum": 1, "mean": 2}  # the codes of csrc/common/network.h
ACTIVATIONS: dict[str, int] = {"identity": 0, "softplus": 1}
MAIN_REDUCTIONS: tuple[MainReduction, ...] = ("mean", "sum", "valid_mean")

# Limits of the kernels (csrc/combiner/combiner.h, csrc/loss_image/loss_image.h); larger networks run on the reference.
MAX_DEPTH, MAX_WIDTH = 8, 64
MAX_CONVOLUTIONS, MAX_CHANNELS = 4, 64
TILE_SAMPLES = 64  # the combiner's kernels save the activations of whole tiles of samples


def check_losses(num_losses: Any, main: Any, main_is: str = "column") -> None:
    """Refuses a number of losses or an index of the main loss that is none.

    Args:
        main_is: what `main` counts, in messages.

    Raises:
        TypeError: `num_losses` is no int, or `main` neither an int nor None.
        ValueError: they are outside their range.
    """
    check_count("num_losses", num_losses)
    if main is not None and not _is_int(main):
        raise TypeError(f"main must be None or an int, the index of a {main_is}, got {main!r}")
    if main is not None and not 0 <= main < num_losses:
        raise ValueError(f"main must be None or a {main_is} 0 to {num_losses - 1}, got {main}")


def check_count(name: str, value: Any) -> None:
    """Refuses what is no int of at least 1, with TypeError or ValueError."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def layer_sizes(name: Literal["hidden", "channels"], sizes: Any) -> tuple[int, ...]:
    """The sizes of layers, given as a sequence, as a tuple; `name` is the argument's.

    Raises:
        TypeError: `sizes` is no sequence of ints.
        ValueError: it is empty, or one of them is not positive.
    """
    each = "width for each hidden layer" if name == "hidden" else "number for each convolution"
    example = sizes if _is_int(sizes) and sizes > 0 else 10
    if not isinstance(sizes, Iterable) or isinstance(sizes, str):
        raise TypeError(f"{name} must be a sequence, one {each}, like {name}=({example},), got {sizes!r}")
    found = tuple(sizes)
    if not all(map(_is_int, found)):
        raise TypeError(f"{name} must hold ints, got {found!r}")
    if not found or min(found) < 1:
        raise ValueError(f"{name} must hold one positive {each}, got {found!r}")
    return found


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class Network(ABC):
    """An architecture whose parameters lie in one flat `phi`.

    Attributes:
        main_is: what `main` counts, in messages.
        kernel_size: of each layer.
        kernels_take: which networks the kernels have room for, in messages.
    """

    num_losses: int
    activation: Activation
    bias: bool
    main: int | None
    reduction: Reduction
    main_is: ClassVar[str]
    kernel_size: ClassVar[tuple[int, ...]]
    kernels_take: ClassVar[str]

    def __post_init__(self) -> None:
        check_losses(self.num_losses, self.main, self.main_is)
        self._check_choice("activation", ACTIVATIONS)
        self._check_choice("reduction", REDUCTIONS)
        # Caches are filled in now: up to Python 3.11 that takes a lock, which torch.compile of 2.11 cannot trace.
        for kind in type(self).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, cached_property):
                    getattr(self, name)

    def _check_choice(self, name: str, choices: Collection[str]) -> None:
        if (given := getattr(self, name)) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {given!r}")

    @cached_property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Outputs of each layer but the last."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every part of phi, in its order: `0.weight`, `0.bias`, ..., `out.weight`."""
        shapes: dict[str, tuple[int, ...]] = {}
        inputs = self.num_losses
        for layer, outputs in enumerate(self.layers):
            shapes[f"{layer}.weight"] = (outputs, inputs, *self.kernel_size)
            if self.bias:
                shapes[f"{layer}.bias"] = (outputs,)
            inputs = outputs
        shapes["out.weight"] = (inputs,)
        return shapes

    @cached_property
    @abstractmethod
    def flag(self) -> bool:
        """A choice of the op's own, of which the kernels are told."""

    @cached_property
    @abstractmethod
    def fits_kernels(self) -> bool:
        """Whether the kernels have room for it; larger ones run on the reference."""

    @cached_property
    def packed(self) -> str:
        """Text that tells the kernels: activation, reduction, main or -1, flag, layers; as numbers with commas between.
        An op takes a string in much less time than a list of numbers."""
        main = -1 if self.main is None else self.main
        numbers = ACTIVATIONS[self.activation], REDUCTIONS[self.reduction], main, int(self.flag), *self.layers
        return ",".join(map(str, numbers))

    @cached_property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @cached_property
    def phi_shape(self) -> tuple[int]:
        return (self.num_parameters,)

    def split(self, phi: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor (num_parameters,) by the names of `shapes`."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        parts = phi.split(sizes)
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}


def unpacked(packed: str) -> tuple[bool, list[int]]:
    """Whether a packed network's value is one of each sample, and its layers."""
    _, reduction, _, _, *layers = map(int, packed.split(","))
    return reduction == REDUCTIONS["none"], layers


def loss_image_saved_size(channels: Sequence[int], batch: int, height: int, width: int) -> int:
    """The size of what `auxfast::loss_image_forward` saves, as csrc/loss_image/loss_image.h has it: of each layer the
    pixels that its pool keeps, in rows of an even number, and those that it makes of them."""
    size = 0
    for outputs in channels:
        pool = [min(2, extent) for extent in (height, width)]
        height, width = height // pool[0], width // pool[1]
        columns = pool[1] * width
        of_h = batch * outputs * height * width
        size += batch * outputs * pool[0] * height * (columns + columns % 2) + of_h + of_h % 2
    return size


@dataclass(frozen=True)
class CombinerNetwork(Network):
    """The architecture of a combiner.

    Args:
        num_losses: columns of the losses.
        hidden: widths of the hidden layers, at least one.
        activation: "softplus", or "identity" for a deep linear network.
        bias: whether hidden layers have biases (the output has none).
        main: column of the main loss, which is added to the network's output; None for no such skip.
        reduction: "mean" or "sum" over the batch, or "none".

    Raises:
        TypeError, ValueError: for anything outside of that.
    """

    num_losses: int
    hidden: tuple[int, ...]
    activation: Activation = "softplus"
    bias: bool = True
    main: int | None = None
    reduction: Reduction = "mean"
    main_is: ClassVar[str] = "column"
    kernel_size: ClassVar[tuple[int, ...]] = ()
    kernels_take: ClassVar[str] = f"the kernels take at most {MAX_DEPTH} hidden layers of at most {MAX_WIDTH} units"

    def __post_init__(self) -> None:
        layer_sizes("hidden", self.hidden)
        super().__post_init__()

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return self.hidden

    @cached_property
    def flag(self) -> bool:
        return self.bias

    @cached_property
    def fits_kernels(self) -> bool:
        return len(self.hidden) <= MAX_DEPTH and max(self.hidden) <= MAX_WIDTH

    @cached_property
    def _kept_per_tile(self) -> int:
        return 3 * sum(self.hidden) * TILE_SAMPLES

    def saved_size(self, batch: int) -> int:
        """Elements that the kernels need to save the activations of `batch` samples (whole tiles)."""
        return self._kept_per_tile * -(-batch // TILE_SAMPLES)


@dataclass(frozen=True)
class LossImageNetwork(Network):
    """The architecture of a loss-image network.

    Args:
        num_losses: channels of the loss image.
        channels: outputs of each 3x3 convolution, at least one; every convolution is followed by the activation and an
            average pool of 2.
        activation: "softplus", or "identity" for a deep linear network.
        main: channel of the main loss, which is added to the network's output; None for no such skip.
        main_reduction: over the main loss's pixels: "mean", "sum", or "valid_mean", the mean over those that the mask
            keeps (0 for an image that has none).
        reduction: "mean" or "sum" over the batch, or "none".

    Raises:
        TypeError, ValueError: for anything outside of that.
    """

    num_losses: int
    channels: tuple[int, ...] = (8, 16)
    activation: Activation = "softplus"
    main: int | None = None
    main_reduction: MainReduction = "mean"
    reduction: Reduction = "mean"
    main_is: ClassVar[str] = "channel"
    kernel_size: ClassVar[tuple[int, ...]] = (3, 3)
    kernels_take: ClassVar[str] = (
        f"the kernels take at most {MAX_CONVOLUTIONS} convolutions, and at most {MAX_CHANNELS} losses and channels"
    )
    bias: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        layer_sizes("channels", self.channels)
        self._check_choice("main_reduction", MAIN_REDUCTIONS)
        super().__post_init__()

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return self.channels

    @cached_property
    def flag(self) -> bool:
        """Whether the main loss is a mean over the image's pixels instead of their sum."""
        return self.main_reduction != "sum"

    @cached_property
    def fits_kernels(self) -> bool:
        return len(self.channels) <= MAX_CONVOLUTIONS and max(self.num_losses, *self.channels) <= MAX_CHANNELS

    def saved_size(self, batch: int, num_losses: int, height: int, width: int) -> int:
        """Elements that the kernels for CUDA need to save the activations of losses of this shape."""
        return loss_image_saved_size(self.layers, batch, height, width)

    def main_weight(self, losses: Tensor) -> float:
        """The factor of the sum over the main loss's pixels, without a mask."""
        return 1.0 if self.main_reduction == "sum" else 1.0 / max(losses.shape[-1] * losses.shape[-2], 1)
