"""ShapeNet part (paper, appendix C.9, table 7): which part of a shape is each point? 30 shapes a category have labels.

Two experiments, on the same splits. In `shapenet-part` the auxiliary task is a learned one: a PointNet invents soft
labels for the points, six classes for each category of shapes, and follows the hypergradient. In
`shapenet-part-pretext` it is one of three that people have thought of (see `point_clouds`).

As in the paper, the network is not told a shape's category; but a prediction is the likeliest of the category's parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.base import Axis, Experiment
from auxfast.experiments.data import allocate_auxiliary, draw_batch, draw_per_class, split
from auxfast.experiments.data.catalogue import load_copy
from auxfast.experiments.data.shapenet_part import CATEGORIES, PARTS, ShapeNetPartData
from auxfast.experiments.metrics import PartIoU, part_iou
from auxfast.experiments.models import DGCNN, PointNet
from auxfast.experiments.paper.label_task import METHODS, findings
from auxfast.experiments.paper.options import PaperTraining, check_range, training_length
from auxfast.experiments.paper.point_clouds import PRETEXTS, Pretext, normalised, sample
from auxfast.experiments.paper.split_task import SplitTask, evaluating
from auxfast.nn import LabelGenerator
from auxfast.solvers import Identity
from auxfast.train.config import Component, LabelsConfig, RunConfig
from auxfast.train.task import WHOLE, Batch, LabelBatch, Part

NUM_PARTS = sum(map(len, PARTS.values()))
AUXILIARY_CLASSES = 6  # learned for each category
_BATCH = 32  # shapes in a batch, as in DGCNN's code
_EPOCHS = 150


@dataclass(frozen=True)
class PartOptions:
    """Options of both experiments.

    folder: a copy of the data set, relative to the working directory.
    shots, auxiliary_shots: number of labelled shapes of each category, and of those among them that are the auxiliary
        set.
    validation: share of the official validation part that is used. All of it, at each outer step, takes longer than the
        training of so few shapes.
    points: number of points that are drawn of a shape in training.
    batch_size: shapes in a batch.
    neighbours, width, embedding: of the student, see `DGCNN`.
    """

    folder: str = "data/shapenet-part"
    shots: int = 30
    auxiliary_shots: int = 2
    validation: float = 1.0
    points: int = 1024
    batch_size: int = _BATCH
    neighbours: int = 20
    width: int = 64
    embedding: int = 1024

    def __post_init__(self) -> None:
        check_range("shots", self.shots, 2, 1000)
        check_range("auxiliary_shots", self.auxiliary_shots, 1, self.shots - 1)
        check_range("validation", self.validation, 0, 1)
        check_range("neighbours", self.neighbours, 1, 1000)
        check_range("points", self.points, self.neighbours, 100_000)
        check_range("batch_size", self.batch_size, 1, 10_000)


@dataclass(frozen=True)
class LearnedOptions(PartOptions):
    """Options of `shapenet-part`: those of both, and generator_width: that of the label generator, see `PointNet`."""

    generator_width: int = 32


@dataclass(frozen=True)
class PretextOptions(PartOptions):
    """Options of `shapenet-part-pretext`: those of both, and pretext: the auxiliary task, see `point_clouds`."""

    pretext: Literal["dae", "defrec", "rs"] = "dae"


@dataclass(kw_only=True)
class PartTask(SplitTask):
    """An `auxfast.train.Task` of shapes in files. The model maps points (k, 3, p) to logits (k, 50 + others, p), those
    of the parts first.

    auxiliary_points, auxiliary_parts: (m, 3, p) float32 and (m, p) int64: points of the auxiliary set, drawn once.
    points, batch_size: see `PartOptions`.
    """

    data: ShapeNetPartData
    auxiliary_points: Tensor
    auxiliary_parts: Tensor
    points: int
    batch_size: int

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draws a batch of k training shapes: points (k, 3, p) float32, their parts (k, p) int64, and the shapes'
        categories (k,) int64; on the CPU."""
        rows = draw_batch(self.training, self.batch_size, generator).cpu()
        return *sampled(self.data, rows, self.points, generator), self.data.categories[rows]

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.auxiliary_points)[:, :NUM_PARTS], self.auxiliary_parts)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the student without its two heads."""
        return self.model.get_submodule("backbone").parameters()

    def score_on(self, rows: Tensor) -> float:
        """Mean over the shapes, which is the mean of table 7: its categories weigh as much as they have shapes."""
        return self.part_scores(rows).of_shapes

    def further_scores(self) -> dict[str, float]:
        """The mean over the categories, and that of each category, as in table 7."""
        scores = self.part_scores(self.test)
        return {"mean of categories": scores.of_categories, **scores.by_category}

    @torch.no_grad()
    def part_scores(self, rows: Tensor) -> PartIoU:
        """Scores of the model on the shapes of these indices, (n,), with all of their points."""
        shapes = [self.data.shape(row) for row in rows.tolist()]
        categories = [CATEGORIES[int(self.data.categories[row])] for row in rows.tolist()]
        predicted = []
        with evaluating(self.model):
            for shape, category in zip(shapes, categories, strict=True):
                logits = self.model(normalised(shape.points).T[None].to(self._device))[0]
                own = PARTS[category]
                predicted.append(logits[own.start : own.stop].argmax(dim=0).cpu() + own.start)
        return part_iou(predicted, [shape.parts for shape in shapes], categories, PARTS)

    @property
    def _device(self) -> torch.device:
        return self.auxiliary_points.device


@dataclass(kw_only=True)
class LearnedPartTask(PartTask):
    """The task with learned labels: the generator sees points, and is told their shape's category."""

    label_generator: LabelGenerator
    loss_names: tuple[str, ...] = ("parts", "generated labels")

    def training_batch(self, generator: torch.Generator, part: Part = WHOLE) -> LabelBatch:
        points, parts, categories = (part.of(tensor).to(self._device) for tensor in self.draw(generator))
        main, auxiliary = self.model(points).tensor_split([NUM_PARTS], dim=1)
        main_losses = F.cross_entropy(main, parts, reduction="none")
        losses = torch.stack([main_losses, torch.zeros_like(main_losses)], dim=1)
        mask = torch.tensor([1.0, 0.0], device=self._device)[:, None].expand_as(losses)
        return LabelBatch(losses, mask, auxiliary, points, categories)


