"""The paper's illustrative example (section 5.1): learned weights change the loss landscape.

A linear model with weights w in R^2, which three regressions share:

    main       y = w* . x + noise of deviation 4         w* = (1, 1)
    helpful    y = w* . x + noise of deviation 0.5
    harmful    y = w~ . x + noise of deviation 0.5       w~ = (2, -4)

The paper leaves open how many samples there are. Of ours, 200 are labelled; 20 of them are the auxiliary set, and these
have been measured with care (no noise), as in the `diabetes` experiment. With the noise of the others (try
`--set task.careful_noise=4`), 20 labels tell less of w* than the 180 to train on do, and the weights fit that noise:
of 20 seeds, the harmful weight then goes to zero with 11, and the learned minimum is nearer to w* with 3.

In the setting "training set" the weights are learned on the training set instead (section C.1 and Figure 5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.base import Experiment, Finding
from auxfast.experiments.data import allocate_auxiliary, split
from auxfast.experiments.paper.options import PaperCombiner, PaperTraining, check_range
from auxfast.experiments.report.plotting import BLACK, BLUE, GREY, RED, draw_course, new_figure, tidy
from auxfast.experiments.report.statistics import estimate, finished
from auxfast.solvers import Dense
from auxfast.train.config import Component, RunConfig, TrainConfig
from auxfast.train.optimizers import make_optimizer
from auxfast.train.run import Run, read_config
from auxfast.train.task import WHOLE, Batch, Part

MAIN_WEIGHTS, HARMFUL_WEIGHTS = (1.0, 1.0), (2.0, -4.0)  # w* and w~
VALIDATION = 100
TRAINING_SET = "training set"  # name of the setting
NEGLIGIBLE, NEARLY_ALL = 0.05, 0.9  # shares of all weights; at the start, each loss has a third


@dataclass(frozen=True)
class IllustrativeOptions:
    """Options of the experiment.

    labelled: number of samples to train on, those of the auxiliary set among them.
    auxiliary: number of samples in the auxiliary set.
    main_noise, other_noise: deviation of the noise of the main labels, and of the auxiliary ones.
    careful_noise: deviation of the noise of the main labels in the auxiliary set.
    """

    labelled: int = 200
    auxiliary: int = 20
    main_noise: float = 4.0
    other_noise: float = 0.5
    careful_noise: float = 0.0

    def __post_init__(self) -> None:
        check_range("labelled", self.labelled, 4, 100_000)
        check_range("auxiliary", self.auxiliary, 1, self.labelled - 2)
        for name in ("main_noise", "other_noise", "careful_noise"):
            check_range(name, getattr(self, name), 0, 1000)


@dataclass
class IllustrativeTask:
    """An `auxfast.train.Task`; the batch is the whole training part. features: (n, 2). labels: (n, 3).

    There is no test part: w* is known, and the score is measured against it.
    """

    features: Tensor
    labels: Tensor
    training: Tensor
    auxiliary: Tensor
    validation: Tensor
    model: nn.Module
    loss_names: tuple[str, ...] = ("main", "helpful", "harmful")
    main: int = 0

    def training_batch(self, generator: torch.Generator, part: Part = WHOLE) -> Batch:
        rows = part.of(self.training)
        predicted = self.model(self.features[rows])  # (batch, 1)
        return Batch((predicted - self.labels[rows]).square(), None)

    def outer_loss(self) -> Tensor:
        return self._main_loss(self.auxiliary)

    @torch.no_grad()
    def validation_score(self) -> float:
        """Minus the mean squared error."""
        return -self._main_loss(self.validation).item()

    @torch.no_grad()
    def score(self) -> float:
        """Minus 100 times the distance from w to w*."""
        return -100 * distance(weights_of(self.model))

    def _main_loss(self, rows: Tensor) -> Tensor:
        return F.mse_loss(self.model(self.features[rows]).squeeze(1), self.labels[rows, self.main])

    def landscape(self, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The weighted training loss, divided by the sum of the `weights`, as a function of w, is
        (w - minimum) . curvature (w - minimum) + constant. Returns minimum (2,) and curvature (2, 2)."""
        features = self.features[self.training].double()
        target = self.labels[self.training].double() @ torch.tensor(weights, dtype=torch.float64) / sum(weights)
        curvature = features.T @ features / len(features)
        return torch.linalg.solve(curvature, features.T @ target / len(features)), curvature


