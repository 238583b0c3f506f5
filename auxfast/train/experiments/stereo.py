"""Segmentation of a photograph with depth as the auxiliary: losses are images, and the combiner is convolutional.

The paper's setting for NYUv2 (section 5.3), tiny. Nobody has labelled the garage, so the main task has labels that the
photograph itself gives: from grey levels alone, tell which class of colour a pixel has (grey: concrete and metal;
brown: wood and cardboard; red: paint). The auxiliary task is the measured disparity; neither contains the other. The
image is cut into tiles, and only some of those for training have main labels. What is unknown is masked: main losses of
tiles without labels and of pixels too dark to have a colour, depth losses of pixels where no disparity was measured.
Test tiles are of the same photograph: scores say how well one scene is filled in, and nothing of other scenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.data import StereoData, load_stereo, split, warn_if_auxiliary_set_is_large
from auxfast.data.stereo import COLOUR_CLASSES, UNKNOWN
from auxfast.solvers import MINRES
from auxfast.train.config import TrainConfig
from auxfast.train.experiments.base import IMAGE_METHODS, Experiment, Run
from auxfast.train.loop import Batch
from auxfast.train.loss_image_figure import draw_loss_images

TILE = 24  # pixels, at half the photograph's resolution
LABELLED, AUXILIARY, UNLABELLED, TEST = 40, 4, 50, 60  # tiles; the auxiliary ones are a part of the labelled
BATCH = 8  # labelled tiles, and as many unlabelled
FEATURES = 12
DRAWN = 4  # test tiles


@dataclass
class StereoTask:
    """An `auxfast.train.Task` of tiles.

    images: (n, 3, TILE, TILE): grey level, row and column (it is one scene that the model fills in). labels:
    (n, TILE, TILE) int64, UNKNOWN where not known. disparity: (n, TILE, TILE), standardised by the training tiles.
    valid: (n, TILE, TILE) bool.
    """

    images: Tensor
    labels: Tensor
    disparity: Tensor
    valid: Tensor
    training: Tensor
    unlabelled: Tensor
    auxiliary: Tensor
    test: Tensor
    model: nn.Module
    loss_names: tuple[str, ...] = ("segmentation", "depth")
    main: int = 0

    def training_batch(self, generator: torch.Generator) -> Batch:
        tiles = torch.cat([_draw(part, generator) for part in (self.training, self.unlabelled)])
        return self.losses(tiles)

    def losses(self, tiles: Tensor) -> Batch:
        """Losses and mask, each (len(tiles), 2, TILE, TILE)."""
        logits, disparity = self.model(self.images[tiles]).split([len(COLOUR_CLASSES), 1], dim=1)
        segmentation = F.cross_entropy(logits, self.labels[tiles], reduction="none")
        depth = (disparity.squeeze(1) - self.disparity[tiles]).square()
        known = torch.stack([self.labels[tiles] != UNKNOWN, self.valid[tiles]], dim=1)
        return Batch(torch.stack([segmentation, depth], dim=1), known)

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self._logits(self.auxiliary), self.labels[self.auxiliary])

    @torch.no_grad()
    def score(self) -> float:
        """Mean intersection over union of the classes, over all pixels of the test tiles together, in percent."""
        labels = self.labels[self.test]
        known = labels != UNKNOWN
        predicted, labels = self._logits(self.test).argmax(dim=1)[known], labels[known]
        classes = len(COLOUR_CLASSES)
        confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
        hits = confusion.diag()
        return 100 * (hits / (confusion.sum(0) + confusion.sum(1) - hits)).mean().item()

    def _logits(self, tiles: Tensor) -> Tensor:
        logits: Tensor = self.model(self.images[tiles])[:, : len(COLOUR_CLASSES)]
        return logits


def _draw(tiles: Tensor, generator: torch.Generator) -> Tensor:
    return tiles[torch.randperm(len(tiles), generator=generator)[:BATCH]]


def _model(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, dilation in ((3, 1), (FEATURES, 2), (FEATURES, 4)):
            layers += [nn.Conv2d(inputs, FEATURES, 3, padding=dilation, dilation=dilation), nn.SiLU()]
            assert isinstance(layers[-2], nn.Conv2d)
            nn.init.kaiming_normal_(layers[-2].weight)  # torch's default is too small to learn much in so few steps
        return nn.Sequential(*layers, nn.Conv2d(FEATURES, len(COLOUR_CLASSES) + 1, 1))


def _tiles(image: Tensor) -> Tensor:
    """(H, W) in tiles: (count, TILE, TILE); what is left over at the right and the bottom is dropped."""
    return image.unfold(0, TILE, TILE).unfold(1, TILE, TILE).flatten(0, 1)


def _places(data: StereoData) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel of the tiles, from -1 to 1; each (count, TILE, TILE)."""
    rows, columns = (torch.linspace(-1, 1, size) for size in data.valid.shape)
    down, across = torch.meshgrid(rows, columns, indexing="ij")
    return _tiles(down), _tiles(across)


