"""The task of learned auxiliary labels (paper, section 5.4): images, a student and a label generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from auxfast.experiments.data import draw_batch
from auxfast.experiments.data.image_data import ImageSource
from auxfast.experiments.metrics import accuracy
from auxfast.experiments.paper.split_task import SplitTask
from auxfast.nn import LabelGenerator
from auxfast.train.task import LabelBatch

_CHUNK = 500  # images that are scored at once, so that memory does not grow with the test part

Prepare = Callable[[Tensor, torch.Generator | None], Tensor]
"""Turns images as they are stored, (batch, ...), into inputs of a network; with a generator, into augmented ones."""


def as_they_are(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """The images, for data that are stored as inputs."""
    return images


@dataclass(kw_only=True)
class LabelTask(SplitTask):
    """An `auxfast.train.Task` of images, all of whose training samples have a main label. The losses: a cross-entropy,
    and that of the generated labels.

    images: n of them. labels: (n,) int64. The model is the student: it maps inputs to (batch, num_classes +
    label_generator.num_auxiliary) logits.
    """

    images: ImageSource
    labels: Tensor
    num_classes: int
    label_generator: LabelGenerator
    batch_size: int
    prepare: Prepare = as_they_are
    loss_names: tuple[str, ...] = ("main", "generated labels")

    def training_batch(self, generator: torch.Generator) -> LabelBatch:
        rows = draw_batch(self.training, self.batch_size, generator)
        inputs, labels = self.prepare(self.images[rows], generator), self.labels[rows]
        main, auxiliary = self.model(inputs).tensor_split([self.num_classes], dim=1)
        losses = F.pad(F.cross_entropy(main, labels, reduction="none")[:, None], (0, 1))
        mask = torch.tensor([1.0, 0.0], device=losses.device).expand_as(losses)
        return LabelBatch(losses, mask, auxiliary, inputs, labels)

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self.main_logits(self.auxiliary), self.labels[self.auxiliary])

    def score_on(self, rows: Tensor) -> float:
        was_training = self.model.training
        self.model.eval()  # BatchNorm and dropout, if there are any
        logits = torch.cat([self.main_logits(chunk) for chunk in rows.split(_CHUNK)])
        self.model.train(was_training)
        return accuracy(logits, self.labels[rows])

    def main_logits(self, rows: Tensor) -> Tensor:
        """Logits of the main classes, (len(rows), num_classes), for images that are not augmented."""
        logits: Tensor = self.model(self.prepare(self.images[rows], None))[:, : self.num_classes]
        return logits

    @torch.no_grad()
    def soft_labels(self, rows: Tensor) -> Tensor:
        """Labels that the generator gives these images, (len(rows), num_auxiliary)."""
        was_training = self.label_generator.training
        self.label_generator.eval()
        chunks = [self.label_generator(self.prepare(self.images[r], None), self.labels[r]) for r in rows.split(_CHUNK)]
        self.label_generator.train(was_training)
        return torch.cat(chunks)
