"""The task of NYUv2 and Cityscapes (paper, section 5.3, appendices B.2, C.8): several predictions for each pixel of a
scene, whose losses are images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.base import Axis
from auxfast.experiments.data import allocate_auxiliary, draw_batch, split
from auxfast.experiments.data.scenes import UNKNOWN
from auxfast.experiments.metrics import confusion_matrix, mean_iou, mean_iou_of_images, pixel_accuracy
from auxfast.experiments.models import Activation, Norm, SegNet
from auxfast.experiments.paper.loss_images import LossImageTask
from auxfast.experiments.paper.options import PaperCombiner, PaperTraining, check_range, training_length
from auxfast.experiments.paper.split_task import evaluating
from auxfast.solvers import Identity
from auxfast.train.config import Component, RunConfig
from auxfast.train.task import WHOLE, Batch, Part
from auxfast.train.training_loss import main_loss

VALIDATION = 0.1  # share of the official training part
SCORE = "mIoU, %"
METHODS = (
    *("stl", "equal", "uncertainty", "dwa", "gradnorm", "mgda", "gcs"),
    *("linear-frozen", "linear", "deep-linear-frozen", "deep-linear", "nonlinear-frozen", "nonlinear"),
    *("conv-frozen", "conv"),
)
_COMBINERS = ("linear", "deep-linear", "nonlinear", "conv")
GRID = (
    Axis("train.outer_optimizer.lr", (1e-3, 5e-4, 1e-4), _COMBINERS),
    Axis("combiner.weight_decay", (1e-5, 1e-4), _COMBINERS),
)
_BATCH = 8  # scenes in a batch, in the paper's code
_INNER_STEPS = 50  # between outer steps, in the paper's code
_CHUNK = 8  # scenes that are scored at once, so that memory does not grow with the test part


@dataclass(frozen=True)
class SceneOptions:
    """Options of the experiments with scenes.

    folder: a copy of the data set, relative to the working directory.
    auxiliary: share of the labelled scenes, without those for validation, that are the auxiliary set: at least one.
    batch_size: scenes in a batch.
    mirror: whether every second training scene, by chance, has left and right exchanged. MTAN's code can do so, the
        paper's does not.
    widths, norm, activation: see `SegNet`. The paper's code has 1024 channels in the last block, MTAN's has 512.
    """

    folder: str
    auxiliary: float = 0.025
    batch_size: int = _BATCH
    mirror: bool = False
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    norm: Norm = "batch"
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        check_range("auxiliary", self.auxiliary, 0, 0.5)
        check_range("batch_size", self.batch_size, 1, 10_000)


class PixelTargets(NamedTuple):
    """A batch of k scenes with what is to be predicted.

    images: (k, 3, H, W) float32 from 0 to 1.
    targets: what each loss takes beside the prediction, (k, ..., H, W).
    known: (k, num_losses, H, W) bool: where there is a target.
    """

    images: Tensor
    targets: tuple[Tensor, ...]
    known: Tensor

    def to(self, device: torch.device) -> PixelTargets:
        """The batch on another device."""
        return PixelTargets(
            self.images.to(device), tuple(target.to(device) for target in self.targets), self.known.to(device)
        )


ReadScenes = Callable[[Tensor, Tensor], PixelTargets]
"""Reads the scenes of some rows, (k,) int64, those with left and right exchanged that are chosen, (k,) bool."""


class PixelLoss(NamedTuple):
    """One loss of each pixel.

    channels: those of the prediction.
    of: maps predictions (k, channels, H, W) and targets to losses (k, H, W).
    """

    channels: int
    of: Callable[[Tensor, Tensor], Tensor]


def segmentation_loss(classes: int) -> PixelLoss:
    """The cross-entropy. Its targets are labels (k, H, W), `UNKNOWN` where there is none."""
    return PixelLoss(classes, partial(F.cross_entropy, ignore_index=UNKNOWN, reduction="none"))


def _absolute_error(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).abs().squeeze(1)


def _cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(predicted, target, dim=1)


DEPTH_LOSS = PixelLoss(1, _absolute_error)
"""The absolute error. Its targets are (k, 1, H, W)."""

NORMAL_LOSS = PixelLoss(3, _cosine_distance)
"""1 - cosine of the angle between the vectors. Its targets are (k, 3, H, W)."""


class SegmentationScores(NamedTuple):
    """Scores of the main task, in percent.

    of_images: mean over the images of their mIoU, as the paper's code has it (see `mean_iou_of_images`).
    of_pixels: mIoU of all pixels together (see `mean_iou`).
    accuracy: percentage of the known pixels that are predicted right.
    """

    of_images: float
    of_pixels: float
    accuracy: float


@dataclass(kw_only=True)
class SceneTask(LossImageTask):
    """An `auxfast.train.Task` of scenes in files. The model, a SegNet, maps images (k, 3, H, W) to a tuple of one
    prediction a loss; the main one is a segmentation.

    read: gives images and targets. pixel_losses: one for each of the `loss_names`. batch_size, mirror: see
    `SceneOptions`.
    """

    read: ReadScenes
    pixel_losses: Sequence[PixelLoss]
    batch_size: int
    mirror: bool

    def training_batch(self, generator: torch.Generator, part: Part = WHOLE) -> Batch:
        rows = draw_batch(self.training, self.batch_size, generator)
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
        return self._losses(self._read(part.of(rows), part.of(mirrored & self.mirror)))

    def losses(self, rows: Tensor) -> Batch:
        """See `LossImageTask`. Where there is no target, a loss is 0, whatever the prediction."""
        return self._losses(self._read(rows))

    def pictures(self, rows: Tensor) -> Tensor:
        """The scenes as photographs."""
        return self._read(rows).images.clamp(0, 1)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of encoder and decoder, without the losses' own heads."""
        return chain.from_iterable(self.model.get_submodule(part).parameters() for part in ("encoder", "decoder"))

    def outer_loss(self) -> Tensor:
        return main_loss(self.losses(self.auxiliary), self.main)

    def score_on(self, rows: Tensor) -> float:
        return self.segmentation_scores(rows).of_images

    def further_scores(self) -> dict[str, float]:
        """The other scores of table 2, and mIoU as most others compute it."""
        scores = self.segmentation_scores(self.test)
        return {"mIoU of all pixels, %": scores.of_pixels, "pixel accuracy, %": scores.accuracy}

    @torch.no_grad()
    def segmentation_scores(self, rows: Tensor) -> SegmentationScores:
        """Scores of the model on the scenes of these indices, (n,)."""
        classes = self.pixel_losses[self.main].channels
        confusion = torch.zeros(classes, classes, dtype=torch.int64)
        of_images = []
        with evaluating(self.model):
            for chunk in rows.split(_CHUNK):
                scenes = self._read(chunk)
                predicted = self.model(scenes.images)[self.main].argmax(dim=1)
                labels = scenes.targets[self.main]
                confusion += confusion_matrix(predicted, labels, classes, ignored=UNKNOWN).cpu()
                of_images += [
                    mean_iou_of_images(guess[None], truth[None], classes, ignored=UNKNOWN, count_ignored=True)
                    for guess, truth in zip(predicted, labels, strict=True)
                    if bool((truth != UNKNOWN).any())
                ]
        of_pixels = mean_iou(confusion)  # it raises where no pixel is known, which is no mean of images either
        return SegmentationScores(fmean(of_images), of_pixels, pixel_accuracy(confusion))

    def _losses(self, scenes: PixelTargets) -> Batch:
        predictions = self.model(scenes.images)
        each = [
            loss.of(predicted, target)
            for loss, predicted, target in zip(self.pixel_losses, predictions, scenes.targets, strict=True)
        ]
        return Batch(torch.stack(each, dim=1).where(scenes.known, 0.0), scenes.known)

    def _read(self, rows: Tensor, mirrored: Tensor | None = None) -> PixelTargets:
        """The scenes on the model's device; none is mirrored, unless it is said which are."""
        if mirrored is None:
            mirrored = torch.zeros(len(rows), dtype=torch.bool)
        return self.read(rows.cpu(), mirrored).to(next(self.model.parameters()).device)


