"""NYUv2 (paper, section 5.3, table 2, appendix B.2): which of 13 classes has each pixel of a room? Depth and surface
normals are the auxiliaries, and all losses are images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from auxfast.experiments.base import Experiment
from auxfast.experiments.data.catalogue import load_copy
from auxfast.experiments.data.nyuv2 import CLASSES, NYUv2Data
from auxfast.experiments.data.scenes import UNKNOWN
from auxfast.experiments.paper.loss_images import draw_learned
from auxfast.experiments.paper.scenes import (
    DEPTH_LOSS,
    GRID,
    METHODS,
    NORMAL_LOSS,
    SCORE,
    PixelTargets,
    SceneOptions,
    SceneTask,
    make_scene_task,
    scene_config,
    segmentation_loss,
)
from auxfast.train.run import Run

LOSS_NAMES = ("segmentation", "depth", "normals")
_TRAINING = 699  # of 795 scenes, 79 are for validation and 17 in the auxiliary set


@dataclass(frozen=True)
class NYUv2Options(SceneOptions):
    """See `SceneOptions`."""

    folder: str = "data/nyuv2"


def read(data: NYUv2Data, rows: Tensor, mirrored: Tensor) -> PixelTargets:
    """See `ReadScenes`. Depth and normals are known where a depth was measured, as in the paper's code."""
    scenes = data[rows].flipped(mirrored)
    measured = scenes.depths[:, 0] != 0
    known = torch.stack([scenes.labels != UNKNOWN, measured, measured], dim=1)
    return PixelTargets(scenes.images, (scenes.labels, scenes.depths, scenes.normals), known)


def make_task(seed: int, options: NYUv2Options, *, hold_out: bool) -> SceneTask:
    """The task that `seed` draws (see `MakeTask`).

    Raises:
        DatasetError: see `load_copy`.
    """
    data: NYUv2Data = load_copy("nyuv2", options.folder)
    return make_scene_task(
        seed,
        options,
        training=data.training,
        test=data.test,
        read=partial(read, data),
        pixel_losses=(segmentation_loss(CLASSES), DEPTH_LOSS, NORMAL_LOSS),
        loss_names=LOSS_NAMES,
        hold_out=hold_out,
    )


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Figure 3 of the paper: loss images of test scenes, and what their pixels weigh (see `draw_learned`)."""
    draw_learned(EXPERIMENT, path, runs)


EXPERIMENT = Experiment(
    name="nyuv2",
    title="NYUv2: classes of things in rooms, with depth and surface normals as auxiliaries, pixel by pixel",
    about=(
        "Which of 13 classes has each pixel of a photograph of a room? The auxiliary losses are to predict how far "
        "away each pixel is, and which way its surface faces. All losses are images: a convolutional combiner gives "
        "every pixel a weight."
    ),
    score_name=SCORE,
    loss_names=LOSS_NAMES,
    config=scene_config(NYUv2Options(), epochs=200, training=_TRAINING),
    make_task=make_task,
    methods=METHODS,
    grid=GRID,
    draw=draw,
)
