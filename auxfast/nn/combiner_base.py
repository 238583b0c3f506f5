"""The base of all combiners: the flat `phi` and its named parts, projection, adaptive weights, checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from auxfast.ops.network import Reduction


class Combiner(nn.Module, ABC):
    """Base of all combiners; subclasses say how `phi` is laid out and what the combined value of a sample is.

    Args:
        num_losses: columns of the losses, or channels of the loss image.
        main: column (channel) of the main loss, added to the combiner's output as it is (the paper's l_main + g); None
            for no such skip.
        monotone: keep the output non-decreasing in every loss: `project_()` then clips the weights to >= 0.
        reduction: "mean" or "sum" over the batch, or "none".
        shapes: name and shape of every part of `phi`.

    Raises:
        ValueError: an argument is outside its range.
    """

    phi: nn.Parameter  # (number of parameters,)
    __call__: Callable[..., Tensor]  # nn.Module's is typed Any; the arguments are those of `forward`

    def __init__(
        self,
        num_losses: int,
        main: int | None,
        monotone: bool,
        reduction: Reduction,
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        if num_losses < 1:
            raise ValueError(f"num_losses must be at least 1, got {num_losses}")
        if main is not None and not 0 <= main < num_losses:
            raise ValueError(f"main must be None or a column 0 to {num_losses - 1}, got {main}")
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
        super().__init__()
        self.num_losses, self.main, self.monotone, self.reduction = num_losses, main, monotone, reduction
        self._shapes = shapes
        self._sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.phi = nn.Parameter(torch.zeros(sum(self._sizes)))

    def forward(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """The combined loss of `losses` (batch, num_losses): a scalar, or (batch,) if the reduction is "none".

        `mask`, of the shape of `losses`, is 0 where a sample does not have a loss: that entry counts as 0 and its
        gradient is 0, whatever it holds. float16 and bfloat16 losses are computed in float32. Twice differentiable in
        the losses and in `phi`.
        """
        return self._combine(losses, mask, self.reduction)

    @abstractmethod
    def _combine(self, losses: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
        """The combined value of every sample, reduced."""

    def layers(self) -> dict[str, Tensor]:
        """The parts of `phi` by name, as views: writing to them (in `torch.no_grad()`) writes to `phi`."""
        parts, at = {}, 0
        for (name, shape), size in zip(self._shapes.items(), self._sizes, strict=True):
            parts[name] = self.phi.narrow(0, at, size).view(shape)  # not split(), whose views may not be written to
            at += size
        return parts

    @torch.no_grad()
    def project_(self) -> None:
        """Projects `phi` onto the monotone set, by clipping weights to >= 0 (paper, section 3.2); biases are free. Call
        it after every outer step. Does nothing if not `monotone`."""
        if self.monotone:
            for name, part in self.layers().items():
                if not name.endswith("bias"):
                    part.clamp_(min=0)

    def loss_weights(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """The adaptive weights, of the shape of `losses`: the derivative of each sample's combined value in its losses.

        These are the paper's alpha (section 3.2), and 1 more in the main loss's column: what each sample's losses are
        multiplied with, to first order. They do not contain the 1 / batch of a mean. Detached.
        """
        with torch.enable_grad():
            losses = losses.detach().requires_grad_()
            (weights,) = torch.autograd.grad(self._combine(losses, mask, "sum"), losses)
        return weights

    def extra_repr(self) -> str:
        return f"num_losses={self.num_losses}, main={self.main}, monotone={self.monotone}, reduction={self.reduction!r}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, part in self.layers().items():
            destination[prefix + name] = part if keep_vars else part.detach()

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, part in self.layers().items():
            given = state_dict.get(prefix + name)
            if given is None:
                missing_keys.append(prefix + name)
            elif given.shape != part.shape:
                error_msgs.append(
                    f"{prefix}{name} is {tuple(given.shape)} in the checkpoint and {tuple(part.shape)} here"
                )
            else:
                part.copy_(given)
        unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k[len(prefix) :] not in self._shapes]
