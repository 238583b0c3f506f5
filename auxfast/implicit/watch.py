"""Signs that learning goes wrong, seen from the outer steps alone, each with its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from auxfast.implicit.trust_region import mean_weights
from auxfast.nn import Combiner

_VANISHED = 0.01  # of the main loss's weight: below it an auxiliary loss is as good as left out
_GROWN = 10.0
_SMOOTHING = 0.8  # of the outer loss: a mean over some five steps
_RISEN, _PATIENCE = 0.05, 20  # share of the lowest smoothed outer loss; outer steps since then

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
        "The outer loss has been rising for 20 outer steps or more: the inner training overfits, or the outer steps "
        "lead the wrong way. Stop early, compare with a combiner that stays as it starts, and see "
        "auxfast.verify_against_retraining."
    ),
}


@dataclass
class Watch:
    """What is remembered of earlier outer steps. Its fields are plain numbers, for a state_dict.

    Attributes:
        first_total: the sum of the loss weights after the first outer step.
        outer_loss: the smoothed outer loss.
        lowest: the lowest it has been.
        since_lowest: outer steps since then.
        noticed: the keys of `TEXTS` that were seen, in their order.
    """

    first_total: float | None = None
    outer_loss: float | None = None
    lowest: float = float("inf")
    since_lowest: int = 0
    noticed: list[str] = field(default_factory=list)

    def look_at(self, outer_loss: float | None, combiners: Sequence[Combiner]) -> list[str]:
        """What is seen for the first time after an outer step.

        Args:
            outer_loss: its value before the step; None where it was not computed here.
            combiners: those that were called.
        """
        weights = [mean_weights(combiner).abs() for combiner in combiners]
        seen = []
        for combiner, own in zip(combiners, weights, strict=True):
            if combiner.main is not None and combiner.num_losses > 1:
                main = own[combiner.main]
                if bool(own.sum() - main < _VANISHED * main):
                    seen.append("vanished")
        if self._grows(float(sum(own.sum() for own in weights))):
            seen.append("grown")
        if outer_loss is not None and self._rises(outer_loss):
            seen.append("outer loss rising")
        new = [kind for kind in dict.fromkeys(seen) if kind not in self.noticed]
        self.noticed += new
        return new

    def _grows(self, total: float) -> bool:
        self.first_total = self.first_total or total
        return total >= _GROWN * self.first_total > 0

    def _rises(self, outer_loss: float) -> bool:
        smoothed = outer_loss if self.outer_loss is None else self.outer_loss
        self.outer_loss = _SMOOTHING * smoothed + (1 - _SMOOTHING) * outer_loss
        self.since_lowest += 1
        if self.outer_loss < self.lowest:
            self.lowest, self.since_lowest = self.outer_loss, 0
        return self.since_lowest >= _PATIENCE and self.outer_loss - self.lowest > _RISEN * abs(self.lowest)