def weights_of(model: nn.Module) -> Tensor:
    """A copy of w: (2,), float64."""
    return model.get_parameter("weight")[0].detach().double()


def distance(w: Tensor) -> float:
    """Distance from w (2,) to w*."""
    return math.dist(w.tolist(), MAIN_WEIGHTS)


def make_task(seed: int, options: IllustrativeOptions, *, hold_out: bool) -> IllustrativeTask:
    """The task that `seed` draws: features, noise and the split (see `MakeTask`)."""
    generator = torch.Generator().manual_seed(seed)
    count = options.labelled + VALIDATION
    labelled, validation = split(torch.arange(count), (options.labelled, VALIDATION), generator)
    training, auxiliary = allocate_auxiliary(labelled, options.auxiliary, generator, hold_out=hold_out)
    features = torch.randn(count, 2, generator=generator)
    deviations = torch.full((count, 3), options.other_noise)
    deviations[:, 0] = options.main_noise
    deviations[auxiliary, 0] = options.careful_noise
    noise = deviations * torch.randn(count, 3, generator=generator)
    truth = torch.tensor([MAIN_WEIGHTS, MAIN_WEIGHTS, HARMFUL_WEIGHTS])
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    return IllustrativeTask(features, features @ truth.T + noise, training, auxiliary, validation, model)


def shares(run: Run) -> Tensor:
    """Each loss's share of all weights, at every outer step: (outer steps, 3). Only the ratios of the weights shape
    the landscape."""
    weights = torch.tensor([record.loss_weights for record in run.records], dtype=torch.float64)
    return weights / weights.sum(dim=1, keepdim=True)


def findings(runs: Sequence[Run]) -> list[Finding]:
    """The claims of section 5.1, Figure 2 and Figure 5."""
    found = []
    if learned := finished(runs, "linear"):
        found += [_harmful_vanishes(learned), _minimum_is_nearer(learned)]
    if learned := finished(runs, "linear", TRAINING_SET):
        found.append(_reduces_to_main(learned))
    return found


def _harmful_vanishes(runs: Sequence[Run]) -> Finding:
    last = [shares(run)[-1, 2].item() for run in runs]
    small, zero = sum(share < NEGLIGIBLE for share in last), sum(share == 0 for share in last)
    text = (
        f"The harmful auxiliary's weight goes to zero: from a third of all weights to {sum(last) / len(last):.1%} on "
        f"average, {max(last):.1%} at most; below {NEGLIGIBLE:.0%} with {small} of {len(runs)} seeds, exactly 0 with "
        f"{zero}."
    )
    return Finding(text, small == len(runs))


