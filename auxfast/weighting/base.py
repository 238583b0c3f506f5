"""The base of all weightings: the call, and the checks of its arguments."""

from __future__ import annotations

import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

_NOT_FINITE = (
    "A loss or its gradient is NaN or inf: {} leaves what it has learned as it is, and returns the weights of the last "
    "good batch."
)


class NotFinite(Exception):
    """The batch has a loss or a gradient that is not finite."""


class Weighting(nn.Module, ABC):
    """A rule for the weights of the task losses: `(weights * losses).sum()` is the training loss.

    What a rule learns or remembers is in its state_dict: loading it resumes to the same numbers. Like any module it
    has to be on the device of the losses, by `.to(device)`. Losses that are minimised towards 0 are assumed.

    A loss of exactly 0 counts as absent: no sample of the batch has it. It does not enter what a rule learns, and
    its own weight, which then plays no part, is finite.

    A batch with a loss that is NaN or inf, or for the rules that look at gradients with such a gradient, changes
    nothing that a rule learns or remembers: a call returns the weights of the last good one (before it, those for the
    start), and each object warns of it once.

    Args:
        num_losses: how many losses there are, at least 1.
        main: index of the main loss.
        auxiliary: weight of each auxiliary loss before the first good batch. The main one's is 1.

    Raises:
        TypeError: `num_losses` or `main` is no int.
        ValueError: for anything outside of that.
    """

    last_weights: Tensor  # (num_losses,), those of the last good batch, in the dtype of its losses
    __call__: Callable[..., Tensor]  # nn.Module's is typed Any; the arguments are those of `forward`

    def __init__(self, num_losses: int, main: int = 0, *, auxiliary: float = 1.0) -> None:
        check_int("num_losses", num_losses)
        check_int("main", main)
        if num_losses < 1:
            raise ValueError(f"num_losses must be at least 1, got {num_losses}")
        if not 0 <= main < num_losses:
            raise ValueError(f"main must be an index 0 to {num_losses - 1}, got {main}")
        super().__init__()
        self.num_losses, self.main = num_losses, main
        self.register_buffer("last_weights", torch.full((num_losses,), float(auxiliary)))
        self.last_weights[main] = 1
        self._has_warned = False

    @torch.no_grad()
    def forward(self, losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The weights (num_losses,) for this step, detached, of the dtype and on the device of the losses.

        Call it once a training step, before the backward pass: the graph stays, and no `.grad` is touched.

        Args:
            losses: (num_losses,), the mean of each over the batch (0 for a sample that lacks it), with a graph to
                `parameters`.
            parameters: what the methods that look at gradients take them in: those that the tasks share.

        Raises:
            ValueError: `losses` is of another shape; or the method needs gradients, and `losses` has no graph or
                `parameters` nothing to train.
            TypeError: `losses` is no tensor, or not floating point; or `parameters` is one tensor.
        """
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses must be one tensor, got a {type(losses).__name__}: pass torch.stack(losses)")
        if not losses.dtype.is_floating_point:
            raise TypeError(f"losses must be floating point, got {losses.dtype}")
        if losses.shape != (self.num_losses,):
            raise ValueError(f"losses must have the shape ({self.num_losses},), got {tuple(losses.shape)}")
        given: Any = parameters
        if isinstance(given, Tensor):
            raise TypeError("parameters must be a sequence of tensors, not a Tensor: pass a list")
        try:
            values = losses.tolist()
            check_finite(values)
            weights = self._weights(losses, values, tuple(given)).to(losses)
        except NotFinite:
            self._warn_once()
            return self.last_weights.to(losses, copy=True)
        last = self.last_weights
        if last.dtype == weights.dtype and last.device == weights.device:
            last.copy_(weights)  # a new tensor would take 3 us more
        else:
            self.last_weights = weights.clone()
        return weights

    @abstractmethod
    def _weights(self, losses: Tensor, values: list[float], parameters: tuple[Tensor, ...]) -> Tensor:
        """The weights that `forward` returns, for finite losses, `values` in numbers. They share no memory with the
        state. Raises NotFinite, before it changes any state, if a gradient is not finite."""

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(_NOT_FINITE.format(type(self).__name__), RuntimeWarning, stacklevel=_stacklevel())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state_dict.setdefault(f"{prefix}last_weights", self.last_weights)  # earlier versions saved none
        for key, value in state_dict.items():
            if key.startswith(prefix) and isinstance(value, Tensor) and not (value.is_meta or value.isfinite().all()):
                error_msgs.append(f"{key} holds NaN or inf in the checkpoint: load an older one")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return f"num_losses={self.num_losses}, main={self.main}"


def check_finite(values: Iterable[float]) -> None:
    """Raises NotFinite if a value is NaN or inf. Few of them are best checked as numbers: `tolist()` takes a tenth of
    the time of `isfinite().all()` on a CPU, and as long on a GPU."""
    if not all(map(math.isfinite, values)):
        raise NotFinite


def check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_non_negative(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def _stacklevel() -> int:
    """The `stacklevel` at which the caller's `warnings.warn` finds the first frame outside of auxfast, and of torch, by
    which modules are called."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("auxfast", "torch"):
        level, frame = level + 1, frame.f_back
    return level
