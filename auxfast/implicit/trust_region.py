"""Limits on what one outer step may do to the weights of the losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from auxfast.autograd.torch_calls import own_parameter
from auxfast.nn import Combiner
from auxfast.nn.combiner_base import combiners_of

_SMALLEST_SHARE = 0.01  # of the mean weight: a smaller weight may change by as much as this one
_MOST_TRIALS = 30


@contextmanager
def trust_region(
    parameters: Iterable[Tensor], most: float | None, totals: list[float | None] | None
) -> Iterator[dict[Combiner, Tensor]]:
    """Corrects the step that the body takes, by what it does to the mean weights of the losses on the batch of each
    combiner's latest call. Combiners whose calls are not seen, and parameters of no combiner, move as the body moves
    them.

    Args:
        parameters: those that the body moves.
        most: the largest share by which any loss weight may change; a longer step is shortened. None: no limit.
        totals: what the weights of each combiner add up to (see `learned_total`), in the order of their parameters;
            filled in when they have been called, and kept from then on; weights of both signs may shrink below it.
            None: they may add up to anything.

    Returns:
        A dict, which after the body holds the mean weights of each combiner that was limited in the step.
    """
    limits = []
    if most is not None or totals is not None:
        for i, combiner in enumerate(combiners_of(parameters)):
            total = None if totals is None else _first_total(combiner, i, totals)
            if sees(combiner):
                limits.append(_Limits(combiner, most, total))
    reached: dict[Combiner, Tensor] = {}
    yield reached
    for limit in limits:
        reached[limit.combiner] = limit.correct_step()


def sees(combiner: Combiner) -> bool:
    """Whether the combiner has been called, and its weights can be scaled."""
    return combiner.last_call is not None and own_parameter(combiner, "phi") is not None


def whole_batch(combiner: Combiner) -> Tensor:
    """The losses of the combiner's latest call, with 0 for those that a sample lacks: what is asked of the weights must
    not depend on which samples lack which losses, which changes from batch to batch."""
    assert combiner.last_call is not None
    losses, mask = combiner.last_call
    return losses if mask is None else torch.where(mask.bool(), losses, 0.0)


@torch.no_grad()
def learned_total(combiner: Combiner) -> float:
    """What the weights of a sample's losses add up to, without those of a main loss that is added as it is: the largest
    of the batch, since that limits the learning rate of inner training. (Their mean can stay as it is while a network
    comes to weigh the samples of large losses alone, and those without bound.) Of weights of both signs it is their
    sizes that add up: large ones of opposite signs are as large a learning rate, and their sum may be 0. NaN where the
    batch is empty."""
    losses = whole_batch(combiner)
    weights = combiner.loss_weights(losses).double()
    totals = (weights if combiner.monotone else weights.abs()).flatten(1).sum(dim=1)
    return float(totals.max()) - combiner.weight_of_skip(losses) if len(totals) else math.nan


def _first_total(combiner: Combiner, place: int, totals: list[float | None]) -> float | None:
    """The total of the combiner in that place, taken now if it is not known yet."""
    totals += [None] * (place + 1 - len(totals))
    if totals[place] is None and sees(combiner):
        total = learned_total(combiner)
        totals[place] = total if math.isfinite(total) else None
    return totals[place]


class _Limits:
    """The weights of a combiner's losses before a step, and what the step may make of them."""

    def __init__(self, combiner: Combiner, most: float | None, total: float | None) -> None:
        self.combiner, self.most, self.total = combiner, most, total
        self.weights = self._weights()
        self.start = combiner.phi.detach().clone()

    @torch.no_grad()
    def correct_step(self) -> Tensor:
        """Moves `phi` back along its step until the change is small enough. That is nearly proportional to the step's
        length, so that two trials are the rule. Returns the mean weights that are reached."""
        phi, length = self.combiner.phi, 1.0
        step = phi - self.start
        for _ in range(_MOST_TRIALS):
            weights = self._weights()
            change = self._change(weights)
            if self.most is None or change <= self.most:
                return weights
            length *= max(0.1, 0.95 * self.most / change) if change < float("inf") else 0.1  # NaN is not below inf
            phi.copy_(self.start + length * step)
        phi.copy_(self.start)
        return self.weights

    def _change(self, weights: Tensor) -> float:
        """The largest change of a weight, as a share of it; 0 where all weights were 0, which may become anything."""
        before = self.weights.abs()
        if not before.any():
            return 0.0
        scale = before.clamp(min=_SMALLEST_SHARE * before.mean())
        return ((weights - self.weights).abs() / scale).max().item()

    def _weights(self) -> Tensor:
        """The mean weights, after they are made to add up to the total, or of both signs to no more than it."""
        if self.total is not None:
            now = learned_total(self.combiner)
            if self.total > 0 and 0 < now < float("inf") and (self.combiner.monotone or now > self.total):
                self.combiner.scale_(self.total / now)
        assert self.combiner.last_call is not None
        return self.combiner.mean_weights(*self.combiner.last_call)
