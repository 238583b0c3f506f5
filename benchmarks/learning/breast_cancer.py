"""The diagnosis of a biopsy from ten measurements, with twenty more that are known in training only.

Means over a biopsy's cell nuclei are the input. Their standard errors and the means of the three worst nuclei are
privileged: each is an auxiliary regression. Few biopsies have a diagnosis; all that are trained on have the
measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.base import Experiment
from auxfast.experiments.data import allocate_auxiliary, draw_batch, load_breast_cancer, split, standardise
from auxfast.experiments.data.breast_cancer import MEASURES
from auxfast.experiments.metrics import accuracy
from auxfast.experiments.paper.split_task import SplitTask
from auxfast.train.config import Component
from auxfast.train.task import Batch
from benchmarks.learning.defaults import METHODS, untuned_config

LABELLED, AUXILIARY, UNLABELLED, VALIDATION, TEST = 30, 8, 150, 60, 300  # biopsies
LABELLED_BATCH, UNLABELLED_BATCH = 16, 32
HIDDEN = 32
LOSS_NAMES = ("main", *(f"{measure}, error" for measure in MEASURES), *(f"{measure}, worst" for measure in MEASURES))
UNKNOWN = -100  # F.cross_entropy ignores this label
_load = cache(load_breast_cancer)


@dataclass
class BreastCancerTask(SplitTask):
    """An `auxfast.train.Task` of biopsies, everything measured being standardised by those that are trained on.

    features: (n, 10). privileged: (n, 20). labels: (n,) int64, UNKNOWN where there is no diagnosis.
    """

    features: Tensor
    privileged: Tensor
    labels: Tensor
    unlabelled: Tensor
    loss_names: tuple[str, ...] = LOSS_NAMES

    def training_batch(self, generator: torch.Generator) -> Batch:
        labelled = draw_batch(self.training, LABELLED_BATCH, generator)
        rows = torch.cat([labelled, draw_batch(self.unlabelled, UNLABELLED_BATCH, generator)])
        logits, regressions = self.model(self.features[rows]).tensor_split([2], dim=1)
        main = F.cross_entropy(logits, self.labels[rows], reduction="none")
        losses = torch.cat([main[:, None], (regressions - self.privileged[rows]).square()], dim=1)
        mask = torch.ones_like(losses)
        mask[:, 0] = self.labels[rows] != UNKNOWN
        return Batch(losses, mask)

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self._logits(self.auxiliary), self.labels[self.auxiliary])

    def score_on(self, rows: Tensor) -> float:
        return accuracy(self._logits(rows), self.labels[rows])

    def _logits(self, rows: Tensor) -> Tensor:
        """(len(rows), 2)."""
        logits: Tensor = self.model(self.features[rows])[:, :2]
        return logits


def make_task(seed: int, options: Any, *, hold_out: bool) -> BreastCancerTask:
    """The task that `seed` draws: the split and the first weights (see `MakeTask`)."""
    data = _load()
    generator = torch.Generator().manual_seed(seed)
    sizes = (LABELLED, UNLABELLED, VALIDATION, TEST)
    labelled, unlabelled, validation, test = split(torch.arange(len(data.labels)), sizes, generator, data.labels)
    training, auxiliary = allocate_auxiliary(labelled, AUXILIARY, generator, data.labels[labelled], hold_out=hold_out)
    seen = torch.cat([training, unlabelled])
    labels = data.labels.clone()
    labels[unlabelled] = UNKNOWN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(len(MEASURES), HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 2 + 2 * len(MEASURES)))
    return BreastCancerTask(
        features=standardise(data.mean, seen),
        privileged=standardise(torch.cat([data.error, data.worst], dim=1), seen),
        labels=labels,
        training=training,
        unlabelled=unlabelled,
        auxiliary=auxiliary,
        validation=validation,
        test=test,
        model=model,
    )


EXPERIMENT = Experiment(
    name="breast-cancer",
    title="Breast cancer: few diagnoses; twenty measurements known in training only as auxiliaries",
    about=(
        "Is the tumour malignant? Thirty biopsies have a diagnosis. Ten measurements are the input; twenty more, which "
        "nobody will have later, are auxiliary regressions, for these biopsies and 150 others."
    ),
    score_name="accuracy, %",
    loss_names=LOSS_NAMES,
    config=untuned_config(
        outer_steps=30, inner_steps=20, inner_optimizer=Component("SGD", {"lr": 0.01, "momentum": 0.9})
    ),
    make_task=make_task,
    methods=METHODS,
    package=("sklearn", "scikit-learn"),
)
