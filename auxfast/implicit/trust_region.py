"""Limits on what one outer step may do to the weights of the losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from auxfast.autograd.torch_calls import own_parameter
from auxfast.implicit.ranks import Ranks
from auxfast.nn import Combiner
from auxfast.nn.combiner_base import combiners_of

_SMALLEST_SHARE = 0.01  # of the mean weight: a smaller weight may change by as much as this one
_MOST_TRIALS = 30


@contextmanager
def trust_region(
    parameters: Iterable[Tensor],
    most: float | None,
    totals: list[float | None] | None,
    ranks: Ranks | None = None,
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
        ranks: those that have batches of their own, and make the same step.

    Returns:
        A dict, which after the body holds the mean weights of each combiner that was limited in the step.
    """
    limits = []
    if most is not None or totals is not None:
        for i, combiner in enumerate(combiners_of(parameters)):
            is_seen = sees(combiner, ranks)
            total = None if totals is None else _first_total(combiner, i, totals, is_seen, ranks)
            if is_seen:
                limits.append(_Limits(combiner, most, total, ranks))
    reached: dict[Combiner, Tensor] = {}
    yield reached
    for limit in limits:
        reached[limit.combiner] = limit.correct_step()


def sees(combiner: Combiner, ranks: Ranks | None = None) -> bool:
    """Whether the combiner has been called, by some rank, and its weights can be scaled."""
    own = combiner.last_call is not None and own_parameter(combiner, "phi") is not None
    return own if ranks is None else ranks.any_rank(own)


def mean_weights(combiner: Combiner, ranks: Ranks | None, whole: bool = False) -> Tensor:
    """The mean weight of each loss, (num_losses,), on the batch of the combiner's latest call, or on those of all
    ranks; see `Combiner.mean_weights`.

    Args:
        whole: see `whole_batch`.
    """
    losses, mask = combiner.last_call or (None, None)
    if losses is not None and whole:
        losses, mask = whole_batch(combiner), None
    if ranks is None:
        assert losses is not None
        return combiner.mean_weights(losses, mask)
    sums = counts = combiner.phi.new_zeros(combiner.num_losses, dtype=torch.float64)
    if losses is not None:
        pixels = math.prod(losses.shape[2:])
        counts = counts + len(losses) if mask is None else mask.double().transpose(0, 1).flatten(1).sum(1) / pixels
        sums = combiner.mean_weights(losses, mask) * counts
    numbers = counts.new_tensor(ranks.gather([*sums.tolist(), *counts.tolist()])).sum(0)
    sums, counts = numbers.view(2, -1).unbind()
    return torch.where(counts > 0, sums / counts, 0).to(combiner.phi.dtype)


def whole_batch(combiner: Combiner) -> Tensor:
    """The losses of the combiner's latest call, with 0 for those that a sample lacks: what is asked of the weights must
    not depend on which samples lack which losses, which changes from batch to batch."""
    assert combiner.last_call is not None
    losses, mask = combiner.last_call
    return losses if mask is None else torch.where(mask.bool(), losses, 0.0)


@torch.no_grad()
def learned_total(combiner: Combiner, ranks: Ranks | None = None) -> float:
    """What the weights of a sample's losses add up to, without those of a main loss that is added as it is: the largest
    of the batch, since that limits the learning rate of inner training. (Their mean can stay as it is while a network
    comes to weigh the samples of large losses alone, and those without bound.) Of weights of both signs it is their
    sizes that add up: large ones of opposite signs are as large a learning rate, and their sum may be 0. NaN where the
    batch is empty. Over ranks it is the largest of theirs."""
    if ranks is not None:
        own = -math.inf if combiner.last_call is None or not len(combiner.last_call[0]) else learned_total(combiner)
        found = [row[0] for row in ranks.gather([own])]
        return math.nan if any(map(math.isnan, found)) or max(found) == -math.inf else max(found)
    losses = whole_batch(combiner)
    weights = combiner.loss_weights(losses).double()
    totals = (weights if combiner.monotone else weights.abs()).flatten(1).sum(dim=1)
    return float(totals.max()) - combiner.weight_of_skip(losses) if len(totals) else math.nan


def _first_total(
    combiner: Combiner, place: int, totals: list[float | None], is_seen: bool, ranks: Ranks | None
) -> float | None:
    """The total of the combiner in that place, taken now if it is not known yet."""
    totals += [None] * (place + 1 - len(totals))
    if totals[place] is None and is_seen:
        total = learned_total(combiner, ranks)
        totals[place] = total if math.isfinite(total) else None
    return totals[place]


class _Limits:
    """The weights of a combiner's losses before a step, and what the step may make of them."""

    def __init__(self, combiner: Combiner, most: float | None, total: float | None, ranks: Ranks | None) -> None:
        self.combiner, self.most, self.total, self.ranks = combiner, most, total, ranks
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
            now = learned_total(self.combiner, self.ranks)
            if self.total > 0 and 0 < now < float("inf") and (self.combiner.monotone or now > self.total):
                self.combiner.scale_(self.total / now)
        return mean_weights(self.combiner, self.ranks)
