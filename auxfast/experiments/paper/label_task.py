"""The task of learned auxiliary labels (paper, section 5.4), and what its experiments show: findings and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from auxfast.experiments.base import Experiment, Finding, restore
from auxfast.experiments.data import draw_batch
from auxfast.experiments.paper.image_task import ImageTask
from auxfast.experiments.paper.split_task import evaluating
from auxfast.experiments.report.label_map import LabelledImages, draw_label_maps
from auxfast.experiments.report.statistics import finished, learned_against_controls
from auxfast.nn import LabelGenerator
from auxfast.train.run import Run
from auxfast.train.task import WHOLE, LabelBatch, Part

METHODS = ("stl", "maxl-f", "maxl", "auxilearn-labels-frozen", "auxilearn-labels")
_CHUNK = 500  # images that are labelled at once


@dataclass(kw_only=True)
class LabelTask(ImageTask):
    """An `auxfast.train.Task` of images, all of whose training samples have a main label. The losses: a cross-entropy,
    and that of the generated labels.

    The model is the student: it maps inputs to (batch, num_classes + label_generator.num_auxiliary) logits.
    """

    label_generator: LabelGenerator
    loss_names: tuple[str, ...] = ("main", "generated labels")

    def training_batch(self, generator: torch.Generator, part: Part = WHOLE) -> LabelBatch:
        rows = draw_batch(self.training, self.batch_size, generator)
        inputs, labels = part.of(self.inputs(rows, generator)), part.of(self.labels[rows])
        main, auxiliary = self.model(inputs).tensor_split([self.num_classes], dim=1)
        losses = F.pad(F.cross_entropy(main, labels, reduction="none")[:, None], (0, 1))
        mask = torch.tensor([1.0, 0.0], device=losses.device).expand_as(losses)
        return LabelBatch(losses, mask, auxiliary, inputs, labels)

    @torch.no_grad()
    def soft_labels(self, rows: Tensor) -> Tensor:
        """Labels that the generator gives these images, (len(rows), num_auxiliary)."""
        with evaluating(self.label_generator):
            return torch.cat([self.label_generator(self.inputs(r), self.labels[r]) for r in rows.split(_CHUNK)])


def findings(runs: Sequence[Run]) -> list[Finding]:
    """Learned labels against none, against random ones, MAXL's, and those of a teacher that stays."""
    return learned_against_controls(runs, ["auxilearn-labels"], ("stl", "maxl-f", "maxl"))


def draw_learned_labels(
    path: Path, experiment: Experiment, runs: Sequence[Run], class_names: Mapping[int, str], side: int
) -> None:
    """Draws maps of the labels that the first learned teacher gives the test images (paper, Figure 4); nothing if there
    is none.

    class_names: names of the main classes that are drawn, by their labels.
    side: height and width of the images, in pixels.
    """
    learned = [run for setting in experiment.settings for run in finished(runs, "auxilearn-labels", setting)]
    if learned:
        task, _ = restore(experiment, learned[0])
        assert isinstance(task, LabelTask)
        draw_label_maps(path, [labelled_images(task, label, name, side) for label, name in class_names.items()])


def labelled_images(task: LabelTask, label: int, name: str, side: int) -> LabelledImages:
    """The test images of a main class, and how the task's teacher divides them. The arguments: see
    `draw_learned_labels`."""
    rows = task.test[task.labels[task.test] == label]
    own = task.soft_labels(rows).split(task.label_generator.hierarchy, dim=1)[label]
    return LabelledImages(name, task.inputs(rows).view(-1, side, side), own)