def make_scene_task(
    seed: int,
    options: SceneOptions,
    *,
    training: Tensor,
    test: Tensor,
    read: ReadScenes,
    pixel_losses: Sequence[PixelLoss],
    loss_names: tuple[str, ...],
    hold_out: bool,
) -> SceneTask:
    """The task that `seed` draws: the split of the official `training` rows, (n,), and the first weights (see
    `MakeTask`). The first loss is the main one."""
    generator = torch.Generator().manual_seed(seed)
    validation_size = max(1, int(VALIDATION * len(training)))
    labelled, validation = split(training, (len(training) - validation_size, validation_size), generator)
    auxiliary_size = max(1, int(options.auxiliary * len(labelled)))
    own, auxiliary = allocate_auxiliary(labelled, auxiliary_size, generator, hold_out=hold_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outputs = [loss.channels for loss in pixel_losses]
        model = SegNet(outputs, widths=options.widths, norm=options.norm, activation=options.activation)
    return SceneTask(
        training=own,
        auxiliary=auxiliary,
        validation=validation,
        test=test,
        model=model,
        loss_names=loss_names,
        read=read,
        pixel_losses=pixel_losses,
        batch_size=options.batch_size,
        mirror=options.mirror,
    )


def scene_config(options: SceneOptions, *, epochs: int, training: int, weight_decay: float = 0.0) -> RunConfig:
    """The paper's settings for scenes, of which `training` are trained on where an auxiliary set is held out.

    Appendices B.2 and C.8 say the optimizers, the rates and that the best model on the validation part counts. The rest
    is the paper's code for NYUv2: batches of 8, an outer step after 50 inner ones, hypergradients of norm 25 at most,
    and four terms of the Neumann series, without the factor that makes the series an inverse. Its step size, 1e-4, is
    so small that the terms are about equal (to within 1e-4 times the curvature): `Identity(scale=4)` stands for them.

    Two things differ from that code. Its outer loss is of two scenes of the auxiliary set, by chance, and here of all,
    which takes more memory: 0.6 GB a scene of NYUv2, 10 GB for its auxiliary set. And its linear and nonlinear
    combiners see the mean losses of an image, where those of auxfast see each pixel as a sample.
    """
    epoch = math.ceil(training / _BATCH)
    return RunConfig(
        train=PaperTraining(
            **training_length(epochs, training, _BATCH, _INNER_STEPS),
            inner_optimizer=Component("Adam", {"lr": 1e-4}),
            inner_scheduler=Component("StepLR", {"step_size": 100 * epoch, "gamma": 0.5}),
            outer_optimizer=Component("SGD", {"lr": 1e-3, "momentum": 0.9}),
            solver=Identity(scale=4.0),
            weight_decay=weight_decay,
            max_outer_grad_norm=25.0,
        ),
        combiner=PaperCombiner(hidden=(3,), channels=(8, 16), weight_decay=1e-4),
        weighting={"dwa": {"temperature": 2.0, "period": epoch}, "gradnorm": {"alpha": 1.5}},
        task=options,
    )
