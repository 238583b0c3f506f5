"""Signs that learning goes wrong, seen from the outer steps alone, each with its remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_VANISHED = 0.01  # of the main loss's weight: below it an auxiliary loss is as good as left out
_GROWN = 10.0
_SMOOTHED_STEPS = 10  # over which the outer loss is averaged, roughly
_RISEN = 0.1  # of the lowest smoothed outer loss, and of what it has fallen by: below that it may be noise
_NOISE = 2.0  # mean differences from step to step: in a thousand steps of noise alone the smoothed loss stays in that
_PATIENCE = 20  # outer steps by which those at which it rises outnumber the others

TEXTS = {
    "vanished": (
        "The weights of all auxiliary losses have fallen below 1% of the main loss's: training goes on with the main "
        "loss alone. If that is not what you expect, the hypergradient may not point where training goes: see "
        "auxfast.verify_against_retraining; or the outer set is too small, or outer steps begin too early."
    ),
    "grown": (
        "The weights of the losses have grown tenfold since the first outer step, and act as a larger learning rate of "
        "the inner training. Keep their total: HyperOptimizer.recommended(combiner), or keep_total=True."
    ),
    "outer loss rising": (
        "The outer loss has been rising for 20 outer steps or more. Most often the inner training overfits, which says "
        "nothing against the learned weights; if it does not, the outer steps lead the wrong way. Compare with a "
        "combiner that stays as it starts, stop early, and see auxfast.verify_against_retraining."
    ),
}


@dataclass
class Watch:
    """What is remembered of earlier outer steps.

    Attributes:
        alive: whether the auxiliary losses have had weight; they may start without.
        first_total: the sum of the loss weights before the first outer step.
        first_outer_loss: the outer loss before the first outer step.
        latest_outer_loss: that of the latest step.
        outer_loss: the smoothed outer loss.
        difference: the smoothed difference of the outer loss from step to step, which is noise for the most part.
        steps: the number of outer losses.
        lowest: the lowest that the smoothed one has been, since there were enough of them to be smoothed.
        rises: outer steps at which it has risen, less those at which it has fallen, from the last time that was 0.
        noticed: the keys of `TEXTS` that were seen, in their order.
    """

    alive: bool = False
    first_total: float | None = None
    first_outer_loss: float | None = None
    latest_outer_loss: float | None = None
    outer_loss: float = 0.0
    difference: float = 0.0
    steps: int = 0
    lowest: float | None = None
    rises: int = 0
    noticed: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """The fields, of numbers alone: a check of checkpoints takes text for a fault."""
        return {**vars(self), "noticed": {kind: kind in self.noticed for kind in TEXTS}}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Watch:
        noticed = [kind for kind, seen in state.get("noticed", {}).items() if seen]
        return Watch(**{**state, "noticed": noticed})

    def observe(self, outer_loss: float | None, weights: Sequence[float], main: int | None) -> list[str]:
        """What is seen for the first time at an outer step.

        Args:
            outer_loss: its value; None where it is not known.
            weights: mean weight of each loss; none where there is no combiner.
            main: index of the main loss; None where that is not known.
        """
        seen = []
        sizes = [abs(weight) for weight in weights]
        if main is not None and len(sizes) > 1:
            alive = sum(sizes) - sizes[main] >= _VANISHED * sizes[main]
            if self.alive and not alive:
                seen.append("vanished")
            self.alive = self.alive or alive
        if self._grows(sum(sizes)):
            seen.append("grown")
        if outer_loss is not None and self._rises(outer_loss):
            seen.append("outer loss rising")
        new = [kind for kind in seen if kind not in self.noticed]
        self.noticed += new
        return new

    def _grows(self, total: float) -> bool:
        self.first_total = self.first_total or total
        return total >= _GROWN * self.first_total > 0

    def _rises(self, outer_loss: float) -> bool:
        if self.first_outer_loss is None or self.latest_outer_loss is None:
            self.first_outer_loss = self.latest_outer_loss = outer_loss
        self.steps += 1
        share, before = 1 / min(self.steps, _SMOOTHED_STEPS), self.outer_loss
        self.outer_loss += share * (outer_loss - before)
        self.difference += share * (abs(outer_loss - self.latest_outer_loss) - self.difference)
        self.latest_outer_loss = outer_loss
        if self.steps < _SMOOTHED_STEPS:
            return False
        if self.lowest is None or self.outer_loss < self.lowest:
            self.lowest = self.outer_loss
        self.rises = self.rises + 1 if self.outer_loss > before else max(0, self.rises - 1)
        least = max(_RISEN * max(abs(self.lowest), self.first_outer_loss - self.lowest), _NOISE * self.difference)
        return self.rises >= _PATIENCE and self.outer_loss - self.lowest > least
