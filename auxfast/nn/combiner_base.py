"""The base of all combiners: the flat `phi` and its named parts, projection, adaptive weights, checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from auxfast.autograd.torch_calls import own_parameter
from auxfast.autograd.transforms import in_transform
from auxfast.ops.inputs import full_precision, not_a_tensor
from auxfast.ops.network import Reduction, check_losses

Positive = Literal["clip", "exp"]
Shapes = dict[str, tuple[int, ...]]

FAR_LOGARITHM = 20.0  # of an output's largest weight, 5e8 or 2e-9: the range of float32 ends at 88
SMALLEST_SHARE = 1e-3  # of a part's mean weight: what a 0 becomes where phi holds logarithms

_UNKNOWN = (
    "{} holds negative weights: if it was saved from a combiner of positive='exp' (the state_dict has lost the "
    "metadata that would tell), call positive_('exp') before loading it; otherwise project_() before saving"
)

_is_compiling = torch.compiler.is_compiling  # looked up once: combiners ask at every call

_ALL: WeakSet[Combiner] = WeakSet()  # all there are: a parameter does not tell whose it is
_ALL_LOCK = Lock()


class Combiner(nn.Module, ABC):
    """Base of all combiners; subclasses say how `phi` is laid out, how it starts (and let it, by `reset_parameters`),
    and what the combined value of a sample is.

    Its state_dict holds `phi` under its own name, as `torch.func.functional_call` and checkpoints of other tools want
    it; `layers()` gives the parts by name. A state_dict by layers, as earlier versions saved it, loads too.

    Args:
        num_losses: columns of the losses, or channels of the loss image.
        main: column (channel) of the main loss, added to the combiner's output as it is (the paper's l_main + g); None
            for no such skip.
        monotone: keep the output non-decreasing in every loss, by weights that are never negative.
        reduction: "mean" or "sum" over the batch, or "none".
        positive: how weights are kept from being negative. "clip": `phi` holds them, and `project_()` clips them to
            >= 0, as in the paper. A weight that was clipped in a network of layers may never come back, since the
            gradients of its neighbours vanish with it. "exp": `phi` holds their logarithms (and biases as they are), so
            that steps are relative and no weight reaches 0. See `positive_` for weights that start at 0.
        shapes: name and shape of every part of `phi`.

    Attributes:
        last_call: losses and mask of the latest call in which `phi` required a gradient, detached; None before. They
            are kept alive, and no copy, pickle or state_dict has them.

    Raises:
        TypeError: `num_losses` or `main` is no int.
        ValueError: an argument is outside its range; or `positive="exp"` without `monotone`, where weights may be
            negative.
    """

    phi: nn.Parameter  # (number of parameters,)
    positive: Positive = "clip"  # also of a pickle from before there was another
    last_call: tuple[Tensor, Tensor | None] | None = None
    # The parts of `phi` that scale the combined value, which is proportional to the last of them.
    _factors: tuple[str, ...] = ("weight",)
    _biases: Tensor | None  # 1 where phi is a bias, if there are any and phi holds logarithms
    __call__: Callable[..., Tensor]  # nn.Module's is typed Any; the arguments are those of `forward`

    def __init__(
        self,
        num_losses: int,
        main: int | None,
        monotone: bool,
        reduction: Reduction,
        positive: Positive,
        shapes: Shapes,
    ) -> None:
        check_losses(num_losses, main)
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
        super().__init__()
        self.num_losses, self.main, self.monotone, self.reduction = num_losses, main, monotone, reduction
        self._shapes = shapes
        self._sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self._check_positive(positive)
        self.positive = positive
        self.phi = nn.Parameter(torch.zeros(sum(self._sizes)))
        self.register_buffer("_biases", None, persistent=False)
        nn.Module.register_state_dict_post_hook(self, _note_layers)
        self._enlist()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "last_call"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self._enlist()

    def _enlist(self) -> None:
        with _ALL_LOCK:
            _ALL.add(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial values of `phi`, anew, as after `to_empty()`."""
        self._reset_weights()
        self._write_biases()
        if self.positive == "exp":
            self.phi.copy_(self._converted(self.phi, "exp"))

    def _write_biases(self) -> None:
        """Writes `_biases`, on the device of `phi`. It is of a dtype that `torch.optim.swa_utils` can average."""
        is_bias = [name.endswith("bias") for name in self._shapes]
        if self.positive == "clip" or not any(is_bias):
            self._biases = None
            return
        marks = zip(self._sizes, is_bias, strict=True)
        device = self.phi.device
        self._biases = torch.cat([torch.full((n,), mark, dtype=torch.uint8, device=device) for n, mark in marks])

    @abstractmethod
    def _reset_weights(self) -> None:
        """Writes the initial weights into `phi`, as "clip" has them."""

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
        weights = self._weights()
        value = self._combine(losses, mask, weights, self.reduction)
        if weights.requires_grad and torch.is_grad_enabled():
            self._remember(losses, mask)
        return value

    def _remember(self, losses: Tensor, mask: Tensor | None) -> None:
        """Sets `last_call`, but for tensors that mean nothing outside of this call."""
        if not (_is_compiling() or in_transform()):
            # Module.__setattr__ would take 1 us more.
            self.__dict__["last_call"] = losses.detach(), None if mask is None else mask.detach()

    @abstractmethod
    def _combine(self, losses: Tensor, mask: Tensor | None, weights: Tensor, reduction: Reduction) -> Tensor:
        """The combined value of every sample, reduced. weights: see `_weights`."""

    def _weights(self) -> Tensor:
        """The flat weights and biases that `phi` stands for."""
        if self.positive == "clip":
            return self.phi
        phi, biases = full_precision(self.phi), self._biases
        if biases is None:
            return phi.exp()
        is_bias = biases.bool()
        return torch.where(is_bias, phi, phi.masked_fill(is_bias, 0.0).exp())  # the exponential of a bias may overflow

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Multiplies the combined value, but for the main loss that is added to it as it is, by `factor`.

        Raises:
            ValueError: `factor` is not above 0 and finite.
            RuntimeError: `phi` is parametrized, so that nothing can be written to it.
        """
        if not 0 < factor < math.inf:
            raise ValueError(f"factor must be above 0 and finite, got {factor!r}")
        self._check_writable()
        last = self._part(self._factors[-1])
        if self.positive == "clip":
            last *= factor
            return
        # A step that moves all layers alike is taken back by the last alone, which leaves the range of its dtype in the
        # end. Far from 1 the layers share the factor, which scales softplus units as well, as they are linear by then.
        far = len(self._factors) > 1 and abs(last.max().item()) > FAR_LOGARITHM
        parts = [self._part(name) for name in self._factors] if far else [last]
        for part in parts:
            part += math.log(factor) / len(parts)

    def _part(self, name: str) -> Tensor:
        """One of `layers()`, flat: all of them take 80 us."""
        place = [*self._shapes].index(name)
        return self.phi.narrow(0, sum(self._sizes[:place]), self._sizes[place])

    def weight_of_skip(self, losses: Tensor) -> float:
        """The sum of what `loss_weights` of a sample without mask hold for a main loss that is added as it is."""
        return float(self.main is not None)

    def layers(self) -> dict[str, Tensor]:
        """The parts of `phi` by name, as views: writing to them (in `torch.no_grad()`) writes to `phi`. With
        `positive="exp"` all but biases are logarithms."""
        parts, at = {}, 0
        for (name, shape), size in zip(self._shapes.items(), self._sizes, strict=True):
            parts[name] = self.phi.narrow(0, at, size).view(shape)  # not split(), whose views may not be written to
            at += size
        return parts

    @torch.no_grad()
    def project_(self) -> None:
        """Projects `phi` onto the monotone set, by clipping weights to >= 0 (paper, section 3.2); biases are free. Call
        it after every outer step. Does nothing if not `monotone`, or with `positive="exp"`."""
        if self._clips:
            for name, part in self.layers().items():
                if not name.endswith("bias"):
                    part.clamp_(min=0)

    @property
    def _clips(self) -> bool:
        return self.monotone and self.positive == "clip"

    @torch.no_grad()
    def positive_(self, positive: Positive) -> None:
        """Converts `phi` so that it holds the weights ("clip") or their logarithms ("exp"). The combined values stay,
        to rounding, but for weights that are 0 or less: to become logarithms they are set to a thousandth of the mean
        weight of their part of `phi` (to 0.001 if there is no other weight), which adds a thousandth to the part's
        sum at most. An optimizer of `phi` should be made anew: its momentum is of the other kind.

        Raises:
            ValueError: `positive` is neither; or "exp" without `monotone`.
            RuntimeError: `phi` is parametrized, so that nothing can be written to it.
        """
        self._check_positive(positive)
        if positive != self.positive:
            self._check_writable()
            self.phi.copy_(self._converted(self.phi, positive))
            self.positive = positive
            self._write_biases()

    def _check_writable(self) -> None:
        if own_parameter(self, "phi") is None:
            raise RuntimeError("phi is parametrized, and cannot be written to: remove its parametrization first")

    def _check_positive(self, positive: Positive) -> None:
        if positive not in get_args(Positive):
            raise ValueError(f"positive must be one of {', '.join(get_args(Positive))}, got {positive!r}")
        if positive == "exp" and not self.monotone:
            raise ValueError("positive='exp' needs monotone=True: its weights are never negative")

    def _converted(self, phi: Tensor, positive: Positive) -> Tensor:
        """A `phi` of weights or their logarithms, as the other."""
        return self._map(torch.exp if positive == "clip" else _logarithms, full_precision(phi)).to(phi.dtype)

    def _map(self, function: Callable[[Tensor], Tensor], phi: Tensor) -> Tensor:
        """`function` of every part of `phi` but biases."""
        parts = zip(self._shapes, phi.split(self._sizes), strict=True)
        mapped = [part if name.endswith("bias") else function(part) for name, part in parts]
        return torch.cat(mapped) if len(mapped) > 1 else mapped[0]

    def loss_weights(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """The adaptive weights, of the shape of `losses`: the derivative of each sample's combined value in its losses.

        These are the paper's alpha (section 3.2), and 1 more in the main loss's column: what each sample's losses are
        multiplied with, to first order. They do not contain the 1 / batch of a mean. Detached.
        """
        if not isinstance(losses, Tensor):
            raise not_a_tensor(losses)
        with torch.no_grad():
            weights = self._weights().detach()
        with torch.enable_grad():
            losses = losses.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._combine(losses, mask, weights, "sum"), losses)
        return gradient

    def mean_weights(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """The adaptive weight of each loss, (num_losses,): the mean of `loss_weights` over the samples that have it. Of
        images, their pixels' sum for an image. 0 for a loss that no sample has."""
        sums, pixels = _sums(self.loss_weights(losses, mask)), math.prod(losses.shape[2:])
        counts = max(len(losses) * pixels, 1) if mask is None else _sums(mask.to(sums.dtype)).clamp(min=1)
        return sums * pixels / counts

    def extra_repr(self) -> str:
        text = f"num_losses={self.num_losses}, main={self.main}, monotone={self.monotone}, reduction={self.reduction!r}"
        return text if self.positive == "clip" else f"{text}, positive={self.positive!r}"

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
        by_layers = key not in state_dict
        if by_layers:
            faults = self._join_layers(state_dict, prefix, missing_keys)
        else:
            saved: Shapes = local_metadata.get("layers", self._shapes)
            faults = _differences(saved, self._shapes, f"{key}: ")
            faults = faults or _faults(key, state_dict[key], self.phi.shape, _listed(self._shapes))
        faults = faults or self._convert_saved(key, state_dict, local_metadata, by_layers)
        error_msgs += faults
        if not faults:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        self._write_biases()  # they are lost on the device "meta", and no state_dict holds them

    def _convert_saved(
        self, key: str, state_dict: dict[str, Any], local_metadata: dict[str, Any], by_layers: bool
    ) -> list[str]:
        """Converts a saved `phi` to what it holds here, and returns what is wrong with it. Metadata without an entry
        `positive`, and layers by name, are of an earlier version, which had "clip" alone; no metadata at all do not
        tell."""
        known = local_metadata or by_layers
        saved = local_metadata.get("positive", "clip" if known else self.positive)
        if key not in state_dict or (saved == self.positive and (known or not self._clips)):
            return []
        phi = state_dict[key].detach()
        negative = not phi.is_meta and bool((self._map(torch.relu, phi) != phi).any())
        if saved == self.positive:
            return [_UNKNOWN.format(key)] if negative else []
        if saved == "clip" and negative:
            return [f"{key} holds negative weights, without logarithms: project_() before saving, or positive='clip'"]
        state_dict[key] = self._converted(phi, self.positive)
        return []

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
    """The combiners that `project_` has to keep monotone whose `phi` is among `parameters`, and in none of the modules
    `projected`. There are none if something in `projected` is no module, since that does not tell what it projects."""
    modules = [*projected]
    if not all(isinstance(module, nn.Module) for module in modules):
        return []
    done = {id(parameter) for module in modules for parameter in module.parameters()}
    return [c for c in combiners_of(p for p in parameters if id(p) not in done) if c._clips]


def combiners_of(parameters: Iterable[Tensor]) -> list[Combiner]:
    """The combiners whose `phi` is among `parameters`, in the order of these."""
    place = {id(parameter): i for i, parameter in enumerate(parameters)}
    with _ALL_LOCK:
        combiners = [*_ALL]
    found = [(place[id(phi)], c) for c in combiners for phi in c.parameters() if id(phi) in place]
    return [combiner for _, combiner in sorted(found, key=lambda pair: pair[0])]


def _note_layers(module: Combiner, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Leaves in the state_dict's metadata what `phi` means: equal numbers of values can be other networks, and be
    weights or their logarithms."""
    local_metadata["layers"] = dict(module._shapes)
    local_metadata["positive"] = module.positive


def _sums(of_losses: Tensor) -> Tensor:
    """(num_losses,): sums over samples and pixels."""
    return of_losses.transpose(0, 1).flatten(1).sum(dim=1)


def _logarithms(weights: Tensor) -> Tensor:
    """See `Combiner.positive_`."""
    smallest = SMALLEST_SHARE * weights.clamp(min=0).mean()
    smallest = torch.where(smallest > 0, smallest, SMALLEST_SHARE)
    return torch.where(weights > 0, weights, smallest).log()


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
