"""The configuration of a run: typed, and checked when it is made. `serialization` reads and writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import date, time
from typing import Any, Literal, get_args

import torch

from auxfast.nn.combiner_base import Positive
from auxfast.solvers import Identity, Solver
from auxfast.solvers.base import check_solver
from auxfast.solvers.known_solution import KnownSolution
from auxfast.train.methods import COMBINER_LABELS, WEIGHTING_LABELS
from auxfast.train.optimizers import Component as Component
from auxfast.train.optimizers import check_optimizer, check_scheduler, has_weight_decay

# The defaults of the outer loop are those of HyperOptimizer.recommended, with a limit on the hypergradient's norm. They
# were chosen on half of the tasks of benchmarks/learning, on other seeds than those that it reports.
_INNER_OPTIMIZER = Component("Adam", {"lr": 3e-3})
_OUTER_OPTIMIZER = Component("Adam", {"lr": 0.1, "betas": [0.9, 0.99]})
_SOLVER = Identity()

_MOST_THREADS = 1024  # OpenMP ends the process where the system refuses it a thread


@dataclass(frozen=True)
class TrainConfig:
    """How to run Algorithm 1 of the paper: `outer_steps` times N = `inner_steps` inner steps and one outer.

    Args:
        inner_optimizer, outer_optimizer: classes of `torch.optim`. `weight_decay` is no option of theirs: see below.
        solver: one of `auxfast.solvers`, for the hypergradient.
        inner_scheduler: class of `torch.optim.lr_scheduler`; steps after every inner step.
        weight_decay: a part of the inner loss (half of it times the squared norm of the inner parameters), which the
            hypergradient knows: in the optimizer it would not.
        max_inner_grad_norm, max_outer_grad_norm: norm to which larger gradients, larger hypergradients are scaled down.
        max_weight_change, keep_total: see `HyperOptimizer`.
        warmup, cooldown: shares of the outer steps, at the start and the end of the run, in which phi stays as it is.
            At the start the outer loss falls fastest with the main loss alone, which says little of where training
            ends. In the end training takes the auxiliary set too, if the task gives it back (`Task.release_auxiliary`).
        patience: number of outer steps without a better validation score, those of the warm-up not counted, after
            which training stops, and returns to the best.
        amp: whether losses are computed in bfloat16 where that is safe (`torch.autocast`).
        device: device of tasks and combiners, as torch names it.
        outer_set: samples on which the outer loss is measured. "training" shows what that leads to (paper, Figure 5).
        checkpoint_every: outer steps between checkpoints.
        threads: number of torch's threads on the CPU. More than one pays for large models only, and changes the last
            digits.

    Raises:
        ValueError: names the entry, what was given and what is allowed: a number that is not finite, negative, or zero
            where that means nothing; an unknown name or option.
    """

    outer_steps: int = 60
    inner_steps: int = 10
    inner_optimizer: Component = _INNER_OPTIMIZER
    outer_optimizer: Component = _OUTER_OPTIMIZER
    solver: Solver = _SOLVER
    inner_scheduler: Component | None = None
    weight_decay: float = 0.0
    max_inner_grad_norm: float | None = None
    max_outer_grad_norm: float | None = 1.0
    max_weight_change: float | None = 0.15
    keep_total: bool = True
    warmup: float = 0.25
    cooldown: float = 0.25
    patience: int | None = None
    amp: bool = False
    device: str = "cpu"
    outer_set: Literal["auxiliary", "training"] = "auxiliary"
    checkpoint_every: int = 10
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("outer_steps", "inner_steps", "checkpoint_every", "threads"):
            _check_count(f"train.{name}", getattr(self, name))
        if self.threads > _MOST_THREADS:
            raise ValueError(f"train.threads: got {self.threads}, must be at most {_MOST_THREADS}")
        if self.patience is not None:
            _check_count("train.patience", self.patience)
        _check_number("train.weight_decay", self.weight_decay)
        for name in ("warmup", "cooldown"):
            _check_number(f"train.{name}", getattr(self, name))
        if self.warmup + self.cooldown >= 1:
            given = f"{self.warmup} and {self.cooldown}"
            raise ValueError(f"train.warmup, train.cooldown: got {given}, must add up to a share below 1")
        for name in ("max_inner_grad_norm", "max_outer_grad_norm", "max_weight_change"):
            if getattr(self, name) is not None:
                _check_number(f"train.{name}", getattr(self, name), above=True)
        try:
            check_solver(self.solver, "train.solver")
        except TypeError as error:
            raise ValueError(str(error)) from error
        if isinstance(self.solver, KnownSolution) and (self.solver.lookahead_lr or self.solver.mixed != "exact"):
            raise ValueError(
                f"train.solver: got {self.solver!r}, must have lookahead=False and mixed='exact': the trainer "
                "evaluates its losses once, at the parameters as they are"
            )
        check_optimizer("train.inner_optimizer", self.inner_optimizer)
        check_optimizer("train.outer_optimizer", self.outer_optimizer)
        if self.inner_scheduler is not None:
            steps, may_stop = self.outer_steps * self.inner_steps, self.patience is not None
            check_scheduler("train.inner_scheduler", self.inner_scheduler, self.inner_optimizer, steps, may_stop)
        if self.outer_set not in ("auxiliary", "training"):
            raise ValueError(f"train.outer_set: got {self.outer_set!r}, must be 'auxiliary' or 'training'")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"train.device: got {self.device!r}, must be a device of torch, such as 'cuda'") from error


@dataclass(frozen=True)
class CombinerConfig:
    """The combiners at their start.

    Args:
        initial_weight: weight of every auxiliary loss at the start; in networks, their mean weight at losses of 1.
        skip: whether the main loss is added to what the combiner makes of all losses (paper, section 3.2); the linear
            one then gives the main loss no weight of its own at the start. Without, all start near the plain sum.
        hidden: widths of the hidden layers of the nonlinear and the deep linear combiner.
        channels: channels of the convolutional combiner's layers.
        degree: highest degree of the polynomial combiner's terms.
        weight_norm: whether the networks train each row of weights as direction and length.
        positive: what keeps the weights of monotone combiners from being negative: "clip" at 0, as in the paper, or
            "exp", logarithms that are learned (see `auxfast.nn.Combiner`).
        weight_decay: of the combiner's parameters, with `train.outer_optimizer` (the paper's appendix B searches it).
    """

    initial_weight: float = 1.0
    skip: bool = False
    hidden: tuple[int, ...] = (10, 10)
    channels: tuple[int, ...] = (8, 16)
    degree: int = 2
    weight_norm: bool = False
    positive: Positive = "exp"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_number("combiner.initial_weight", self.initial_weight)
        _check_number("combiner.weight_decay", self.weight_decay)
        if self.weight_decay and self.positive == "exp":
            raise ValueError(
                f"combiner.weight_decay: got {self.weight_decay}, must be 0 with combiner.positive = 'exp': decay of "
                "logarithms would draw the weights to 1; take 'clip'"
            )
        _check_count("combiner.degree", self.degree)
        if self.positive not in get_args(Positive):
            allowed = " or ".join(map(repr, get_args(Positive)))
            raise ValueError(f"combiner.positive: got {self.positive!r}, must be {allowed}")
        for name in ("hidden", "channels"):
            widths = getattr(self, name)
            if not widths:
                raise ValueError(f"combiner.{name}: got {widths!r}, must be a tuple of at least one width")
            for width in widths:
                _check_count(f"combiner.{name}", width)


@dataclass(frozen=True)
class LabelsConfig:
    """Settings of the methods with generated labels: how they train the generator, and use its labels.

    Args:
        loss: the student's loss against the labels: "cross-entropy", or "focal", as MAXL's own code has it.
        weight: weight of that loss, and of other auxiliaries, beside the main loss, where no combiner is learned.
        combiner: a combiner of main and generated loss that `auxilearn-labels` learns with the labels, under one
            hypergradient: "linear", "nonlinear" (as the paper has it for fine-grained classes), ...; None: their sum.
        lr, weight_decay: of the generator, with `train.outer_optimizer`; a combiner keeps that one's own lr.
        entropy_weight: weight of MAXL's entropy term.
        outer_entropy_weight: weight of the same term in the outer loss of `auxilearn-labels`. The paper has none; with
            it labels spread over the auxiliary classes, where without they may collapse to one.
    """

    loss: Literal["cross-entropy", "focal"] = "cross-entropy"
    weight: float = 1.0
    combiner: str | None = None
    lr: float = 1e-3
    weight_decay: float = 0.0
    entropy_weight: float = 0.2
    outer_entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in ("cross-entropy", "focal"):
            raise ValueError(f"labels.loss: got {self.loss!r}, must be 'cross-entropy' or 'focal'")
        if self.combiner is not None and self.combiner not in COMBINER_LABELS:
            raise ValueError(f"labels.combiner: got {self.combiner!r}, must be one of {', '.join(COMBINER_LABELS)}")
        for name in ("weight", "lr", "weight_decay", "entropy_weight", "outer_entropy_weight"):
            _check_number(f"labels.{name}", getattr(self, name))


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on, but for experiment, method and seed.

    Args:
        weighting: options of the weightings, by their names: {"equal": {"auxiliary_weight": 0.2}}.
        task: options of the experiment's own, a frozen dataclass; None if it has none.

    Raises:
        ValueError: an unknown weighting; a number that is not finite; or a decay of outer parameters that the
            outer optimizer would not apply.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    combiner: CombinerConfig = field(default_factory=CombinerConfig)
    weighting: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    task: Any = None
    labels: LabelsConfig = field(default_factory=LabelsConfig)

    def __post_init__(self) -> None:
        for name, options in self.weighting.items():
            if name not in WEIGHTING_LABELS:
                raise ValueError(f"weighting.{name}: no such weighting, must be one of {', '.join(WEIGHTING_LABELS)}")
            if not isinstance(options, Mapping):
                raise ValueError(f"weighting.{name}: got {options!r}, must be a table")
        for name, decay in (("labels", self.labels.weight_decay), ("combiner", self.combiner.weight_decay)):
            if decay and not has_weight_decay(self.train.outer_optimizer):
                raise ValueError(
                    f"{name}.weight_decay: got {decay}, must be 0 with the train.outer_optimizer "
                    f"{self.train.outer_optimizer.name}, which has no weight decay"
                )
        for section in fields(self):
            _check_finite(section.name, getattr(self, section.name))


def _check_count(key: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}: got {value!r}, must be an integer of at least 1")


def _check_number(key: str, value: float, above: bool = False) -> None:
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not 0 <= value < math.inf or (above and value == 0):
        raise ValueError(f"{key}: got {value!r}, must be a finite number {'above' if above else 'of at least'} 0")


def _check_finite(key: str, value: Any) -> None:
    """Refuses numbers that are not finite, which no option needs and JSON does not have, and what JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: got {value!r}, must be finite")
    if isinstance(value, (date, time)):  # TOML has them
        raise ValueError(f"{key}: got {value}, must be a number, true or false, a string, or a list or table of these")
    if is_dataclass(value):
        value = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, Mapping):
        for name, entry in value.items():
            _check_finite(f"{key}.{name}", entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _check_finite(key, entry)
