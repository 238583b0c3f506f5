"""Combiners: modules that turn each sample's losses into one training loss (the paper's g, sections 3.2 and C.5).

Every combiner keeps its parameters in one flat `phi`: an op that visits one tensor instead of eleven is several times
faster at the batch sizes of training. `layers()` gives the parts by name, and they are what `state_dict` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any, get_args

import torch
from torch import Tensor, nn

from auxfast.ops.combiner import (
    Activation,
    CombinerNetwork,
    Reduction,
    combiner,
    full_precision,
    present_losses,
    reduce_values,
)


class Combiner(nn.Module):
    """What all combiners share; subclasses say how `phi` is laid out and what the combined value of a sample is.

    Args:
        num_losses: columns of the losses.
        main: column of the main loss, added to the combiner's output as it is (the paper's l_main + g); None for no
            such skip.
        monotone: keep the output non-decreasing in every loss: `project_()` then clips the weights to >= 0.
        reduction: "mean" or "sum" over the batch, or "none".
        shapes: name and shape of every part of `phi`.

    Raises:
        ValueError: for anything outside of that.
    """

    phi: nn.Parameter  # (number of parameters,)

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

        `mask` (batch, num_losses) is 0 where a sample does not have a loss: that entry counts as 0 and its gradient
        is 0, whatever it holds. float16 and bfloat16 losses are computed in float32. Twice differentiable in the
        losses and in `phi`.
        """
        return self._combine(losses, mask, self.reduction)

    def _combine(self, losses: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
        raise NotImplementedError

    def layers(self) -> dict[str, Tensor]:
        """The parts of `phi` by name, as views: writing to them (in `torch.no_grad()`) writes to `phi`."""
        parts, at = {}, 0
        for (name, shape), size in zip(self._shapes.items(), self._sizes, strict=True):
            parts[name] = self.phi.narrow(0, at, size).view(shape)  # not split(), whose views may not be written to
            at += size
        return parts

    @torch.no_grad()
    def project_(self) -> None:
        """Back into the monotone set, by clipping weights to >= 0 (paper, section 3.2); biases are free. Call it after
        every outer step. Does nothing if not `monotone`."""
        if self.monotone:
            for name, part in self.layers().items():
                if not name.endswith("bias"):
                    part.clamp_(min=0)

    def loss_weights(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """The adaptive weights (batch, num_losses): the derivative of each sample's combined value in its losses.

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


class LinearCombiner(Combiner):
    """g(l) = sum_j phi_j l_j.

    Args:
        num_losses, main, monotone, reduction: see `Combiner`. Without `main` the main loss has a learned weight like
            all others; note that scaling all weights then only scales the learning rate.
        init_value: every weight at the start.
    """

    def __init__(
        self,
        num_losses: int,
        main: int | None = None,
        *,
        init_value: float = 1.0,
        monotone: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(num_losses, main, monotone, reduction, {"weight": (num_losses,)})
        nn.init.constant_(self.phi, init_value)

    def _combine(self, losses: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
        losses = present_losses(losses, mask, self.num_losses)
        return reduce_values(_linear(losses, self.phi, self.main, losses), reduction)


class PolynomialCombiner(Combiner):
    """Linear in all monomials of the losses up to a degree (paper, section C.5).

    Args:
        num_losses, main, monotone, reduction: see `Combiner`.
        degree: the highest degree, at least 1. There are binomial(num_losses + degree, degree) - 1 monomials.
        init_value: weights of the losses themselves at the start; products start at 0.

    `monomials` lists, in the order of `phi`, the columns that each monomial multiplies: (0,), (1,), (0, 0), (0, 1)...
    """

    def __init__(
        self,
        num_losses: int,
        degree: int = 2,
        main: int | None = 0,
        *,
        init_value: float = 1.0,
        monotone: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        if degree < 1:
            raise ValueError(f"degree must be at least 1, got {degree}")
        by_degree = [list(combinations_with_replacement(range(num_losses), d)) for d in range(1, degree + 1)]
        all_monomials = [monomial for monomials in by_degree for monomial in monomials]
        super().__init__(num_losses, main, monotone, reduction, {"weight": (len(all_monomials),)})
        self.degree, self.monomials = degree, all_monomials
        # A monomial of degree d is one of degree d - 1 times a loss: their places, for each degree from 2 on.
        for d in range(1, degree):
            place = {monomial: i for i, monomial in enumerate(by_degree[d - 1])}
            self.register_buffer(f"_lower_{d}", torch.tensor([place[m[:-1]] for m in by_degree[d]]), persistent=False)
            self.register_buffer(f"_factor_{d}", torch.tensor([m[-1] for m in by_degree[d]]), persistent=False)
        with torch.no_grad():
            self.phi[:num_losses] = init_value

    def _combine(self, losses: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
        losses = present_losses(losses, mask, self.num_losses)
        powers = [losses]
        for d in range(1, self.degree):
            lower, factor = self.get_buffer(f"_lower_{d}"), self.get_buffer(f"_factor_{d}")
            powers.append(powers[-1][:, lower] * losses[:, factor])
        return reduce_values(_linear(torch.cat(powers, dim=1), self.phi, self.main, losses), reduction)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, degree={self.degree}"


class NonlinearCombiner(Combiner):
    """A monotone network over the losses (paper, section 3.2): softplus layers, and a linear output without bias.

    Runs on fused kernels for up to 8 hidden layers of up to 64 units (`auxfast.ops.combiner`).

    Args:
        num_losses, main, monotone, reduction: see `Combiner`.
        hidden: width of each hidden layer, at least one.
        bias: whether hidden layers have biases; they start at 0.
        weight_norm: train each row of the weights as direction `weight_v` and length `weight_g` (Salimans & Kingma
            2016), as the paper's code does. A row whose direction is zero counts as zero, with finite gradients.

    Weights start uniform in [0, 2 / fan_in]: each unit begins near the mean of its inputs, whatever the depth.
    """

    activation: Activation = "softplus"

    def __init__(
        self,
        num_losses: int,
        hidden: Sequence[int] = (10, 10, 10, 10, 10),
        main: int | None = 0,
        *,
        monotone: bool = True,
        bias: bool = True,
        weight_norm: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        network = CombinerNetwork(num_losses, tuple(hidden), self.activation, bias, main, reduction)
        super().__init__(num_losses, main, monotone, reduction, _raw_shapes(network) if weight_norm else network.shapes)
        self.network, self.weight_norm = network, weight_norm
        self._summed = CombinerNetwork(num_losses, tuple(hidden), self.activation, bias, main, "sum")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        layers = self.layers()
        for name, part in layers.items():
            if name.endswith(("weight", "weight_v")):
                part.uniform_(0, 2 / part.shape[-1])
            elif name.endswith("weight_g"):
                part.copy_(layers[name[:-1] + "v"].norm(dim=-1))
            else:
                part.zero_()

    def _combine(self, losses: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
        network = self.network if reduction == self.reduction else self._summed
        return combiner(losses, self._normalized() if self.weight_norm else self.phi, network, mask)

    def _normalized(self) -> Tensor:
        """The network's phi: weight_g * weight_v / |weight_v|, row by row."""
        parts = []
        for (name, shape), part in zip(self._shapes.items(), self.phi.split(self._sizes), strict=True):
            if name.endswith("bias"):
                parts.append(part)
            elif name.endswith("weight_v"):
                direction = part.view(shape)
            else:
                square = (direction * direction).sum(-1)
                length = torch.where(square > 0, square, 1.0).sqrt()
                parts.append((direction * (part.view(shape) / length).unsqueeze(-1)).flatten())
        return torch.cat(parts)

    @torch.no_grad()
    def project_(self) -> None:
        """As `Combiner.project_`. A row that clipping leaves without any direction gets all of them at length 0, so
        that it can grow again."""
        super().project_()
        if self.monotone and self.weight_norm:
            layers = self.layers()
            for name, length in layers.items():
                if name.endswith("weight_g"):
                    direction = layers[name[:-1] + "v"]
                    lost = ~direction.any(-1)
                    length.masked_fill_(lost, 0.0)
                    direction.masked_fill_(lost.unsqueeze(-1), direction.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        network = self.network
        return f"{super().extra_repr()}, hidden={network.hidden}, bias={network.bias}, weight_norm={self.weight_norm}"


class DeepLinearCombiner(NonlinearCombiner):
    """A linear combiner written as a product of layers (paper, section 4.1): the same functions as `LinearCombiner`,
    another path to them under gradient descent. No biases. Arguments as `NonlinearCombiner`'s."""

    activation: Activation = "identity"

    def __init__(
        self,
        num_losses: int,
        hidden: Sequence[int] = (10, 10, 10, 10, 10),
        main: int | None = 0,
        *,
        monotone: bool = True,
        weight_norm: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            num_losses, hidden, main, monotone=monotone, bias=False, weight_norm=weight_norm, reduction=reduction
        )


def _raw_shapes(network: CombinerNetwork) -> dict[str, tuple[int, ...]]:
    """The parts of phi under weight normalisation: each weight's rows as direction, then their lengths."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in network.shapes.items():
        if name.endswith("weight"):
            shapes[f"{name}_v"], shapes[f"{name}_g"] = shape, shape[:-1]
        else:
            shapes[name] = shape
    return shapes


def _linear(features: Tensor, weight: Tensor, main: int | None, losses: Tensor) -> Tensor:
    """(batch,): features @ weight, and the main loss."""
    weight = full_precision(weight)
    if features.dtype != weight.dtype:
        raise TypeError(
            f"losses are {features.dtype} and phi is {weight.dtype}: convert one, e.g. combiner.to({features.dtype})"
        )
    values = features @ weight
    return values if main is None else values + losses[:, main]