def _distances(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    """Distances from w* to the main training loss's minimum, and to that of the weighted loss in the end; one a run."""
    training, learned = [], []
    for run in runs:
        task = _task(run, read_config(EXPERIMENT.config, run))
        training.append(distance(task.landscape((1.0, 0.0, 0.0))[0]))
        learned.append(distance(task.landscape(run.records[-1].loss_weights)[0]))
    return training, learned


def _minimum_is_nearer(runs: Sequence[Run]) -> Finding:
    training, learned = _distances(runs)
    nearer = sum(own < base for own, base in zip(learned, training, strict=True))
    text = (
        f"The learned landscape's minimum is nearer to w* than the main training loss's: with {nearer} of {len(runs)} "
        f"seeds; the mean distances are {_figure(learned)} and {_figure(training)}."
    )
    return Finding(text, nearer == len(runs))


def _reduces_to_main(runs: Sequence[Run]) -> Finding:
    last = torch.stack([shares(run)[-1] for run in runs]).mean(dim=0).tolist()
    training, learned = _distances(runs)
    text = (
        "Learned on the training set, the weights reduce to the main loss alone: it ends with a mean share of "
        f"{last[0]:.0%} (helpful {last[1]:.0%}, harmful {last[2]:.1%}), and the minimum is {_figure(learned)} from w*, "
        f"where the main training loss's is {_figure(training)}. (It holds above {NEARLY_ALL:.0%}.)"
    )
    return Finding(text, last[0] > NEARLY_ALL)


def _figure(values: Sequence[float]) -> str:
    mean, sem, _ = estimate(values)
    return f"{mean:.3f}" + ("" if sem is None else f" +- {sem:.3f}")


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Figure 2 of the paper for the first seed, and the weights' course over all seeds, as in Figure 5; to a PNG, if
    there is a run with the auxiliary set."""
    if not (learned := finished(runs, "linear")):
        return
    figure = new_figure(13.5, 9)
    figure.suptitle("A helpful and a harmful auxiliary: loss landscapes, and the learned weights", fontweight="bold")
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    _draw_landscapes(above.subplots(1, 3, sharex=True, sharey=True), learned[0])
    courses = {"auxiliary set": learned, "training set": finished(runs, "linear", TRAINING_SET)}
    shown = {where: of_setting for where, of_setting in courses.items() if of_setting}
    for ax, (where, of_setting) in zip(below.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        _draw_shares(ax, of_setting, where)
    figure.supxlabel(
        "Above: one seed; darker is higher. Is the minimum (circle) nearer to the truth (star) in (c) than in (a)? The "
        "harmful loss pulls it away in (b).\nBelow: mean over seeds ± one standard deviation. On the auxiliary set, "
        "the harmful loss should be dropped and the helpful one kept; on the training set, both dropped.",
        fontsize=9.5,
        color=GREY,
    )
    figure.savefig(path)


def _draw_landscapes(axes: Sequence[Any], run: Run) -> None:
    config = read_config(EXPERIMENT.config, run)
    task = _task(run, config)
    path = path_of_weights(run, task, config.train)
    cases = (
        ("(a) main training loss", "its minimum, w_train", (1.0, 0.0, 0.0)),
        ("(b) weighted loss, at the start", "its minimum", run.records[0].loss_weights),
        ("(c) weighted loss, in the end", "its minimum", run.records[-1].loss_weights),
    )
    minima = [task.landscape(weights)[0] for *_, weights in cases]
    points = torch.stack([*minima, *path, torch.tensor(MAIN_WEIGHTS)])
    centre, reach = (points.amax(dim=0) + points.amin(dim=0)) / 2, (points.amax(dim=0) - points.amin(dim=0)).max() / 2
    grid = torch.linspace(-1.25, 1.25, 120, dtype=torch.float64) * reach
    across, up = torch.meshgrid(centre[0] + grid, centre[1] + grid, indexing="xy")
    for ax, (title, name, weights) in zip(axes, cases, strict=True):
        minimum, curvature = task.landscape(weights)
        offset = torch.stack([across, up], dim=-1) - minimum
        height = torch.einsum("...i,ij,...j->...", offset, curvature, offset).sqrt()
        ax.contourf(across, up, height, levels=14, cmap="Greys", alpha=0.75)
        ax.plot(*MAIN_WEIGHTS, "*", color=RED, markersize=11, zorder=4, label="w*, the truth")
        ax.plot(*minimum, "o", color=BLACK, markersize=15, markerfacecolor="none", markeredgewidth=2, label=name)
        ax.set_title(f"{title}\nmain {weights[0]:.2g}, helpful {weights[1]:.2g}, harmful {weights[2]:.2g}", fontsize=11)
        ax.set_xlabel("first weight of the model")
        ax.set_aspect("equal")
    axes[-1].plot(*path.T, color=BLUE, linewidth=1.5, label="path of w in training")
    axes[-1].plot(*path[0], "s", color=BLUE, label="its start")
    for ax in axes:
        ax.legend(fontsize=8.5, loc="lower left")
    axes[0].set_ylabel("second weight of the model")


def _task(run: Run, config: RunConfig) -> IllustrativeTask:
    return make_task(run.seed, config.task, hold_out=True)


def path_of_weights(run: Run, task: IllustrativeTask, config: TrainConfig) -> Tensor:
    """Trains `task.model` again, with the recorded weights and no scheduler: (inner steps + 1, 2)."""
    optimizer = make_optimizer(config.inner_optimizer, task.model.parameters())
    path = [weights_of(task.model)]
    for record in run.records:
        weights = torch.tensor(record.loss_weights)
        for _ in range(config.inner_steps):
            optimizer.zero_grad()
            torch.dot(weights, task.training_batch(torch.Generator()).losses.mean(dim=0)).backward()
            optimizer.step()
            path.append(weights_of(task.model))
    return torch.stack(path)


def _draw_shares(ax: Any, runs: Sequence[Run], where: str) -> None:
    for j, (name, colour) in enumerate((("main", BLACK), ("helpful auxiliary", BLUE), ("harmful auxiliary", RED))):
        draw_course(ax, [(100 * shares(run)[:, j]).tolist() for run in runs], colour, name)
    ax.set_title(f"Weights learned on the {where} ({len(runs)} seed{'s' * (len(runs) > 1)})", fontsize=11)
    ax.set_xlabel("outer step")
    ax.set_ylabel("share of all weights, %")
    ax.set_ylim(0, 102)
    ax.legend(fontsize=9.5, loc="center right", framealpha=0.8, edgecolor="none")
    tidy(ax)


# Chosen on seeds 1000 to 1099, by the distance of the learned landscape's minimum (and, on the training set, by how far
# the weights had gone). Tried: 100, 500 and 1000 labelled samples; features of unequal deviations; noise of the main
# labels 1 to 5, of the careful ones 0, 0.5 and 4 (with 4, the harmful weight is 0 with half of the seeds, and large
# with others); outer SGD of 0.02 to 2, with limits to the norm of 0.03 to 1 and without, and Adam; 100 to 300 outer
# steps; with the skip (the main loss cannot be left behind, and the minimum stays halfway). On the training set, 200
# outer steps did for the seeds from 1000 on, but left those from 0 to 19 at 88% for the main loss, still moving: hence
# 400.
EXPERIMENT = Experiment(
    name="illustrative",
    title="Illustrative example: a helpful and a harmful auxiliary, and the loss landscape (paper, section 5.1)",
    about=(
        "A model with two weights has to fit three regressions at once. The main one is very noisy, so the minimum of "
        "its training loss misses the truth w*; the helpful one has the same truth and little noise; the harmful one "
        "has another truth. Learning the three weights on a small, careful auxiliary set should drop the harmful loss, "
        "rely on the helpful one, and so move the minimum to w*. Learned on the training set instead, they can do no "
        "better than to fit the main loss's noise."
    ),
    score_name="minus 100 x distance of w to w*",
    loss_names=IllustrativeTask.loss_names,
    config=RunConfig(
        train=PaperTraining(
            outer_steps=200,
            inner_steps=10,
            inner_optimizer=Component("SGD", {"lr": 0.04}),
            outer_optimizer=Component("SGD", {"lr": 1.0, "momentum": 0.9}),
            solver=Dense(),
            max_outer_grad_norm=0.1,
            checkpoint_every=100,
        ),
        combiner=PaperCombiner(initial_weight=1.0, skip=False),
        task=IllustrativeOptions(),
    ),
    make_task=make_task,
    methods=("stl", "linear-frozen", "linear"),
    settings={"": {}, TRAINING_SET: {"train.outer_set": "training", "train.outer_steps": 400}},
    draw=draw,
    findings=findings,
)
