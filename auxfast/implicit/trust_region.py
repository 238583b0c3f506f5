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
def trust_region(parameters: Iterable[Tensor], most: float | None, keep_total: bool) -> Iterator[None]:
    """Corrects the step that the body takes, by what it does to the mean weights of the losses on the batch of each
    combiner's latest call. Combiners that were not called, and parameters of no combiner, move as the body moves them.

    Args:
        parameters: those that the body moves.
        most: the largest share by which any loss weight may change; a longer step is shortened. None: no limit.
        keep_total: whether the learned weights, without that of a main loss which is added as it is, add up to what
            they did before.
    """
    limits = [_Limits(c, most, keep_total) for c in called(parameters)] if keep_total or most is not None else []
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


class _Limits:
    """The weights of a combiner's losses before a step, and what the step may make of them."""

    def __init__(self, combiner: Combiner, most: float | None, keep_total: bool) -> None:
        self.combiner, self.most, self.keep_total = combiner, most, keep_total
        self.start = combiner.phi.detach().clone()
        self.weights = mean_weights(combiner)

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
        """The largest change of a weight as a share of it, after the total is made what it was."""
        weights = mean_weights(self.combiner)
        if self.keep_total:
            before, now = (self._learned_total(w) for w in (self.weights, weights))
            if before > 0 and 0 < now < float("inf"):
                self.combiner.scale_(before / now)
                weights = mean_weights(self.combiner)
        scale = self.weights.abs().clamp(min=_SMALLEST_SHARE * self.weights.abs().mean())
        return ((weights - self.weights).abs() / scale).max().item()

    def _learned_total(self, weights: Tensor) -> float:
        return float(weights.double().sum()) - (self.combiner.main is not None)
