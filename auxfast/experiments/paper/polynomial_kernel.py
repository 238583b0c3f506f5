"""Linear weights of a polynomial kernel over the losses (paper, section C.5): do products of losses get weight?

The paper combines segmentation, depth and normals. Here a network reads scikit-learn's digits, and has three tasks:

    digit        which of the ten it is: cross-entropy; the main task, ten labelled scans a class
    attributes   eight yes-or-no questions to its shape ("closed loop", ...): the mean of their cross-entropies
    picture      the scan itself, from the hidden layer: the mean squared error of the pixels, over their variance

The combiner is linear in these three losses, their squares and their products. All start at 0 but the weights of the
two auxiliaries; the main loss is added with a weight of 1, on top of its learned one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.base import Experiment, Finding
from auxfast.experiments.data import allocate_auxiliary, draw_batch, draw_per_class, load_digits, split
from auxfast.experiments.metrics import accuracy
from auxfast.experiments.paper.options import PaperCombiner, PaperTraining, check_range
from auxfast.experiments.paper.split_task import SplitTask
from auxfast.experiments.report.plotting import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    draw_course,
    new_figure,
    tidy,
)
from auxfast.experiments.report.statistics import better, estimate, finished
from auxfast.nn import PolynomialCombiner
from auxfast.solvers import MINRES
from auxfast.train.config import CombinerConfig, Component, RunConfig
from auxfast.train.run import Run, read_config
from auxfast.train.task import WHOLE, Batch, Part

CLASSES, VALIDATION, TEST = 10, 200, 600
BATCH, HIDDEN = 64, 64
LOSS_NAMES = ("digit", "attributes", "picture")
_load = cache(load_digits)


@dataclass(frozen=True)
class PolynomialKernelOptions:
    """Options of the experiment.

    shots, auxiliary_shots: number of labelled scans a class, and of those among them that are the auxiliary set.
    """

    shots: int = 10
    auxiliary_shots: int = 1

    def __post_init__(self) -> None:
        check_range("shots", self.shots, 2, 90)
        check_range("auxiliary_shots", self.auxiliary_shots, 1, self.shots - 1)


class ThreeHeads(nn.Module):
    """One hidden layer, and a linear head for each task."""

    def __init__(self, pixels: int, attributes: int) -> None:
        super().__init__()
        self.sizes = [CLASSES, attributes, pixels]
        self.layers = nn.Sequential(nn.Linear(pixels, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, sum(self.sizes)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: (batch, pixels) -> (batch, 10), (batch, attributes), (batch, pixels)."""
        return torch.split(self.layers(images), self.sizes, dim=1)


@dataclass
class PolynomialKernelTask(SplitTask):
    """An `auxfast.train.Task` of scans. images: (n, 64). labels: (n,) int64. attributes: (n, 8) of 0 and 1."""

    images: Tensor
    labels: Tensor
    attributes: Tensor
    loss_names: tuple[str, ...] = LOSS_NAMES

    def training_batch(self, generator: torch.Generator, part: Part = WHOLE) -> Batch:
        rows = part.of(draw_batch(self.training, BATCH, generator))
        images = self.images[rows]
        digits, attributes, pictures = self.model(images)
        main = F.cross_entropy(digits, self.labels[rows], reduction="none")
        others = F.binary_cross_entropy_with_logits(attributes, self.attributes[rows], reduction="none").mean(dim=1)
        variance = self.images[self.training].var(dim=0).mean()
        error = (pictures - images).square().mean(dim=1) / variance
        return Batch(torch.stack([main, others, error], dim=1), None)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the hidden layer; in the last one, each loss has rows of its own."""
        return self.model.get_submodule("layers.0").parameters()

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.images[self.auxiliary])[0], self.labels[self.auxiliary])

    def score_on(self, rows: Tensor) -> float:
        return accuracy(self.model(self.images[rows])[0], self.labels[rows])


def make_task(seed: int, options: PolynomialKernelOptions, *, hold_out: bool) -> PolynomialKernelTask:
    """The task that `seed` draws: the split and the first weights (see `MakeTask`)."""
    data = _load()
    generator = torch.Generator().manual_seed(seed)
    labelled, others = draw_per_class(data.labels, options.shots, generator)
    training, auxiliary = allocate_auxiliary(
        labelled, CLASSES * options.auxiliary_shots, generator, data.labels[labelled], hold_out=hold_out
    )
    validation, test = split(others, (VALIDATION, TEST), generator, data.labels[others])
    attributes = data.attributes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ThreeHeads(data.images.shape[1], attributes.shape[1])
    return PolynomialKernelTask(
        images=data.images,
        labels=data.labels,
        attributes=attributes,
        training=training,
        auxiliary=auxiliary,
        validation=validation,
        test=test,
        model=model,
    )


def monomial_names(degree: int) -> list[str]:
    """Names of the terms in the order of the combiner's phi: "digit", ..., "digit^2", "digit · attributes", ..."""
    names = []
    for monomial in PolynomialCombiner(len(LOSS_NAMES), degree).monomials:
        powers = {LOSS_NAMES[j]: monomial.count(j) for j in monomial}
        names.append(" · ".join(f"{name}^{power}" if power > 1 else name for name, power in powers.items()))
    return names


