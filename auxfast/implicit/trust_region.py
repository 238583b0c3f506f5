"""Limits on what one outer step may do to the weights of the losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from auxfast.nn import Combiner
from auxfast.nn.combiner_base import combiners_of

_SMALLEST_SHARE = 0.01  # of the mean weight: a smaller weight may change by as much as this one
_MOST_TRIALS = 30


@contextmanager
def trust_region(parameters: Iterable[Tensor], most: float | None, totals: list[float] | None) -> Iterator[None]:
    """Corrects the step that the body takes, by what it does to the mean weights of the losses on the batch of each
    combiner's latest call. Combiners that were not called, and parameters of no combiner, move as the body moves them.

    Args:
        parameters: those that the body moves.
        most: the largest share by which any loss weight may change; a longer step is shortened. None: no limit.
        totals: what the weights of each combiner that was called add up to (see `learned_total`); filled in the first
            time, and kept from then on; weights of both signs may shrink below it. None: they may add up to anything.
    """
    combiners = called(parameters) if most is not None or totals is not None else []
    if totals is not None:
        totals += [learned_total(c) for c in combiners[len(totals) :]]
    limits = [_Limits(c, most, totals[i] if totals else None) for i, c in enumerate(combiners)]
    yield
    for limit in limits:
        limit.correct_step()


def called(parameters: Iterable[Tensor]) -> list[Combiner]:
    """The combiners of these parameters that have been called."""
    return [combiner for combiner in combiners_of(parameters) if combiner.last_call is not None]


def mean_weights(combiner: Combiner) -> Tensor:
    """The mean weight of each loss on the batch of the combiner's latest call, (num_losses,)."""
    assert combiner.last_call is not None
    return combiner.mean_weights(*combiner.last_call)


@torch.no_grad()
def learned_total(combiner: Combiner) -> float:
    """What the weights of a sample's losses add up to, without the 1 of a main loss that is added as it is: the largest
    of the batch, since that limits the learning rate of inner training. (Their mean can stay as it is while a network
    comes to weigh the samples of large losses alone, and those without bound.) Of weights of both signs it is their
    sizes that add up: large ones of opposite signs are as large a learning rate, and their sum may be 0."""
    assert combiner.last_call is not None
    losses, mask = combiner.last_call
    weights = combiner.loss_weights(losses, mask).double()
    totals = (weights if combiner.monotone else weights.abs()).flatten(1).sum(dim=1)
    if combiner.main is not None:
        totals -= 1.0 if mask is None else mask[:, [combiner.main]].flatten(1).any(dim=1).to(totals)
    return float(totals.max()) if len(totals) else 0.0


class _Limits:
    """The weights of a combiner's losses before a step, and what the step may make of them."""

    def __init__(self, combiner: Combiner, most: float | None, total: float | None) -> None:
        self.combiner, self.most, self.total = combiner, most, total
        self.weights = self._weights()
        self.start = combiner.phi.detach().clone()

    @torch.no_grad()
    def correct_step(self) -> None:
        """Moves `phi` back along its step until the change is small enough. That is nearly proportional to the step's
        length, so that two trials are the rule."""
        phi, length = self.combiner.phi, 1.0
        step = phi - self.start
        for _ in range(_MOST_TRIALS):
            change = self._change()
            if self.most is None or change <= self.most:
                return
            length *= max(0.1, 0.95 * self.most / change) if change < float("inf") else 0.1  # NaN is not below inf
            phi.copy_(self.start + length * step)
        phi.copy_(self.start)

    def _change(self) -> float:
        """The largest change of a weight, as a share of it; 0 where all weights were 0, which may become anything."""
        weights, before = self._weights(), self.weights.abs()
        if not before.any():
            return 0.0
        scale = before.clamp(min=_SMALLEST_SHARE * before.mean())
        return ((weights - self.weights).abs() / scale).max().item()

    def _weights(self) -> Tensor:
        """The mean weights, after they are made to add up to the total, or of both signs to no more than it."""
        weights = mean_weights(self.combiner)
        if self.total is not None:
            now = learned_total(self.combiner)
            if self.total > 0 and 0 < now < float("inf") and (self.combiner.monotone or now > self.total):
                self.combiner.scale_(self.total / now)
                return mean_weights(self.combiner)
        return weights
