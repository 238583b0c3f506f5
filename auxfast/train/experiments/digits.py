"""Handwritten digits from ten labelled examples a class, with cheap attribute labels for many more.

The paper's setting for CUB (section 5.2) on real scans: naming the digit needs an expert, and only 10 scans a
class have that main label; somebody who cannot read digits has said of 1100 scans which attributes they see
("closed loop", "straight top", ...). That somebody is unreliable: attribute j is flipped with a probability
that rises from 0 for the first to 0.3 for the last. A scan without a main label has that loss masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.data import DigitsData, draw_per_class, load_digits, split, warn_if_auxiliary_set_is_large
from auxfast.data.digits import DIGIT_ATTRIBUTES
from auxfast.solvers import Neumann
from auxfast.train.config import TrainConfig
from auxfast.train.experiments.base import Experiment
from auxfast.train.loop import Batch

CLASSES, SHOTS, AUXILIARY_SHOTS = 10, 10, 1  # a class; the auxiliary shot is one of the ten
UNLABELLED, TEST = 1000, 600  # scans with attributes only; test scans
LABELLED_BATCH, UNLABELLED_BATCH = 32, 64
HIDDEN = 64
FLIPS = torch.linspace(0, 0.3, len(DIGIT_ATTRIBUTES))  # the probability that an attribute is wrong
LOSS_NAMES = (
    "main",
    *(f"{name}, {flip:.0%} wrong" for name, flip in zip(DIGIT_ATTRIBUTES, FLIPS, strict=True)),
)
UNKNOWN = -100  # F.cross_entropy ignores it: a main label that is not given cannot leak in


@dataclass
class DigitsTask:
    """An `auxfast.train.Task` of scans; the losses: a cross-entropy, and a binary one for each attribute.

    images: (n, 64). labels: (n,) int64, UNKNOWN for the scans without a main label. attributes: (n, 8) of
    0 and 1, as the unreliable annotator gave them.
    """

    images: Tensor
    labels: Tensor
    attributes: Tensor
    training: Tensor
    unlabelled: Tensor
    auxiliary: Tensor
    test: Tensor
    model: nn.Module
    loss_names: tuple[str, ...] = LOSS_NAMES
    main: int = 0

    def training_batch(self, generator: torch.Generator) -> Batch:
        rows = _draw(self.training, LABELLED_BATCH, generator)
        labelled = len(rows)
        rows = torch.cat([rows, _draw(self.unlabelled, UNLABELLED_BATCH, generator)])
        digits, attributes = self.model(self.images[rows]).tensor_split([CLASSES], dim=1)
        main = F.cross_entropy(digits, self.labels[rows], reduction="none")
        others = F.binary_cross_entropy_with_logits(attributes, self.attributes[rows], reduction="none")
        losses = torch.cat([main[:, None], others], dim=1)
        mask = torch.ones_like(losses)
        mask[labelled:, self.main] = 0
        return Batch(losses, mask)

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self._digits(self.auxiliary), self.labels[self.auxiliary])

    @torch.no_grad()
    def score(self) -> float:
        """Accuracy on the test scans, in percent."""
        hits = self._digits(self.test).argmax(dim=1) == self.labels[self.test]
        return 100 * hits.float().mean().item()

    def _digits(self, rows: Tensor) -> Tensor:
        """Logits of the classes, (len(rows), 10)."""
        logits: Tensor = self.model(self.images[rows])[:, :CLASSES]
        return logits


def _draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def digits_task(data: DigitsData, seed: int, *, hold_out: bool) -> DigitsTask:
    """The task that `seed` draws: the split, the flips and the first weights.

    With `hold_out` the auxiliary scans are kept from training; without (for methods that need no auxiliary
    set) they are trained on like all others, so that every method has the same labels to spend.
    """
    generator = torch.Generator().manual_seed(seed)
    labelled, others = draw_per_class(data.labels, SHOTS, generator)
    sizes = (CLASSES * AUXILIARY_SHOTS, CLASSES * (SHOTS - AUXILIARY_SHOTS))
    auxiliary, training = split(labelled, sizes, generator, data.labels[labelled])
    unlabelled, test = split(others, (UNLABELLED, TEST), generator, data.labels[others])
    warn_if_auxiliary_set_is_large(len(auxiliary), len(labelled))
    if not hold_out:
        training = torch.cat([training, auxiliary])
    known = data.labels.clone()
    known[unlabelled] = UNKNOWN
    given = data.attributes()
    flipped = torch.rand(given.shape, generator=generator) < FLIPS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(data.images.shape[1], HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, CLASSES + given.shape[1])
        )
    return DigitsTask(
        images=data.images,
        labels=known,
        attributes=torch.where(flipped, 1 - given, given),
        training=training,
        unlabelled=unlabelled,
        auxiliary=auxiliary,
        test=test,
        model=model,
    )


@cache
def _data() -> DigitsData:
    return load_digits()


def _make_task(seed: int, *, hold_out: bool) -> DigitsTask:
    return digits_task(_data(), seed, hold_out=hold_out)


# Chosen on seeds 1000 to 1029, by the mean test scores there; the demo reports seeds from 0 on. Tried: weight of
# `equal` 0.1 to 2; inner_lr 0.05 to 0.3; weight_decay 0 to 1e-2; outer_lr 0.03 to 0.5; Neumann steps 5, 10, 20; step
# size 0.05, 0.1 (diverges now and then), 0.2 (often); one, two and five layers of 10. With ReLU for softplus all scores
# are up to 0.5 higher, but the series diverges in the first outer steps. Weighting wins little here: with weights set
# by hand from the true flip rates, scores were within noise of those of the best common weight.
EXPERIMENT = Experiment(
    name="digits",
    title="Digits: ten labels a class, and eight unreliable attributes as auxiliaries",
    score_name="accuracy, %",
    loss_names=LOSS_NAMES,
    config=TrainConfig(
        outer_steps=30,
        inner_steps=20,
        inner_lr=0.1,
        outer_lr=0.1,
        weight_decay=3e-3,
        max_grad_norm=0.5,
        solver=Neumann(steps=10, step_size=0.05),
    ),
    equal_weight=1.0,
    initial_weight=1.0,
    hidden=(10, 10),
    make_task=_make_task,
)
