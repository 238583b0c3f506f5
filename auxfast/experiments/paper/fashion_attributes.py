"""Fashion-MNIST from five or ten labelled images a class, with attributes that a layman could tell for all images.

The setting of the paper's Table 1 (section 5.2, appendix B.1) on real images: naming the piece of clothing is the main
task, and only few images a class have that label; somebody who knows no names of clothes has said of all training
images which attributes they see ("has sleeves", "goes on a foot", ...).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.base import Experiment
from auxfast.experiments.data import allocate_auxiliary, draw_batch, draw_per_class, split
from auxfast.experiments.data.fashion_mnist import (
    CLASS_NAMES,
    DEBIAN_FOLDER,
    FASHION_ATTRIBUTES,
    fashion_attributes,
    load_fashion_mnist,
)
from auxfast.experiments.paper.options import check_range
from auxfast.experiments.paper.split_task import SplitTask, accuracy
from auxfast.train.config import CombinerConfig, Component, RunConfig, TrainConfig
from auxfast.train.task import Batch

CLASSES = len(CLASS_NAMES)
ATTRIBUTES = len(FASHION_ATTRIBUTES)
VALIDATION = 500
LABELLED_BATCH, UNLABELLED_BATCH = 32, 64
HIDDEN = 128
FLIPS = torch.linspace(0, 0.5, ATTRIBUTES)
LOSS_NAMES = ("main", *(f"{name}, {flip:.0%} wrong" for name, flip in zip(FASHION_ATTRIBUTES, FLIPS, strict=True)))
UNKNOWN = -100


@cache
def _load(folder):
    data = load_fashion_mnist(folder)
    images = F.avg_pool2d(data.images[:].float() / 255, 2)
    return images.flatten(1), data.labels, data.is_test


@dataclass(frozen=True)
class FashionAttributesOptions:
    folder: str = DEBIAN_FOLDER
    shots: int = 5
    auxiliary: int = 5
    images: int = 2000


@dataclass
class FashionAttributesTask(SplitTask):
    images: Tensor
    labels: Tensor
    attributes: Tensor
    unlabelled: Tensor
    loss_names: tuple[str, ...] = LOSS_NAMES

    def training_batch(self, generator: torch.Generator) -> Batch:
        labelled = draw_batch(self.training, LABELLED_BATCH, generator)
        rows = torch.cat([labelled, draw_batch(self.unlabelled, UNLABELLED_BATCH, generator)])
        classes, attributes = self.model(self.images[rows]).tensor_split([CLASSES], dim=1)
        main = F.cross_entropy(classes, self.labels[rows], reduction="none")
        others = F.binary_cross_entropy_with_logits(attributes, self.attributes[rows], reduction="none")
        mask = torch.ones(len(rows), 1 + ATTRIBUTES, device=main.device)
        mask[len(labelled) :, 0] = 0
        return Batch(torch.cat([main[:, None], others], dim=1), mask)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        return self.model[:-1].parameters()

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self._classes(self.auxiliary), self.labels[self.auxiliary])

    def score_on(self, rows: Tensor) -> float:
        return accuracy(self._classes(rows), self.labels[rows])

    def _classes(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.model(self.images[rows])[:, :CLASSES]
        return logits


def make_task(seed: int, options: FashionAttributesOptions, *, hold_out: bool, flips=None, model=None) -> FashionAttributesTask:
    images, labels, is_test = _load(options.folder)
    generator = torch.Generator().manual_seed(seed)
    (test,) = is_test.nonzero(as_tuple=True)
    (train,) = (~is_test).nonzero(as_tuple=True)
    labelled, others = draw_per_class(labels[train], options.shots, generator)
    training, auxiliary = allocate_auxiliary(
        train[labelled], options.auxiliary, generator, labels[train[labelled]], hold_out=hold_out
    )
    others = train[others]
    unlabelled, validation = split(others, (options.images - len(labelled), VALIDATION), generator, labels[others])
    given = fashion_attributes(labels)
    flipped = torch.rand(given.shape, generator=generator) < (FLIPS if flips is None else flips)
    labels = labels.clone()
    labels[unlabelled] = UNKNOWN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = (model or (lambda: nn.Sequential(nn.Linear(196, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, CLASSES + ATTRIBUTES))))()
    return FashionAttributesTask(
        images=images, labels=labels, attributes=torch.where(flipped, 1 - given, given),
        training=training, unlabelled=unlabelled, auxiliary=auxiliary, validation=validation, test=test, model=net,
    )