@dataclass(kw_only=True)
class PretextPartTask(PartTask):
    """The task with a pretext task, on the same shapes in a corrupted form."""

    pretext: Pretext
    loss_names: tuple[str, ...] = ("parts", "pretext")

    def training_batch(self, generator: torch.Generator, part: Part = WHOLE) -> Batch:
        points, parts, _ = self.draw(generator)
        corrupted = self.pretext.corrupt(points, generator)
        points, parts = part.of(points).to(self._device), part.of(parts).to(self._device)
        main_losses = F.cross_entropy(self.model(points)[:, :NUM_PARTS], parts, reduction="none")
        predicted = self.model(part.of(corrupted.points).to(self._device))[:, NUM_PARTS:]
        pretext_losses = self.pretext.loss(predicted, points, part.of(corrupted.target).to(self._device))
        return Batch(torch.stack([main_losses, pretext_losses], dim=1), None)


def sampled(data: ShapeNetPartData, rows: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws `count` points of each of the shapes in these rows, (k,): points (k, 3, count), and parts (k, count)."""
    points, parts = [], []
    for row in rows.tolist():
        shape = data.shape(row)
        chosen = sample(count, len(shape.parts), generator)
        points.append(normalised(shape.points)[chosen].T)
        parts.append(shape.parts[chosen])
    return torch.stack(points), torch.stack(parts)


def make_learned_task(seed: int, options: LearnedOptions, *, hold_out: bool) -> LearnedPartTask:
    """The task of `shapenet-part` that `seed` draws (see `MakeTask`).

    Raises:
        DatasetError: see `load_copy`; also later, where a shape is read.
    """
    outputs = AUXILIARY_CLASSES * len(CATEGORIES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = _student(options, outputs)
        teacher = PointNet(outputs, width=options.generator_width)
    return LearnedPartTask(
        **_parts(seed, options, hold_out=hold_out),
        model=student,
        label_generator=LabelGenerator(teacher, [AUXILIARY_CLASSES] * len(CATEGORIES)),
    )


def make_pretext_task(seed: int, options: PretextOptions, *, hold_out: bool) -> PretextPartTask:
    """The task of `shapenet-part-pretext` that `seed` draws (see `MakeTask`).

    Raises:
        DatasetError: see `make_learned_task`.
    """
    pretext = PRETEXTS[options.pretext]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = _student(options, pretext.outputs)
    return PretextPartTask(**_parts(seed, options, hold_out=hold_out), model=student, pretext=pretext)


def _student(options: PartOptions, outputs: int) -> DGCNN:
    return DGCNN(NUM_PARTS, outputs, neighbours=options.neighbours, width=options.width, embedding=options.embedding)


def _parts(seed: int, options: PartOptions, *, hold_out: bool) -> dict[str, Any]:
    """Arguments of `PartTask` that the tasks of both experiments share, by their names."""
    data: ShapeNetPartData = load_copy("shapenet-part", options.folder)
    generator = torch.Generator().manual_seed(seed)
    chosen, _ = draw_per_class(data.categories[data.training], options.shots, generator)
    labelled = data.training[chosen]
    training, auxiliary = allocate_auxiliary(
        labelled,
        options.auxiliary_shots * len(CATEGORIES),
        generator,
        data.categories[labelled],
        hold_out=hold_out,
    )
    size = max(1, round(options.validation * len(data.validation)))
    (validation,) = split(data.validation, (size,), generator, data.categories[data.validation])
    points, parts = sampled(data, auxiliary, options.points, generator)
    return {
        "data": data,
        "training": training,
        "auxiliary": auxiliary,
        "validation": validation,
        "test": data.test,
        "auxiliary_points": points,
        "auxiliary_parts": parts,
        "points": options.points,
        "batch_size": options.batch_size,
    }


_SHAPES = (30 - 2) * len(CATEGORIES)
_EPOCH = math.ceil(_SHAPES / _BATCH)  # steps
_TRAINING = PaperTraining(
    **training_length(_EPOCHS, _SHAPES, _BATCH, inner_steps=_EPOCH),
    inner_optimizer=Component("Adam", {"lr": 1e-3}),
    inner_scheduler=Component("CosineAnnealingLR", {"T_max": _EPOCHS * _EPOCH}),
    outer_optimizer=Component("SGD", {"lr": 1e-2, "momentum": 0.9}),
    solver=Identity(scale=4.0),
    weight_decay=5e-5,
    max_outer_grad_norm=50.0,
)
_SCORE = "mIoU of shapes, %"
_RATIOS = (1.0, 0.5, 0.25)
_GRID = (Axis("train.inner_optimizer.lr", (1e-3, 1e-4)), Axis("train.weight_decay", (5e-5, 1e-5)))

# The paper says epochs, optimizer, scheduler, rates, decays and ratios (those below are the first of what it searched),
# and that the best model on the validation part counts. The batch is that of DGCNN's code. An outer step an epoch, the
# four terms of the Neumann series, of which `Identity(scale=4)` is the sum where steps are small, and the largest norm
# are taken from the paper's code for learned labels of pets: for ShapeNet there is none.
LEARNED = Experiment(
    name="shapenet-part",
    title="ShapeNet part: parts of shapes, with learned labels of their points as the auxiliary",
    about=(
        "Which part of its shape is each point of a cloud? In each of 16 categories, 30 shapes are labelled. A second "
        "network invents six classes of points for each category, and the auxiliary loss is to predict those. It is "
        "rewarded where that helps with the parts of two shapes a category that are kept apart."
    ),
    score_name=_SCORE,
    loss_names=("parts", "generated labels"),
    config=RunConfig(train=_TRAINING, labels=LabelsConfig(lr=1e-2, weight_decay=5e-3), task=LearnedOptions()),
    make_task=make_learned_task,
    methods=METHODS,
    grid=(
        *_GRID,
        Axis("labels.weight", _RATIOS, ("maxl-f", "maxl", "auxilearn-labels")),
        Axis("labels.lr", (1e-2, 1e-3), ("maxl", "auxilearn-labels")),
        Axis("labels.weight_decay", (5e-3, 5e-4), ("maxl", "auxilearn-labels")),
    ),
    findings=findings,
)

PRETEXT = Experiment(
    name="shapenet-part-pretext",
    title="ShapeNet part: parts of shapes, with a pretext task as the auxiliary",
    about=(
        "Which part of its shape is each point of a cloud? In each of 16 categories, 30 shapes are labelled. The "
        "auxiliary loss needs no labels: to take the noise from a cloud (dae), to say where the points of a collapsed "
        "region were (defrec), or where those of shuffled boxes (rs)."
    ),
    score_name=_SCORE,
    loss_names=("parts", "pretext"),
    config=RunConfig(train=_TRAINING, weighting={"equal": {"auxiliary_weight": 1.0}}, task=PretextOptions()),
    make_task=make_pretext_task,
    methods=("equal",),  # STL is the one of shapenet-part, whose BatchNorm sees no corrupted clouds
    settings={name: {"task.pretext": name} for name in PRETEXTS},
    grid=(*_GRID, Axis("weighting.equal.auxiliary_weight", _RATIOS, ("equal",))),
)
