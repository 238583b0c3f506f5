"""Combiners: modules that turn each sample's losses into one training loss (the paper's g, sections 3.2 and C.5).

Every combiner keeps its parameters in one flat `phi`: an op that visits one tensor instead of eleven is several times
faster at the batch sizes of training. `layers()` gives the parts by name, and they are what `state_dict` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from auxfast.nn.combiner_base import Combiner
from auxfast.nn.network_combiner import NetworkCombiner
from auxfast.ops.combiner import combiner
from auxfast.ops.inputs import full_precision, present_losses, reduce_values, without_autocast
from auxfast.ops.network import Activation, CombinerNetwork, Reduction


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
        # A monomial of degree d is one of degree d - 1 times a loss. These are the places of both, for d from 2 on.
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


class NonlinearCombiner(NetworkCombiner):
    """A monotone network over the losses (paper, section 3.2): softplus layers, and a linear output without bias.

    Runs on fused kernels for up to 8 hidden layers of up to 64 units (`auxfast.ops.combiner`).

    Args:
        num_losses, main, monotone, reduction: see `Combiner`.
        hidden: width of each hidden layer, at least one.
        bias: whether hidden layers have biases; they start at 0.
        weight_norm: train each row of the weights as direction and length (see `NetworkCombiner`).

    Weights start uniform in [0, 2 / fan_in]: each unit begins near the mean of its inputs, whatever the depth.
    """

    op = staticmethod(combiner)
    network: CombinerNetwork
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
        super().__init__(network, monotone, weight_norm)
        self.reset_parameters()

    def _draw(self, weight: Tensor) -> None:
        weight.uniform_(0, 2 / weight.shape[-1])

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


def _linear(features: Tensor, weight: Tensor, main: int | None, losses: Tensor) -> Tensor:
    """(batch,): features @ weight, and the main loss."""
    weight = full_precision(weight)
    if features.dtype != weight.dtype:
        raise TypeError(
            f"losses are {features.dtype} and phi is {weight.dtype}: convert one, e.g. combiner.to({features.dtype})"
        )
    with without_autocast(losses):
        values = features @ weight
    return values if main is None else values + losses[:, main]
