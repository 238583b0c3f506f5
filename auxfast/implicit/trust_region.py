"""A limit on what one outer step may do to the weights of the losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from auxfast.nn import Combiner
from auxfast.nn.combiner_base import combiners_of

_SMALLEST_SHARE = 0.01  # of the mean weight: a change of what is smaller does not count as more than it is
_MOST_TRIALS = 30


@contextmanager
def trust_region(parameters: Iterable[Tensor], most: float | None) -> Iterator[None]:
    """Shortens the step that the body takes, so that no loss weight of a combiner changes by more than the share `most`.

    The weights are means over the batch of the combiner's latest call, each relative to what it was before. A weight
    below a hundredth of the mean weight counts as that. Combiners that were not called, and parameters that are no
    combiner's, move as the body moves them; with `most=None` all do.

    Args:
        parameters: those that the body moves.
        most: share of a weight, above 0.
    """
    combiners = [] if most is None else [c for c in combiners_of(parameters) if c.last_call is not None]
    before = [(combiner.phi.detach().clone(), combiner.mean_weights(*combiner.last_call)) for combiner in combiners]
    yield
    for combiner, (phi, weights) in zip(combiners, before, strict=True):
        assert most is not None
        _hold_back(combiner, phi, weights, most)


@torch.no_grad()
def _hold_back(combiner: Combiner, start: Tensor, weights: Tensor, most: float) -> None:
    """Moves `phi` back along its step from `start`, where the mean weights were `weights`, until their change is small
    enough. It is nearly linear in the length of the step, so two trials are the rule."""
    step, length = combiner.phi - start, 1.0
    scale = weights.abs().clamp(min=_SMALLEST_SHARE * weights.abs().mean())
    for _ in range(_MOST_TRIALS):
        change = ((combiner.mean_weights(*combiner.last_call) - weights).abs() / scale).max().item()
        if change <= most:
            return
        length *= max(0.1, 0.95 * most / change) if change < float("inf") else 0.1  # NaN is not below infinity
        combiner.phi.copy_(start + length * step)
    combiner.phi.copy_(start)