def stereo_task(data: StereoData, seed: int, *, hold_out: bool) -> StereoTask:
    """The task that `seed` draws: the split of the tiles and the first weights.

    With `hold_out` the auxiliary tiles are kept from training; without (for methods that need no auxiliary set) they
    are trained on like all other labelled ones, so that every method has the same labels to spend.
    """
    generator = torch.Generator().manual_seed(seed)
    data = data.halved()
    grey, labels, disparity, valid = (
        _tiles(t) for t in (data.image.mean(dim=0), data.colour_classes(), data.disparity, data.valid)
    )
    sizes = (AUXILIARY, LABELLED - AUXILIARY, UNLABELLED, TEST)
    auxiliary, training, unlabelled, test = split(torch.arange(len(grey)), sizes, generator)
    warn_if_auxiliary_set_is_large(AUXILIARY, LABELLED)
    if not hold_out:
        training = torch.cat([training, auxiliary])
    seen = torch.cat([training, unlabelled])
    measured = disparity[seen][valid[seen]]
    labels = labels.clone()
    labels[unlabelled] = UNKNOWN
    return StereoTask(
        images=torch.stack([(grey - grey[seen].mean()) / grey[seen].std(), *_places(data)], dim=1),
        labels=labels,
        disparity=(disparity - measured.mean()) / measured.std(),
        valid=valid,
        training=training,
        unlabelled=unlabelled,
        auxiliary=auxiliary,
        test=test,
        model=_model(seed),
    )


@cache
def _data() -> StereoData:
    return load_stereo()


def _make_task(seed: int, *, hold_out: bool) -> StereoTask:
    return stereo_task(_data(), seed, hold_out=hold_out)


@torch.no_grad()
def draw_run(path: Path, run: Run) -> None:
    """Loss images of a run's first test tiles, and the weights that its combiner gives to their pixels."""
    task, combiner = run.task, run.combiner
    assert isinstance(task, StereoTask)
    assert combiner is not None
    tiles = task.test[:DRAWN]
    losses, mask = task.losses(tiles)
    weights = combiner.loss_weights(losses, mask)
    draw_loss_images(path, task.images[tiles, :1], losses, weights, task.loss_names, mask)


# Chosen on seeds 1000 to 1003, two to four at a time; the demo reports seeds from 0 on. Tried, in part with half as
# many labelled tiles: weight of depth 0.1, 0.3, 0.5; inner_lr 0.03, 0.05, 0.1; outer_lr 0.003, 0.01, 0.03 (the main
# loss's weight grew until training failed); five Neumann steps of size 0.1, whose residuals were 0.6 to 0.8 where those
# of MINRES with damping are 0.4. No weight of depth was clearly better than none.
EXPERIMENT = Experiment(
    name="stereo",
    title="Stereo: classes of colour from grey levels, and depth as the auxiliary, pixel by pixel",
    score_name="mIoU, %",
    loss_names=StereoTask.loss_names,
    config=TrainConfig(
        outer_steps=15,
        inner_steps=20,
        inner_lr=0.1,
        outer_lr=0.01,
        solver=MINRES(steps=8, damping=0.1),
    ),
    equal_weight=0.1,
    initial_weight=0.1,
    hidden=(8, 16),
    make_task=_make_task,
    methods=IMAGE_METHODS,
    package=("skimage", "scikit-image"),
    draw=draw_run,
)
