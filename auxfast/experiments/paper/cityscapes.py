"""Cityscapes (paper, appendix C.8, table 6): which of 19 classes has each pixel of a street? Coarser classes, 7 and 2
of them, and inverse depth are the auxiliaries, and all losses are images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from auxfast.experiments.base import Axis, Experiment
from auxfast.experiments.data.catalogue import load_copy
from auxfast.experiments.data.cityscapes import GRANULARITIES, CityscapesData
from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.scenes import UNKNOWN
from auxfast.experiments.paper.loss_images import draw_learned
from auxfast.experiments.paper.scenes import (
    DEPTH_LOSS,
    GRID,
    METHODS,
    SCORE,
    PixelTargets,
    SceneOptions,
    SceneTask,
    make_scene_task,
    scene_config,
    segmentation_loss,
)
from auxfast.train.run import Run

LOSS_NAMES = (*(f"{classes} classes" for classes in GRANULARITIES), "depth")
_TRAINING = 2612  # of 2975 scenes, 297 are for validation and 66 in the auxiliary set


@dataclass(frozen=True)
class CityscapesOptions(SceneOptions):
    """See `SceneOptions`."""

    folder: str = "data/cityscapes"


def read(data: CityscapesData, rows: Tensor, mirrored: Tensor) -> PixelTargets:
    """See `ReadScenes`. The depth is known where it was measured."""
    scenes = data[rows].flipped(mirrored)
    labels = [scenes.labels[classes] for classes in GRANULARITIES]
    known = torch.stack([*(own != UNKNOWN for own in labels), scenes.inverse_depths[:, 0] != 0], dim=1)
    return PixelTargets(scenes.images, (*labels, scenes.inverse_depths), known)


def make_task(seed: int, options: CityscapesOptions, *, hold_out: bool) -> SceneTask:
    """The task that `seed` draws (see `MakeTask`).

    Raises:
        DatasetError: see `load_copy`; or the copy has no labels of 19 classes.
    """
    data: CityscapesData = load_copy("cityscapes", options.folder)
    if data.granularities != GRANULARITIES:
        raise DatasetError(
            f"{options.folder}: labels of at most {max(data.granularities)} classes, expected those of "
            f"{max(GRANULARITIES)}, the main task, in label_{max(GRANULARITIES)}"
        )
    return make_scene_task(
        seed,
        options,
        training=data.training,
        test=data.test,
        read=partial(read, data),
        pixel_losses=(*map(segmentation_loss, GRANULARITIES), DEPTH_LOSS),
        loss_names=LOSS_NAMES,
        hold_out=hold_out,
    )


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Loss images of test scenes, and what their pixels weigh (see `draw_learned`)."""
    draw_learned(EXPERIMENT, path, runs)


# The paper says 150 epochs and the search over the weight decay, and for all else refers to NYUv2.
EXPERIMENT = Experiment(
    name="cityscapes",
    title="Cityscapes: 19 classes of things in streets, with coarser classes and depth as auxiliaries, pixel by pixel",
    about=(
        "Which of 19 classes has each pixel of a photograph of a street? The auxiliary losses are to tell 7 and 2 "
        "coarser classes, and to predict how near each pixel is. All losses are images: a convolutional combiner gives "
        "every pixel a weight."
    ),
    score_name=SCORE,
    loss_names=LOSS_NAMES,
    config=scene_config(CityscapesOptions(), epochs=150, training=_TRAINING, weight_decay=1e-4),
    make_task=make_task,
    methods=METHODS,
    grid=(Axis("train.weight_decay", (1e-4, 1e-5)), *GRID),
    draw=draw,
)
