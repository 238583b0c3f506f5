"""The base of the combiners that are networks: the fused op behind them, and weight normalisation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from auxfast._callers import stacklevel
from auxfast.autograd.torch_calls import own_parameter
from auxfast.nn.combiner_base import Combiner, Positive, Shapes
from auxfast.ops.inputs import full_precision
from auxfast.ops.network import CombinerNetwork, LossImageNetwork, Network, Reduction


class NetworkCombiner(Combiner):
    """A combiner that is a network. Subclasses say which op runs it and how its weights start, and call
    `reset_parameters` when they are made.

    Args:
        network: the architecture.
        monotone, positive: see `Combiner`.
        weight_norm: train each row of the weights (what leads to one unit or channel) as direction `weight_v` and
            length `weight_g` (Salimans & Kingma 2016), as the paper's code does. A row whose direction is zero counts
            as zero, with finite gradients. With `positive="exp"` both are logarithms.

    Warns of a network that is too large for the kernels.
    """

    op: Callable[[Tensor, Tensor, Any, Tensor | None], Tensor]  # (losses, phi, network, mask)

    def __init__(
        self,
        network: CombinerNetwork | LossImageNetwork,
        monotone: bool,
        weight_norm: bool,
        positive: Positive,
    ) -> None:
        shapes = _raw_shapes(network) if weight_norm else network.shapes
        super().__init__(network.num_losses, network.main, monotone, network.reduction, positive, shapes)
        self.network, self.weight_norm = network, weight_norm
        self._factors = tuple(name for name in shapes if name.endswith("weight_g" if weight_norm else "weight"))
        self._summed = replace(network, reduction="sum")
        if not network.fits_kernels:
            warn(
                f"This combiner runs on the slower PyTorch reference: {network.kernels_take}.",
                RuntimeWarning,
                stacklevel=stacklevel(),
            )

    @torch.no_grad()
    def _reset_weights(self) -> None:
        """Draws the weights anew; biases are 0."""
        layers = self.layers()
        for name, part in layers.items():
            if name.endswith(("weight", "weight_v")):
                self._draw(part)
            elif name.endswith("weight_g"):
                part.copy_(_rows(layers[name[:-1] + "v"], part.shape).norm(dim=-1))
            else:
                part.zero_()

    @abstractmethod
    def _draw(self, weight: Tensor) -> None:
        """Initial values for the weight of one layer, in place."""

    # This is Combiner.forward without the ways over _combine and Module.__getattr__, which take 1.5 us each.
    def forward(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        phi = None if self.weight_norm or self.positive == "exp" else own_parameter(self, "phi")
        if phi is None:  # also if phi is parametrized
            phi = self.network_phi()
        value = self.op(losses, phi, self.network, mask)
        if phi.requires_grad and torch.is_grad_enabled():
            self._remember(losses, mask)
        return value

    def _combine(self, losses: Tensor, mask: Tensor | None, weights: Tensor, reduction: Reduction) -> Tensor:
        network = self.network if reduction == self.reduction else self._summed
        return self.op(losses, weights, network, mask)

    def _weights(self) -> Tensor:
        return self.network_phi()

    def network_phi(self) -> Tensor:
        """The flat weights and biases that the network runs on; `network.split` names them. This is `phi` itself, or
        the weights of which it holds the logarithms; with weight normalisation `weight_g * weight_v / |weight_v|` row
        by row."""
        phi = super()._weights()
        if not self.weight_norm:
            return phi
        parts = []
        phi = full_precision(phi)  # squares leave the range of float16
        for (name, shape), part in zip(self._shapes.items(), phi.split(self._sizes), strict=True):
            if name.endswith("bias"):
                parts.append(part)
            elif name.endswith("weight_v"):
                direction = part
            else:
                rows = _rows(direction, shape)
                square = (rows * rows).sum(-1)
                length = torch.where(square > 0, square, 1.0).sqrt()
                parts.append((rows * (part.view(shape) / length).unsqueeze(-1)).flatten())
        return torch.cat(parts)

    @torch.no_grad()
    def project_(self) -> None:
        """See `Combiner.project_`. A row that clipping leaves without any direction gets all of them at length 0, so
        that it can grow again."""
        super().project_()
        if self._clips and self.weight_norm:
            layers = self.layers()
            for name, length in layers.items():
                if name.endswith("weight_g"):
                    direction = _rows(layers[name[:-1] + "v"], length.shape)
                    lost = ~direction.any(-1)
                    length.masked_fill_(lost, 0.0)
                    direction.masked_fill_(lost.unsqueeze(-1), direction.shape[-1] ** -0.5)


def _rows(weight: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """A view of a weight, flat but for one row for each of its lengths. `lengths`: (rows,), or () for a single row."""
    return weight.view(*lengths, -1)


def _raw_shapes(network: Network) -> Shapes:
    """The parts of `phi` under weight normalisation: each weight's rows as directions, then their lengths."""
    shapes: Shapes = {}
    for name, shape in network.shapes.items():
        if name.endswith("weight"):
            shapes[f"{name}_v"] = shape
            shapes[f"{name}_g"] = shape[:1] if len(shape) > 1 else ()  # the output's weight is one row
        else:
            shapes[name] = shape
    return shapes
