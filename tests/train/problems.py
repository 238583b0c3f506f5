"""Small tasks for the trainer's tests, and runs of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from auxfast.nn import LabelGenerator
from auxfast.solvers import Neumann
from auxfast.train import (
    WHOLE,
    Batch,
    CombinerConfig,
    Component,
    LabelBatch,
    LabelsConfig,
    Part,
    RunConfig,
    RunPlan,
    TrainConfig,
    parse_method,
)

SGD = Component("SGD", {"lr": 0.05, "momentum": 0.9})


class OneWeight:
    """One weight w and losses (w - target_j)^2 of one sample. The main loss pulls w to 0, the helpful auxiliary to 1,
    the harmful one to -1; the outer loss wants 1."""

    loss_names = ("main", "helpful", "harmful")
    main = 0

    def __init__(self, start: float = 0.0) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, start)

    def training_batch(self, generator: torch.Generator) -> Batch:
        return Batch((self.model.weight - torch.tensor([[0.0, 1.0, -1.0]])).square(), None)

    def outer_loss(self) -> torch.Tensor:
        return (self.model.weight - 1).square().sum()

    def validation_score(self) -> float:
        return self.score()

    def score(self) -> float:
        return -abs(self.model.weight.item() - 1)


@dataclass(frozen=True)
class NoisyOptions:
    dropout: float = 0.2
    features: int = 4


class NoisyBatch(NamedTuple):
    """A batch that also says which samples it has."""

    losses: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor


class ExampleWeights(nn.Module):
    """A training loss with outer parameters of a task's own: a weight for each of 60 samples, 1/2 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(60))

    def forward(self, losses: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (self.logits[rows].sigmoid()[:, None] * losses * mask).mean()


class Noisy:
    """Regression with everything that a resumed run could forget: drawn batches, dropout, BatchNorm, and a mask; and a
    weight for each sample as outer parameters of its own."""

    loss_names = ("main", "first", "second")
    main = 0

    def __init__(self, seed: int, options: NoisyOptions, hold_out: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(60, options.features, generator=generator)
        self.targets = self.inputs[:, :3] + 0.1 * torch.randn(60, 3, generator=generator)
        self.mask = (torch.rand(60, 3, generator=generator) > 0.3).float()
        self.training = torch.arange(20 if hold_out else 0, 60)
        self.model = nn.Sequential(
            nn.Linear(options.features, 8), nn.BatchNorm1d(8), nn.Dropout(options.dropout), nn.Tanh(), nn.Linear(8, 3)
        )
        self.training_loss = ExampleWeights()
        self.drawn: list[list[int]] = []

    def training_batch(self, generator: torch.Generator) -> NoisyBatch:
        rows = self.training[torch.randperm(len(self.training), generator=generator)[:16]]
        self.drawn.append(rows.tolist())
        return NoisyBatch((self.model(self.inputs[rows]) - self.targets[rows]).square(), self.mask[rows], rows)

    def outer_loss(self) -> torch.Tensor:
        return F.mse_loss(self.model(self.inputs[:20])[:, 0], self.targets[:20, 0])

    @torch.no_grad()
    def validation_score(self) -> float:
        self.model.eval()
        score = -self.outer_loss().item()
        self.model.train()
        return score

    score = validation_score


def train_config(**changes) -> TrainConfig:
    """The paper's loop without safeguards: an outer step after every round, of any size."""
    settings = {
        "warmup": 0.0,
        "cooldown": 0.0,
        "max_weight_change": None,
        "keep_total": False,
        "outer_steps": 20,
        "inner_steps": 20,
        "inner_optimizer": SGD,
        "outer_optimizer": Component("SGD", {"lr": 0.1, "momentum": 0.9}),
        "solver": Neumann(steps=50, step_size=0.05),
        **changes,
    }
    return TrainConfig(**settings)


def noisy_config(options: NoisyOptions = NoisyOptions(), **changes) -> RunConfig:
    """A few outer steps, with checkpoints after every second."""
    settings = {
        "outer_steps": 7,
        "inner_steps": 3,
        "checkpoint_every": 2,
        "solver": Neumann(steps=3, step_size=0.05),
        **changes,
    }
    labels = LabelsConfig(combiner="nonlinear", lr=0.02, weight_decay=1e-3)
    combiner = CombinerConfig(hidden=(4,), skip=True, positive="clip")
    return RunConfig(train_config(**settings), combiner, task=options, labels=labels)


def noisy_plan(
    out: Path,
    method: str = "linear",
    seed: int = 0,
    setting: str = "",
    options: NoisyOptions = NoisyOptions(),
    **changes,
) -> RunPlan:
    """A run of `Noisy`; `changes` are those of `noisy_config`."""
    config = noisy_config(options, **changes)
    parsed = parse_method(method)
    task = LabelledNoisy if parsed.labels else Noisy
    make_task = partial(task, seed, options, hold_out=parsed.holds_out)
    return RunPlan(out, "noisy regression", setting, parsed, seed, config, make_task)


def without_seconds(records):
    return [record._replace(inner_seconds=0.0, outer_seconds=0.0, validation_seconds=0.0) for record in records]


class LabelledNoisy(Noisy):
    """Classification with the same pitfalls, in the student and in the generator of its auxiliary labels."""

    loss_names = ("main", "generated labels")

    def __init__(self, seed: int, options: NoisyOptions, hold_out: bool) -> None:
        super().__init__(seed, options, hold_out)
        self.labels = self.targets[:, 0].gt(0).long() + self.targets[:, 1].gt(0).long()
        self.label_generator = LabelGenerator(
            nn.Sequential(nn.Linear(options.features, 6), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.Linear(6, 7)),
            (3, 2, 2),
        )
        self.model[4] = nn.Linear(8, 3 + 7)

    def training_batch(self, generator: torch.Generator) -> LabelBatch:
        rows = self.training[torch.randperm(len(self.training), generator=generator)[:16]]
        main, auxiliary = self.model(self.inputs[rows]).tensor_split([3], dim=1)
        losses = F.pad(F.cross_entropy(main, self.labels[rows], reduction="none")[:, None], (0, 1))
        mask = torch.stack([self.mask[rows, 0], torch.zeros(len(rows))], dim=1)
        return LabelBatch(losses, mask, auxiliary, self.inputs[rows], self.labels[rows])

    def outer_loss(self) -> torch.Tensor:
        return F.cross_entropy(self.model(self.inputs[:20])[:, :3], self.labels[:20])

    @torch.no_grad()
    def validation_score(self) -> float:
        self.model.eval()
        score = -self.outer_loss().item()
        self.model.train()
        return score

    score = validation_score


class Shared:
    """Regression that several processes can share, with batches that do not divide evenly and losses that samples
    lack; in torch's default dtype. Its outer parameters of its own are those of `Noisy`."""

    loss_names = ("main", "first", "second")
    main = 0

    def __init__(self, seed: int = 0, batch: int = 15) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.batch = batch
        self.inputs = torch.randn(60, 4, generator=generator)
        self.targets = self.inputs[:, :3] + 0.1 * torch.randn(60, 3, generator=generator)
        self.mask = (torch.rand(60, 3, generator=generator) > 0.3).to(self.inputs)
        self.training = torch.arange(20, 60)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.training_loss = ExampleWeights()

    def rows(self, generator: torch.Generator, part: Part) -> torch.Tensor:
        return part.of(self.training[torch.randperm(len(self.training), generator=generator)[: self.batch]])

    def training_batch(self, generator: torch.Generator, part: Part = WHOLE) -> NoisyBatch:
        rows = self.rows(generator, part)
        return NoisyBatch((self.model(self.inputs[rows]) - self.targets[rows]).square(), self.mask[rows], rows)

    def release_auxiliary(self) -> None:
        self.training = torch.arange(60)

    def split_indices(self) -> dict[str, torch.Tensor]:
        return {"training": self.training}

    def outer_loss(self) -> torch.Tensor:
        return F.mse_loss(self.model(self.inputs[:20])[:, 0], self.targets[:20, 0])

    @torch.no_grad()
    def validation_score(self) -> float:
        return -self.outer_loss().item()

    score = validation_score


class SharedLabels(Shared):
    """Classification with generated labels, likewise."""

    loss_names = ("main", "generated labels")

    def __init__(self, seed: int = 0, batch: int = 15) -> None:
        super().__init__(seed, batch)
        self.labels = self.targets[:, 0].gt(0).long() + self.targets[:, 1].gt(0).long()
        self.label_generator = LabelGenerator(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 7)), (3, 2, 2))
        self.model[2] = nn.Linear(8, 3 + 7)

    def training_batch(self, generator: torch.Generator, part: Part = WHOLE) -> LabelBatch:
        rows = self.rows(generator, part)
        main, auxiliary = self.model(self.inputs[rows]).tensor_split([3], dim=1)
        losses = F.pad(F.cross_entropy(main, self.labels[rows], reduction="none")[:, None], (0, 1))
        mask = torch.stack([self.mask[rows, 0], torch.zeros(len(rows))], dim=1)
        return LabelBatch(losses, mask, auxiliary, self.inputs[rows], self.labels[rows])

    def outer_loss(self) -> torch.Tensor:
        return F.cross_entropy(self.model(self.inputs[:20])[:, :3], self.labels[:20])
