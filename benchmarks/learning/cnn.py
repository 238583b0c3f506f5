"""A small convolutional network from a hundred labelled digits, with two self-supervised auxiliaries and a useless one.

    main            which digit is it? Of 100 labelled scans, 20 are the auxiliary set of methods that need one
    rotation        by which of four right angles has the scan been turned?
    reconstruction  the scan itself, from the features
    noise           a number that is drawn anew each time: nothing can be learned from it

The training is as people do it: stochastic, with Adam, and long enough to fit every label.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.base import Experiment
from auxfast.experiments.data import allocate_auxiliary, draw_batch, load_digits, split
from auxfast.experiments.metrics import accuracy
from auxfast.experiments.paper.split_task import SplitTask
from auxfast.train.config import Component
from auxfast.train.task import Batch
from benchmarks.learning.defaults import METHODS, untuned_config

LABELLED, AUXILIARY, VALIDATION, TEST = 100, 20, 100, 1000  # scans
BATCH = 32
LOSS_NAMES = ("main", "rotation", "reconstruction", "noise")
_OUTPUTS = (10, 4, 64, 1)
_load = cache(load_digits)


class Network(nn.Module):
    """Two convolutions that all losses share, and a linear head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.heads = nn.Linear(256, sum(_OUTPUTS))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the heads, each (batch, its size). images: (batch, 1, 8, 8)."""
        return tuple(self.heads(self.body(images)).split(_OUTPUTS, dim=1))


@dataclass
class CNNTask(SplitTask):
    """An `auxfast.train.Task` of scans. images: (n, 1, 8, 8). labels: (n,) int64."""

    images: Tensor
    labels: Tensor
    loss_names: tuple[str, ...] = LOSS_NAMES

    def training_batch(self, generator: torch.Generator) -> Batch:
        rows = draw_batch(self.training, BATCH, generator)
        images, count = self.images[rows], len(rows)
        turns = torch.randint(4, (count,), generator=generator)
        all_turned = torch.stack([torch.rot90(images, turn, (2, 3)) for turn in range(4)])
        upright, turned = self.model(images), self.model(all_turned[turns, torch.arange(count)])
        losses = (
            F.cross_entropy(upright[0], self.labels[rows], reduction="none"),
            F.cross_entropy(turned[1], turns, reduction="none"),
            (upright[2] - images.flatten(1)).square().mean(dim=1),
            (upright[3].squeeze(1) - torch.randn(count, generator=generator)).square(),
        )
        return Batch(torch.stack(losses, dim=1), None)

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.images[self.auxiliary])[0], self.labels[self.auxiliary])

    def score_on(self, rows: Tensor) -> float:
        return accuracy(self.model(self.images[rows])[0], self.labels[rows])


def make_task(seed: int, options: Any, *, hold_out: bool) -> CNNTask:
    """The task that `seed` draws: the split and the first weights (see `MakeTask`)."""
    data = _load()
    generator = torch.Generator().manual_seed(seed)
    labelled, validation, test = split(
        torch.arange(len(data.labels)), (LABELLED, VALIDATION, TEST), generator, data.labels
    )
    training, auxiliary = allocate_auxiliary(labelled, AUXILIARY, generator, data.labels[labelled], hold_out=hold_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network()
    return CNNTask(
        images=data.images.view(-1, 1, 8, 8),
        labels=data.labels,
        training=training,
        auxiliary=auxiliary,
        validation=validation,
        test=test,
        model=model,
    )


EXPERIMENT = Experiment(
    name="cnn",
    title="CNN: a hundred labelled digits; rotation, reconstruction and noise as auxiliaries",
    about=(
        "Which digit is it? A small convolutional network has a hundred labelled scans, and has to tell on the way by "
        "which angle a scan was turned, to draw the scan again, and to guess pure noise."
    ),
    score_name="accuracy, %",
    loss_names=LOSS_NAMES,
    config=untuned_config(outer_steps=60, inner_steps=10, inner_optimizer=Component("Adam", {"lr": 2e-3})),
    make_task=make_task,
    methods=METHODS,
    package=("sklearn", "scikit-learn"),
)
