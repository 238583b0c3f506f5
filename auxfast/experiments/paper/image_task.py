"""Tasks of labelled images: what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from auxfast.experiments.data.image_data import ImageSource
from auxfast.experiments.metrics import accuracy
from auxfast.experiments.paper.split_task import SplitTask, evaluating

_CHUNK = 500  # images that are scored at once, so that memory does not grow with the test part

Prepare = Callable[[Tensor, torch.Generator | None], Tensor]
"""Turns images as they are stored, (batch, ...), into inputs of a network; with a generator, into augmented ones."""


def as_they_are(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """The images, for data that are stored as inputs."""
    return images


@dataclass(kw_only=True)
class ImageTask(SplitTask):
    """An `auxfast.train.Task` without training batches: images whose class is the main task. The model's first outputs
    are the logits of the classes.

    images: n of them. labels: (n,) int64. batch_size: images in a training batch.
    """

    images: ImageSource
    labels: Tensor
    num_classes: int
    batch_size: int
    prepare: Prepare = as_they_are

    def inputs(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Inputs of the model for the images of these indices, augmented if there is a generator."""
        return self.prepare(self.images[rows].to(rows.device), generator)

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self.main_logits(self.auxiliary), self.labels[self.auxiliary])

    def score_on(self, rows: Tensor) -> float:
        return self.accuracy_on(rows)

    @torch.no_grad()
    def accuracy_on(self, rows: Tensor, k: int = 1) -> float:
        """Top-k accuracy of the model on the samples of these indices, in percent."""
        with evaluating(self.model):
            logits = torch.cat([self.main_logits(chunk) for chunk in rows.split(_CHUNK)])
        return accuracy(logits, self.labels[rows], k)

    def main_logits(self, rows: Tensor) -> Tensor:
        """Logits of the main classes, (len(rows), num_classes), for images that are not augmented."""
        logits: Tensor = self.model(self.inputs(rows))[:, : self.num_classes]
        return logits
