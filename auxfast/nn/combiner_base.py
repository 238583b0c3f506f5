"""The base of all combiners: the flat `phi` and its named parts, projection, adaptive weights, checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from auxfast.ops.inputs import not_a_tensor
from auxfast.ops.network import Reduction, check_losses

Shapes = dict[str, tuple[int, ...]]

_MONOTONE: WeakSet[Combiner] = WeakSet()  # all there are: a parameter does not tell whose it is
_MONOTONE_LOCK = Lock()


class Combiner(nn.Module, ABC):
    """Base of all combiners; subclasses say how `phi` is laid out, how it starts (and let it, by `reset_parameters`),
    and what the combined value of a sample is.

    Its state_dict holds `phi` under its own name, as `torch.func.functional_call` and checkpoints of other tools want
    it; `layers()` gives the parts by name. A state_dict by layers, as earlier versions saved it, loads too.

    Args:
        num_losses: columns of the losses, or channels of the loss image.
        main: column (channel) of the main loss, added to the combiner's output as it is (the paper's l_main + g); None
            for no such skip.
        monotone: keep the output non-decreasing in every loss: `project_()` then clips the weights to >= 0.
        reduction: "mean" or "sum" over the batch, or "none".
        shapes: name and shape of every part of `phi`.

    Raises:
        TypeError: `num_losses` or `main` is no int.
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
        shapes: Shapes,
    ) -> None:
        check_losses(num_losses, main)
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
        super().__init__()
        self.num_losses, self.main, self.monotone, self.reduction = num_losses, main, monotone, reduction
        self._shapes = shapes
        self._sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.phi = nn.Parameter(torch.zeros(sum(self._sizes)))
        nn.Module.register_state_dict_post_hook(self, _note_layers)
        self._enlist()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self._enlist()

    def _enlist(self) -> None:
        if self.monotone:
            with _MONOTONE_LOCK:
                _MONOTONE.add(self)

    @abstractmethod
    def reset_parameters(self) -> None:
        """The initial values of `phi`, anew, as after `to_empty()`."""

    def forward(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """The combined loss of `losses` (batch, num_losses): a scalar, or (batch,) if the reduction is "none".

        `mask`, of the shape of `losses`, is 0 where a sample does not have a loss: that entry counts as 0 and its
        gradient is 0, whatever it holds. float16 and bfloat16 losses are computed in float32. Twice differentiable in
        the losses and in `phi`.

        Raises:
            TypeError: `losses` or `mask` is no dense tensor, or `losses` is not floating point or of another dtype than
                `phi`.
            ValueError: a shape is wrong, or `mask` holds something else than 0 and 1 (found on the CPU alone).
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
        if not isinstance(losses, Tensor):
            raise not_a_tensor(losses)
        with torch.enable_grad():
            losses = losses.detach().requires_grad_()
            (weights,) = torch.autograd.grad(self._combine(losses, mask, "sum"), losses)
        return weights

    def extra_repr(self) -> str:
        return f"num_losses={self.num_losses}, main={self.main}, monotone={self.monotone}, reduction={self.reduction!r}"

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
        key = f"{prefix}phi"
        if key not in state_dict:
            faults = self._join_layers(state_dict, prefix, missing_keys)
        else:
            saved: Shapes = local_metadata.get("layers", self._shapes)
            faults = _differences(saved, self._shapes, f"{key}: ")
            faults = faults or _faults(key, state_dict[key], self.phi.shape, _listed(self._shapes))
        error_msgs += faults
        if not faults:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _join_layers(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> list[str]:
        """Puts `phi` into a state_dict that holds layers by name, in their place, and returns what is wrong with them.
        Layers that are missing stay as they are."""
        own = self.layers()
        given = {name: state_dict.pop(prefix + name) for name in own if prefix + name in state_dict}
        faults = [fault for name in given for fault in _faults(prefix + name, given[name], own[name].shape)]
        missing = [prefix + name for name in own if name not in given]
        if given and not faults:
            missing_keys += missing
            if not (missing and self.phi.is_meta):
                like = next(iter(given.values()))
                parts = [given[name] if name in given else part.to(like) for name, part in own.items()]
                state_dict[f"{prefix}phi"] = torch.cat([part.detach().flatten() for part in parts])
        return faults


def unprojected(parameters: Iterable[Tensor], projected: Iterable[Any]) -> list[Combiner]:
    """The monotone combiners whose `phi` is among `parameters`, and in none of the modules `projected`. There are none
    if something in `projected` is no module, since that does not tell what it projects."""
    modules = [*projected]
    if not all(isinstance(module, nn.Module) for module in modules):
        return []
    done = {id(parameter) for module in modules for parameter in module.parameters()}
    learned = {id(parameter) for parameter in parameters} - done
    with _MONOTONE_LOCK:
        combiners = [*_MONOTONE]
    return [combiner for combiner in combiners if any(id(phi) in learned for phi in combiner.parameters())]


def _note_layers(module: Combiner, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Leaves the shapes of the layers in the state_dict's metadata: equal numbers of values can be other networks."""
    local_metadata["layers"] = dict(module._shapes)


def _differences(saved: Shapes, own: Shapes, where: str) -> list[str]:
    """Parts of `phi` that have other shapes in the checkpoint, or are on one side only."""
    return [
        f"{where}{name} is {_shape(saved, name)} in the checkpoint and {_shape(own, name)} here"
        for name in {**saved, **own}
        if _shape(saved, name) != _shape(own, name)
    ]


def _faults(key: str, given: Any, shape: torch.Size, layers: str = "") -> list[str]:
    """What is wrong with an entry of a checkpoint: one message, or none."""
    if not isinstance(given, Tensor):
        return [f"{key} is a {type(given).__name__} in the checkpoint, must be a tensor"]
    if given.shape != shape:
        return [f"{key} is {tuple(given.shape)} in the checkpoint and {tuple(shape)} here{layers}"]
    if not given.is_meta and not given.isfinite().all():
        return [f"{key} holds NaN or inf in the checkpoint: load one from before training diverged"]
    return []


def _shape(shapes: Shapes, name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "absent"


def _listed(shapes: Shapes) -> str:
    return f" ({', '.join(f'{name} {_shape(shapes, name)}' for name in shapes)})"