def monomial_weights(run: Run) -> Tensor:
    """Weights (outer steps, monomials), the skip's 1 of the main loss included."""
    weights = torch.tensor([record.phi for record in run.records], dtype=torch.float64)
    weights[:, 0] += 1.0 * _combiner(run).skip
    return weights


def _combiner(run: Run) -> CombinerConfig:
    return read_config(EXPERIMENT.config, run).combiner


def _learned(runs: Sequence[Run]) -> list[Run]:
    """Runs whose phi is recorded: that of higher degrees has too many entries."""
    return [run for run in finished(runs, "polynomial") if all(record.phi is not None for record in run.records)]


def findings(runs: Sequence[Run]) -> list[Finding]:
    """The claims of section C.5 and Figure 8, and what they are worth."""
    if not (learned := _learned(runs)):
        return []
    last = torch.stack([monomial_weights(run)[-1] for run in learned]).mean(dim=0)  # (monomials,)
    names = monomial_names(_combiner(learned[0]).degree)
    largest = last.topk(3).indices.tolist()
    listed = ", ".join(f"{names[i]} ({last[i]:.2f})" for i in largest)
    products = sum(i >= len(LOSS_NAMES) for i in largest)
    text = f"Products of losses end among the three largest mean weights: {products} of {listed}."
    comparisons = [better(runs, "polynomial", baseline) for baseline in ("stl", "linear", "polynomial-frozen")]
    return [Finding(text, products > 0), _main_grows(learned), *comparisons]


def main_share(run: Run) -> list[float]:
    """The main loss's share of the weights d (training loss) / d (loss), at every outer step."""
    return [record.loss_weights[0] / sum(record.loss_weights) for record in run.records]


def _main_grows(runs: Sequence[Run]) -> Finding:
    shares = [main_share(run) for run in runs]
    growth = estimate([100 * (share[-1] - share[0]) for share in shares])
    first, last = (100 * sum(share[at] for share in shares) / len(shares) for at in (0, -1))
    text = (
        f"Attention turns to the main loss: its share of the losses' weights goes from {first:.0f}% to {last:.0f}%, "
        f"{growth.signed()} percentage points over {len(runs)} seed{'s' * (len(runs) > 1)}."
    )
    return Finding(text, growth.above_noise())


def draw(path: Path, runs: Sequence[Run]) -> None:
    """The weight of each monomial over the outer steps, as in Figure 8 of the paper; and the main loss's share; to a
    PNG, if there is a learned run."""
    if not (learned := _learned(runs)):
        return
    figure = new_figure(12.5, 5.4)
    figure.suptitle("Weights of the losses, their squares and their products, as they are learned", fontweight="bold")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    colours = (BLACK, BLUE, GREEN, GREY, RED, ORANGE, SKY, PURPLE)
    for i, name in enumerate(monomial_names(_combiner(learned[0]).degree)):
        courses = [monomial_weights(run)[:, i].tolist() for run in learned]
        draw_course(left, courses, colours[i % len(colours)], name, "-" if i < len(LOSS_NAMES) else "--")
    draw_course(right, [[100 * share for share in main_share(run)] for run in learned], BLACK, "digit (main)")
    left.legend(
        fontsize=9.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), title="solid: losses\ndashed: products"
    )
    left.set_ylabel("weight in the training loss")
    left.set_title(f"Weight of each term ({len(learned)} seeds)", fontsize=11)
    right.set_ylabel("share of d training loss / d loss, %")
    right.set_title("The main loss's share of all", fontsize=11)
    for ax in (left, right):
        ax.set_xlabel("outer step")
        ax.set_ylim(bottom=0)
        tidy(ax)
    figure.supxlabel(
        "Mean over seeds ± one standard deviation. With products, a loss's weight depends on a sample's other losses.",
        fontsize=9.5,
        color=GREY,
    )
    figure.savefig(path)


# Chosen on seeds 1000 to 1003. Tried: outer lr 0.03, 0.1, 0.3 (mean accuracies of 89.9, 90.0, 90.0); initial weights of
# 0.5 and 1. All methods score within noise of each other, so the outer lr is one that shows the weights move. As
# training losses are soon far below 1, products of them weigh little in the end, whatever their coefficients.
EXPERIMENT = Experiment(
    name="polynomial-kernel",
    title="Polynomial kernel: weights for products of losses (paper, section C.5)",
    about=(
        "A network learns to read digits from ten scans a class and, as auxiliary tasks, to answer questions to their "
        "shape and to redraw the scan. The training loss is a weighted sum of the three losses, their squares and "
        "their products, and all nine weights are learned."
    ),
    score_name="accuracy, %",
    loss_names=LOSS_NAMES,
    config=RunConfig(
        train=PaperTraining(
            outer_steps=60,
            inner_steps=20,
            inner_optimizer=Component("SGD", {"lr": 0.05, "momentum": 0.9}),
            outer_optimizer=Component("SGD", {"lr": 0.1, "momentum": 0.9}),
            solver=MINRES(steps=10, damping=0.01),
            weight_decay=3e-3,
        ),
        combiner=PaperCombiner(initial_weight=0.5),
        task=PolynomialKernelOptions(),
    ),
    make_task=make_task,
    methods=("stl", "linear", "polynomial-frozen", "polynomial"),
    package=("sklearn", "scikit-learn"),
    draw=draw,
    findings=findings,
)
