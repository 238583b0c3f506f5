"""Combiners: modules that turn each sample's losses into one training loss (the paper's g, sections 3.2 and C.5).

Every combiner keeps its parameters in one flat `phi`: an op that visits one tensor instead of eleven is several times
faster at the batch sizes of training. `layers()` gives the parts by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement, pairwise
from math import comb, isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from auxfast.nn.combiner_base import Combiner, Positive
from auxfast.nn.network_combiner import NetworkCombiner
from auxfast.ops.combiner import combiner
from auxfast.ops.inputs import full_precision, present_losses, reduce_values, without_autocast
from auxfast.ops.network import Activation, CombinerNetwork, Reduction, check_count, layer_sizes

MOST_MONOMIALS = 1_000_000  # a batch of 256 takes 1 GB of them, and the list of them some seconds


class LinearCombiner(Combiner):
    """g(l) = sum_j phi_j l_j.

    Args:
        num_losses, main, monotone, reduction, positive: see `Combiner`. Without `main` the main loss has a learned
            weight like all others; note that scaling all weights then only scales the learning rate.
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
        positive: Positive = "clip",
    ) -> None:
        _check_init_value(init_value, positive)
        super().__init__(num_losses, main, monotone, reduction, positive, {"weight": (num_losses,)})
        self.init_value = init_value
        self.reset_parameters()

    def _reset_weights(self) -> None:
        nn.init.constant_(self.phi, self.init_value)

    def _combine(self, losses: Tensor, mask: Tensor | None, weights: Tensor, reduction: Reduction) -> Tensor:
        losses = present_losses(losses, mask, self.num_losses)
        return reduce_values(_linear(losses, weights, self.main, losses), reduction)


class PolynomialCombiner(Combiner):
    """Linear in all monomials of the losses up to a degree (paper, section C.5).

    Args:
        num_losses, main, monotone, reduction, positive: see `Combiner`.
        degree: the highest degree, at least 1. There are binomial(num_losses + degree, degree) - 1 monomials, which may
            be a million at most.
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
        positive: Positive = "clip",
    ) -> None:
        check_count("num_losses", num_losses)
        check_count("degree", degree)
        _check_init_value(init_value, positive)
        count = comb(num_losses + degree, degree) - 1
        if count > MOST_MONOMIALS:
            raise ValueError(
                f"degree {degree} of {num_losses} losses has {count} monomials, {MOST_MONOMIALS} at most: lower degree"
            )
        by_degree = [list(combinations_with_replacement(range(num_losses), d)) for d in range(1, degree + 1)]
        all_monomials = [monomial for monomials in by_degree for monomial in monomials]
        super().__init__(num_losses, main, monotone, reduction, positive, {"weight": (count,)})
        self.degree, self.monomials, self.init_value = degree, all_monomials, init_value
        self.reset_parameters()

    @torch.no_grad()
    def _reset_weights(self) -> None:
        self.phi.zero_()
        self.phi[: self.num_losses] = self.init_value
        self._write_places()

    def _write_places(self) -> None:
        """Writes, for d from 2 on, the places of the two factors of each monomial of degree d, on the device of `phi`:
        a monomial of degree d - 1, and a loss."""
        ends = [comb(self.num_losses + d, d) - 1 for d in range(self.degree + 1)]
        by_degree = [self.monomials[start:end] for start, end in pairwise(ends)]
        for d, (lower, monomials) in enumerate(pairwise(by_degree), start=1):
            place = {monomial: i for i, monomial in enumerate(lower)}
            places = {"lower": [place[m[:-1]] for m in monomials], "factor": [m[-1] for m in monomials]}
            for name, values in places.items():
                self.register_buffer(f"_{name}_{d}", torch.tensor(values, device=self.phi.device), persistent=False)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._write_places()  # they are lost on the device "meta", and no state_dict holds them

    def _combine(self, losses: Tensor, mask: Tensor | None, weights: Tensor, reduction: Reduction) -> Tensor:
        losses = present_losses(losses, mask, self.num_losses)
        powers = [losses]
        for d in range(1, self.degree):
            lower, factor = self.get_buffer(f"_lower_{d}"), self.get_buffer(f"_factor_{d}")
            powers.append(powers[-1][:, lower] * losses[:, factor])
        return reduce_values(_linear(torch.cat(powers, dim=1), weights, self.main, losses), reduction)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, degree={self.degree}"


class NonlinearCombiner(NetworkCombiner):
    """A monotone network over the losses (paper, section 3.2): softplus layers, and a linear output without bias.

    Runs on fused kernels for up to 8 hidden layers of up to 64 units (`auxfast.ops.combiner`).

    Args:
        num_losses, main, monotone, reduction, positive: see `Combiner`.
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
        positive: Positive = "clip",
    ) -> None:
        network = CombinerNetwork(num_losses, layer_sizes("hidden", hidden), self.activation, bias, main, reduction)
        super().__init__(network, monotone, weight_norm, positive)
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
        positive: Positive = "clip",
    ) -> None:
        super().__init__(
            num_losses,
            hidden,
            main,
            monotone=monotone,
            bias=False,
            weight_norm=weight_norm,
            reduction=reduction,
            positive=positive,
        )


def _check_init_value(value: Any, positive: Positive) -> None:
    if not (isinstance(value, Real) and isfinite(value)):
        raise ValueError(f"init_value must be a finite number, got {value!r}")
    if value < 0 and positive == "exp":
        raise ValueError(f"init_value must be at least 0 with positive='exp', got {value!r}")


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
