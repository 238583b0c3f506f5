"""What a comparison of hypergradients with retraining found, and its verdict in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from auxfast.solvers import SolveStats

Outcome = Literal["right", "wrong", "noise"]

_STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83)
"""Student's t at 5%, one-sided, for 2 to 10 values; the last one serves for more, for which it is a little strict."""
_WRONG_DIRECTION = 0.5
"""Least cosine of what is not called a wrong direction."""


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds."""

    mean: float
    error: float
    """Its standard error."""
    seeds: int

    @staticmethod
    def of(values: Tensor) -> SeedMean:
        """values: (seeds,), at least two"""
        return SeedMean(float(values.mean()), float(values.std()) / math.sqrt(len(values)), len(values))

    @property
    def lower(self) -> float:
        """Bound that the true mean is above, but for a chance of 5%."""
        return self.mean - self._margin

    @property
    def upper(self) -> float:
        """Bound that the true mean is below, but for a chance of 5%."""
        return self.mean + self._margin

    @property
    def _margin(self) -> float:
        return _STUDENT[min(self.seeds - 2, len(_STUDENT) - 1)] * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.2f} +- {self.error:.2f}"


@dataclass(frozen=True)
class Prediction:
    """What the hypergradients of one solver say, against what retraining does. Matrices are (seeds, directions)."""

    predicted: Tensor
    """Change of the outer loss by each move, as the hypergradient says."""
    changes_up: Tensor
    changes_down: Tensor
    stats: tuple[SolveStats, ...]
    """Statistics of the linear solves, one for each seed."""

    @property
    def retrained(self) -> Tensor:
        return (self.changes_up + self.changes_down) / 2

    @property
    def cosine(self) -> SeedMean:
        """Cosine of the hypergradient with the changes by retraining, of each seed; 0 where one of them is zero."""
        return SeedMean.of(_cosines(self.predicted, self.retrained))

    @property
    def cosine_of_means(self) -> float:
        """Cosine of the means over seeds, in which noise cancels."""
        return float(_cosines(self.predicted.mean(0), self.retrained.mean(0)))

    @property
    def signs(self) -> float:
        """Part of the entries, over seeds and directions, with the right sign."""
        return float((self.predicted.sign() == self.retrained.sign()).double().mean())

    @property
    def size(self) -> float:
        """Norm of the hypergradients by that of the changes by retraining, means over seeds; NaN if those are zero."""
        truth = float(self.retrained.mean(0).norm())
        return float(self.predicted.mean(0).norm()) / truth if truth else math.nan

    @property
    def outcome(self) -> Outcome:
        """Decision behind the verdict: "right", "wrong" or "noise"; see `verify_against_retraining`."""
        alignment = _alignment(self.predicted, self.retrained)
        if alignment.lower > 0:
            return "right"
        repeats = _alignment(self.changes_up, self.changes_down).lower > 0
        if alignment.upper < 0 or (repeats and self.cosine.upper < _WRONG_DIRECTION):
            return "wrong"
        return "noise"

    @property
    def verdict(self) -> str:
        """Whether the hypergradient points where retraining goes."""
        figures = f"cosine {self.cosine}, size {self.size:.2g}"
        if self.outcome == "right":
            return f"points right ({figures})"
        if self.outcome == "wrong":
            return (
                f"the hypergradient does not point where retraining goes ({figures}): learning will not help here. Try "
                "another solver, more inner training, or an outer loss that does not reward confidence"
            )
        return (
            f"not distinguishable from noise ({figures}): retraining differs too much from seed to seed, or between "
            "moves up and down. Take more seeds, or a larger share or step"
        )


@dataclass(frozen=True)
class RetrainingReport:
    """What `verify_against_retraining` found; `print` it for a reading, which ends with the verdicts."""

    seeds: tuple[int, ...]
    moves: Tensor
    """(directions, n): how far the outer parameters were moved, flattened behind one another, up and down."""
    share: float | None
    """Part of its size by which each entry was moved; `None` if all were moved by the same step."""
    changes_up: Tensor
    """(seeds, directions): change of the outer loss by each move up."""
    changes_down: Tensor
    """(seeds, directions): what the outer loss was before, less what it is after each move down."""
    outer_losses: Tensor
    """(seeds,): the outer loss with the outer parameters as given."""
    inner_gradient_norms: Tensor
    """(seeds,): norm of the inner gradient there, which the implicit function theorem takes for 0."""
    predictions: Mapping[str, Prediction]
    """What each solver's hypergradients say, by its name."""

    @property
    def retrained(self) -> Tensor:
        """(seeds, directions): half the difference of the outer loss after moves up and down."""
        return (self.changes_up + self.changes_down) / 2

    @property
    def agreement(self) -> SeedMean:
        """Cosine of the changes by moves up and by moves down: 1 where training is smooth, -0.5 if it is all noise."""
        return SeedMean.of(_cosines(self.changes_up, self.changes_down))

    @property
    def largest_eigenvalue(self) -> float | None:
        """The largest eigenvalue of the inner Hessian that a solver has estimated, if one does: near 2 / (learning
        rate) plain descent goes to and fro, and nothing points right."""
        stats = (stats for prediction in self.predictions.values() for stats in prediction.stats)
        return max((s.largest_eigenvalue for s in stats if s.largest_eigenvalue is not None), default=None)

    @property
    def verdict(self) -> str:
        """The verdict on the solver, or one line for each of several."""
        if len(self.predictions) == 1:
            return next(iter(self.predictions.values())).verdict
        return "\n".join(f"{name}: {prediction.verdict}" for name, prediction in self.predictions.items())

    def __str__(self) -> str:
        names = list(self.predictions)
        single = len(self.moves) == self.moves.shape[1]
        rows = [["change of the outer loss", "retrained", *names]]
        for i in range(len(self.moves)):
            columns = [self.retrained[:, i], *(self.predictions[name].predicted[:, i] for name in names)]
            rows.append([f"{'entry' if single else 'direction'} {i}", *map(_mean, columns)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        moved = f"{self.moves.abs().max():.3g}" if self.share is None else f"{100 * self.share:.3g}%"
        lines = [
            f"{len(self.seeds)} seeds, each entry of the outer parameters moved up and down by {moved}",
            *table,
            f"outer loss                    {_mean(self.outer_losses, '')}",
            f"norm of the inner gradient    {_mean(self.inner_gradient_norms, '')}",
            f"moves up against moves down   cosine {self.agreement}",
        ]
        if self.largest_eigenvalue is not None and self.largest_eigenvalue > 0:
            lines.append(
                f"largest inner eigenvalue      {self.largest_eigenvalue:.3g}: gradient descent is stable up to a "
                f"learning rate of {2 / self.largest_eigenvalue:.2g}"
            )
        for name, prediction in self.predictions.items():
            lines.append(
                f"{name}: cosine {prediction.cosine} (of means {prediction.cosine_of_means:+.2f}), "
                f"signs right {100 * prediction.signs:.0f}%, size {prediction.size:.2g}, "
                f"residual {max(stats.residual for stats in prediction.stats):.1e}"
            )
        return "\n".join([*lines, "verdict", self.verdict])


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """(..., m), (..., m) -> (...); 0 where one is zero"""
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, 0)


def _alignment(a: Tensor, b: Tensor) -> SeedMean:
    """Cosines of each seed, by which Student's test is right for three entries or more. Of fewer, cosines are little
    more than signs, and what is tested is the part of b along a."""
    if a.shape[1] > 2:
        return SeedMean.of(_cosines(a, b))
    norms = a.norm(dim=1)
    return SeedMean.of(torch.where(norms > 0, (a * b).sum(1) / norms, 0))


def _mean(values: Tensor, sign: str = "+") -> str:
    mean = SeedMean.of(values)
    return f"{mean.mean:{sign}.3g} +- {mean.error:.1g}"
