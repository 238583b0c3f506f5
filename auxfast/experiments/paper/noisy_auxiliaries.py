"""A hundred auxiliary tasks, each noisier than the one before (paper, section C.3): do the weights tell how noisy?

One linear model (10 features, and a bias) has to fit them all:

    main           y = w . x + noise of deviation 1
    auxiliary j    y = w . x + |noise of variance j sigma^2|,  j = 1 ... 100, sigma = 0.25

The absolute value makes the noisy labels biased, and so less helpful still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.base import Experiment, Finding
from auxfast.experiments.data import allocate_auxiliary, draw_batch, split
from auxfast.experiments.paper.options import PaperCombiner, PaperTraining, check_range
from auxfast.experiments.paper.split_task import SplitTask, explained_variance
from auxfast.experiments.report.plotting import BLUE, GREY, new_figure, tidy
from auxfast.experiments.report.statistics import finished
from auxfast.solvers import Dense
from auxfast.train.config import Component, RunConfig
from auxfast.train.run import Run, read_config
from auxfast.train.task import WHOLE, Batch, Part

AUXILIARIES, FEATURES = 100, 10
VALIDATION, TEST = 200, 1000
BATCH = 256
LOSS_NAMES = ("main", *(f"auxiliary {j}" for j in range(1, AUXILIARIES + 1)))


@dataclass(frozen=True)
class NoisyAuxiliariesOptions:
    """Options of the experiment.

    labelled: number of samples to train on, those of the auxiliary set among them.
    auxiliary: number of samples in the auxiliary set.
    main_noise: deviation of the noise of the main labels.
    auxiliary_noise: the sigma above.
    """

    labelled: int = 1000
    auxiliary: int = 100
    main_noise: float = 1.0
    auxiliary_noise: float = 0.25

    def __post_init__(self) -> None:
        check_range("labelled", self.labelled, 4, 100_000)
        check_range("auxiliary", self.auxiliary, 1, self.labelled - 2)
        check_range("main_noise", self.main_noise, 0, 1000)
        check_range("auxiliary_noise", self.auxiliary_noise, 0, 1000)


@dataclass
class NoisyAuxiliariesTask(SplitTask):
    """An `auxfast.train.Task`. features: (n, 10). labels: (n, 101), noisy. target: (n,), without noise."""

    features: Tensor
    labels: Tensor
    target: Tensor
    loss_names: tuple[str, ...] = LOSS_NAMES

    def training_batch(self, generator: torch.Generator, part: Part = WHOLE) -> Batch:
        rows = part.of(draw_batch(self.training, BATCH, generator))
        return Batch((self.model(self.features[rows]) - self.labels[rows]).square(), None)

    def outer_loss(self) -> Tensor:
        predicted = self.model(self.features[self.auxiliary]).squeeze(1)
        return F.mse_loss(predicted, self.labels[self.auxiliary, self.main])

    def score_on(self, rows: Tensor) -> float:
        """Explained variance of the target without noise."""
        return explained_variance(self.model(self.features[rows]).squeeze(1), self.target[rows])


def noise_deviations(options: NoisyAuxiliariesOptions) -> Tensor:
    """Deviations (100,) of the noise of each auxiliary task, before the absolute value."""
    return options.auxiliary_noise * torch.arange(1, AUXILIARIES + 1).sqrt()


def make_task(seed: int, options: NoisyAuxiliariesOptions, *, hold_out: bool) -> NoisyAuxiliariesTask:
    """The task that `seed` draws: the weights w, features, noise and the split (see `MakeTask`)."""
    generator = torch.Generator().manual_seed(seed)
    count = options.labelled + VALIDATION + TEST
    labelled, validation, test = split(torch.arange(count), (options.labelled, VALIDATION, TEST), generator)
    training, auxiliary = allocate_auxiliary(labelled, options.auxiliary, generator, hold_out=hold_out)
    features = torch.randn(count, FEATURES, generator=generator)
    target = features @ torch.randn(FEATURES, generator=generator)
    main = options.main_noise * torch.randn(count, 1, generator=generator)
    others = (noise_deviations(options) * torch.randn(count, AUXILIARIES, generator=generator)).abs()
    model = nn.Linear(FEATURES, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return NoisyAuxiliariesTask(
        features=features,
        labels=target[:, None] + torch.cat([main, others], dim=1),
        target=target,
        training=training,
        auxiliary=auxiliary,
        validation=validation,
        test=test,
        model=model,
    )


def ranks(values: Tensor) -> Tensor:
    """Ranks (n,) float64 of the `values` (n,), counted from 1; equal values share the mean of their ranks."""
    below, not_above = (compare(values, values[:, None]).sum(dim=1) for compare in (torch.lt, torch.le))
    return (below + 1 + not_above).double() / 2


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: the correlation of the ranks of two (n,); NaN where one is constant."""
    both = torch.stack([ranks(first), ranks(second)])
    return torch.corrcoef(both)[0, 1].item()


