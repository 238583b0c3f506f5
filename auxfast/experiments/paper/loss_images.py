"""Losses that are images, and the picture of what their pixels weigh (paper, section 5.3 and figure 3)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auxfast.experiments.base import Experiment, restore
from auxfast.experiments.paper.split_task import SplitTask, evaluating
from auxfast.experiments.report.plotting import draw_loss_images
from auxfast.experiments.report.statistics import finished
from auxfast.train.run import Run
from auxfast.train.task import Batch

DRAWN = 4  # test images in the picture


@dataclass(kw_only=True)
class LossImageTask(SplitTask):
    """An `auxfast.train.Task` whose losses are images: (batch, num_losses, height, width)."""

    loss_names: tuple[str, ...]

    @abstractmethod
    def losses(self, rows: Tensor) -> Batch:
        """Losses and mask of the images of these indices, (n,), as they are, without augmentation."""

    @abstractmethod
    def pictures(self, rows: Tensor) -> Tensor:
        """Pictures of the images of these indices, (n,), for `draw_loss_images`: (n, 1 or 3, height, width)."""


def draw_learned(experiment: Experiment, path: Path, runs: Sequence[Run]) -> None:
    """Draws loss images of test images, and what their pixels weigh by the learned convolutional combiners of the first
    seeds, in turn; nothing if there is none. The tasks of `experiment` are `LossImageTask`s."""
    if not (learned := finished(runs, "conv")[:DRAWN]):
        return
    tasks, rows = zip(*(_drawn(experiment, run, DRAWN // len(learned)) for run in learned), strict=True)
    images, losses, weights, mask = (torch.cat(parts) for parts in zip(*rows, strict=True))
    draw_loss_images(path, images, losses, weights, tasks[0].loss_names, mask)


@torch.no_grad()
def _drawn(experiment: Experiment, run: Run, count: int) -> tuple[LossImageTask, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The task of a run, and pictures, losses, weights and mask of its first test images."""
    task, combiner = restore(experiment, run)
    assert isinstance(task, LossImageTask)
    assert combiner is not None
    rows = task.test[:count]
    with evaluating(task.model):
        losses, mask = task.losses(rows)
    if mask is None:
        mask = torch.ones_like(losses)
    return task, (task.pictures(rows), losses, combiner.loss_weights(losses, mask), mask)
