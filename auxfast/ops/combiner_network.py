"""The architecture of a combiner, and where its parameters lie in the flat `phi`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from auxfast.ops.network import ACTIVATIONS, REDUCTIONS, Activation, Network, Reduction

MAX_DEPTH, MAX_WIDTH = 8, 64  # of the kernels (csrc/combiner/combiner.h); larger networks run on the reference
TILE_SAMPLES = 64


@dataclass(frozen=True)
class CombinerNetwork(Network):
    """The architecture of a combiner, and where its parameters lie in the flat `phi`.

    Args:
        num_losses: columns of the losses.
        hidden: widths of the hidden layers, at least one.
        activation: "softplus", or "identity" for a deep linear network.
        bias: whether hidden layers have biases (the output has none).
        main: column of the main loss, which is added to the network's output; None for no such skip.
        reduction: "mean" or "sum" over the batch, or "none".

    Raises:
        ValueError: for anything outside of that.
    """

    num_losses: int
    hidden: tuple[int, ...]
    activation: Activation = "softplus"
    bias: bool = True
    main: int | None = None
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.num_losses < 1:
            raise ValueError(f"num_losses must be at least 1, got {self.num_losses}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must hold one positive width for each hidden layer, got {self.hidden!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {self.reduction!r}")
        if self.main is not None and not 0 <= self.main < self.num_losses:
            raise ValueError(f"main must be None or a column 0 to {self.num_losses - 1}, got {self.main}")
        super().__post_init__()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every part of phi, in its order: `0.weight`, `0.bias`, ..., `out.weight`."""
        shapes: dict[str, tuple[int, ...]] = {}
        inputs = self.num_losses
        for layer, width in enumerate(self.hidden):
            shapes[f"{layer}.weight"] = (width, inputs)
            if self.bias:
                shapes[f"{layer}.bias"] = (width,)
            inputs = width
        shapes["out.weight"] = (inputs,)
        return shapes

    @cached_property
    def packed(self) -> str:
        """activation, bias, main or -1, reduction, widths...: what the kernels are told, as numbers with commas between
        (an op takes a string in much less time than a list of numbers)."""
        main = -1 if self.main is None else self.main
        numbers = ACTIVATIONS[self.activation], int(self.bias), main, REDUCTIONS[self.reduction], *self.hidden
        return ",".join(map(str, numbers))

    @cached_property
    def fits_kernels(self) -> bool:
        return len(self.hidden) <= MAX_DEPTH and max(self.hidden) <= MAX_WIDTH

    @cached_property
    def _saved_per_tile(self) -> int:
        return 3 * sum(self.hidden) * TILE_SAMPLES

    def saved_size(self, batch: int) -> int:
        """Elements that the kernels need to keep the activations of `batch` samples (whole tiles)."""
        return self._saved_per_tile * -(-batch // TILE_SAMPLES)
