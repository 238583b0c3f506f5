"""The task of most experiments: a data set in four parts, and the score of a model on one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Label of samples whose main label is not given: F.cross_entropy ignores it, so that the hidden one cannot leak in.
UNKNOWN = -100


@dataclass(kw_only=True)
class SplitTask(ABC):
    """An `auxfast.train.Task` without the samples and their losses, which a subclass has.

    training, auxiliary, validation, test: the indices of each part's samples, (n,) int64.
    unlabelled: those of training samples without a main label.
    """

    training: Tensor
    auxiliary: Tensor
    validation: Tensor
    test: Tensor
    unlabelled: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    model: nn.Module
    main: int = 0

    @abstractmethod
    def score_on(self, rows: Tensor) -> float:
        """Score of the model on the samples of these indices, (n,): more is better. It needs no graph."""

    def split_indices(self) -> dict[str, Tensor]:
        """The indices of each part's samples by the part's name, (n,) int64."""
        names = ("training", "unlabelled", "auxiliary", "validation", "test")
        return {name: getattr(self, name) for name in names}

    def release_auxiliary(self) -> None:
        """Adds those samples of the auxiliary set to the training part that are not in it."""
        held_out = self.auxiliary[~torch.isin(self.auxiliary, self.training)]
        self.training = torch.cat([self.training, held_out])

    @torch.no_grad()
    def validation_score(self) -> float:
        return self.score_on(self.validation)

    @torch.no_grad()
    def score(self) -> float:
        return self.score_on(self.test)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into the mode of evaluation, for its BatchNorm and dropout; the mode that it had comes back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def explained_variance(predicted: Tensor, target: Tensor) -> float:
    """R2 x 100: the percentage of the target's variance that is explained. Both are (n,)."""
    return 100 * (1 - F.mse_loss(predicted, target).item() / target.var(correction=0).item())