def final_weights(run: Run) -> Tensor:
    """Weights (100,) of the auxiliary losses in the end."""
    return torch.tensor(run.records[-1].loss_weights[1:], dtype=torch.float64)


def _correlations(runs: Sequence[Run]) -> list[float]:
    return [rank_correlation(final_weights(run), _deviations(run)) for run in runs]


def _deviations(run: Run) -> Tensor:
    return noise_deviations(read_config(EXPERIMENT.config, run).task)


def findings(runs: Sequence[Run]) -> list[Finding]:
    """The figure that section C.3 gives as a picture."""
    if not (learned := finished(runs, "linear")):
        return []
    found = _correlations(learned)
    zeros = sum(int((final_weights(run) == 0).sum()) for run in learned) / len(learned)
    text = (
        f"The noisier the auxiliary, the smaller its weight: Spearman's rank correlation between weight and noise, "
        f"over {AUXILIARIES} auxiliaries, is {sum(found) / len(found):.3f} on average and {max(found):.3f} at worst "
        f"over {len(found)} seed{'s' * (len(found) > 1)} (-1: always smaller). On average {zeros:.0f} weights are 0."
    )
    return [Finding(text, max(found) <= -0.9)]


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Figure 6 of the paper: weight against noise, of every auxiliary and seed; to a PNG, if there is a learned run."""
    if not (learned := finished(runs, "linear")):
        return
    figure = new_figure(8.5, 5.2)
    ax = figure.subplots()
    for run in learned:
        ax.plot(_deviations(run), final_weights(run), ".", color=BLUE, alpha=0.25, markersize=6)
    deviations, start = _deviations(learned[0]), read_config(EXPERIMENT.config, learned[0]).combiner.initial_weight
    mean = torch.stack([final_weights(run) for run in learned]).mean(dim=0)
    label = f"mean of {len(learned)} seed{'s' * (len(learned) > 1)} (dots: each)"
    ax.plot(deviations, mean, color=BLUE, linewidth=2, label=label)
    ax.axhline(start, color=GREY, linewidth=1, linestyle=":", label="at the start")
    ax.legend(fontsize=9.5, framealpha=1, edgecolor="none")
    correlation = sum(_correlations(learned)) / len(learned)
    ax.set_title(f"rank correlation between weight and noise: {correlation:.3f}", fontsize=11)
    figure.suptitle("A hundred auxiliary tasks: learned weight against noise", fontweight="bold")
    ax.set_xlabel("noise of the auxiliary labels: its standard deviation before the absolute value")
    ax.set_ylabel("learned weight of the auxiliary loss")
    ax.set_ylim(bottom=0)
    tidy(ax)
    note = "Nothing tells the combiner how noisy a task is: it sees the losses only."
    figure.supxlabel(note, fontsize=9.5, color=GREY)
    figure.savefig(path)


# Chosen on seeds 1000 to 1002, by the rank correlation. Tried: outer lr 0.003 and 0.01, 20 and 40 outer steps, initial
# weights 0.02 and 0.1. The longer and faster they learn, the more weights are 0, whose order is lost, and the better is
# the score. With 900 main labels, though, the main loss needs no help: this is about the weights.
EXPERIMENT = Experiment(
    name="noisy-auxiliaries",
    title="Noisy auxiliaries: a hundred tasks, each noisier than the one before (paper, section C.3)",
    about=(
        "One linear model is trained on a hundred auxiliary regressions besides the main one. All have the same truth, "
        "but the labels of auxiliary j carry noise, and a bias, that grow with j. A learned weight for each should "
        "fall as the noise grows, though nothing but the main loss on the auxiliary set tells which are noisy. The "
        "score is not the point here: with 900 labels of its own, the main task needs no help."
    ),
    score_name="R2 x 100",
    loss_names=LOSS_NAMES,
    config=RunConfig(
        train=PaperTraining(
            outer_steps=40,
            inner_steps=20,
            inner_optimizer=Component("SGD", {"lr": 0.02}),
            outer_optimizer=Component("SGD", {"lr": 0.003, "momentum": 0.9}),
            solver=Dense(),
        ),
        combiner=PaperCombiner(initial_weight=0.1),
        weighting={"equal": {"auxiliary_weight": 0.1}},
        task=NoisyAuxiliariesOptions(),
    ),
    make_task=make_task,
    methods=("stl", "equal", "linear"),
    draw=draw,
    findings=findings,
)
