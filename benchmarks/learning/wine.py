"""The cultivar of a wine from thirteen measurements, when most labels of the main task are noisy.

One linear model, whose weights all tasks share, and labels that help, that harm or that say nothing:

    main       of 88 labelled wines, 12 have been labelled with care, and the others in haste: half of those labels are
               drawn at random; the careful ones are the auxiliary set
    helpful    a tenth of the labels are drawn at random
    permuted   the cultivar of another wine
    harmful    as helpful, but always of the next cultivar

Validation and test wines are scored against their real cultivar.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.base import Experiment
from auxfast.experiments.data import allocate_auxiliary, load_wine, split, standardise
from auxfast.experiments.metrics import accuracy
from auxfast.experiments.paper.split_task import SplitTask
from auxfast.train.config import Component
from auxfast.train.task import Batch
from benchmarks.learning.defaults import METHODS, untuned_config

LABELLED, AUXILIARY, VALIDATION, TEST = 88, 12, 30, 60  # wines
CULTIVARS = 3
MAIN_NOISE, OTHER_NOISE = 0.5, 0.1  # share of labels that are drawn at random
LOSS_NAMES = ("main", "helpful", "permuted", "harmful")
_load = cache(load_wine)


@dataclass
class WineTask(SplitTask):
    """An `auxfast.train.Task`; samples are wines, the batch is the whole training part.

    features: (n, 13), standardised by the training part. labels: (n, 4) int64, noisy. cultivars: (n,) int64, real.
    """

    features: Tensor
    labels: Tensor
    cultivars: Tensor
    loss_names: tuple[str, ...] = LOSS_NAMES

    def training_batch(self, generator: torch.Generator) -> Batch:
        labels = self.labels[self.training]
        logits = self.model(self.features[self.training])[:, :, None].expand(-1, -1, labels.shape[1])
        return Batch(F.cross_entropy(logits, labels, reduction="none"), None)

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.features[self.auxiliary]), self.labels[self.auxiliary, self.main])

    def score_on(self, rows: Tensor) -> float:
        return accuracy(self.model(self.features[rows]), self.cultivars[rows])


def make_task(seed: int, options: Any, *, hold_out: bool) -> WineTask:
    """The task that `seed` draws: the split and the noise (see `MakeTask`)."""
    data = _load()
    generator = torch.Generator().manual_seed(seed)
    count = len(data.labels)
    labelled, validation, test = split(torch.arange(count), (LABELLED, VALIDATION, TEST), generator, data.labels)
    training, auxiliary = allocate_auxiliary(labelled, AUXILIARY, generator, data.labels[labelled], hold_out=hold_out)
    noise = torch.tensor([MAIN_NOISE, OTHER_NOISE, 0.0, OTHER_NOISE]).repeat(count, 1)
    noise[auxiliary, 0] = 0
    stranger = data.labels[torch.randperm(count, generator=generator)]
    labels = torch.stack([data.labels, data.labels, stranger, (data.labels + 1) % CULTIVARS], dim=1)
    anything = torch.randint(CULTIVARS, labels.shape, generator=generator)
    model = nn.Linear(data.features.shape[1], CULTIVARS)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return WineTask(
        features=standardise(data.features, training),
        labels=torch.where(torch.rand(labels.shape, generator=generator) < noise, anything, labels),
        cultivars=data.labels,
        training=training,
        auxiliary=auxiliary,
        validation=validation,
        test=test,
        model=model,
    )


EXPERIMENT = Experiment(
    name="wine",
    title="Wine: mostly hasty labels of the cultivar; helpful, permuted and harmful auxiliaries",
    about=(
        "Which of three cultivars is the wine from? Of 88 wines, 76 have been labelled in haste and 12 with care. One "
        "linear model has to fit three more labels: nearly the same one (helpful), that of another wine (permuted), "
        "and always the next cultivar (harmful)."
    ),
    score_name="accuracy, %",
    loss_names=LOSS_NAMES,
    config=untuned_config(
        outer_steps=30, inner_steps=20, inner_optimizer=Component("SGD", {"lr": 0.05, "momentum": 0.9})
    ),
    make_task=make_task,
    methods=METHODS,
    package=("sklearn", "scikit-learn"),
)
