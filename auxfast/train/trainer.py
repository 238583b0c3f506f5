"""Algorithm 1 of the paper, for any task that can say its losses."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit import HyperOptimizer
from auxfast.implicit.optimizer import Projectable
from auxfast.implicit.ranks import ProcessGroup, ranks_of
from auxfast.solvers import GradientFlow, Solver, SolveStats
from auxfast.train.averaging import (
    average_buffers,
    average_gradients,
    factor_of_part,
    share_random_state,
    start_alike,
    total,
)
from auxfast.train.config import TrainConfig
from auxfast.train.maxl import maxl_step
from auxfast.train.optimizers import make_optimizer, make_scheduler
from auxfast.train.task import WHOLE, Batch, Part, Task
from auxfast.train.task_check import (
    as_number,
    check_batch,
    check_members,
    check_samples,
    check_scalar,
    check_takes_part,
    draw_batch,
    split_indices,
)
from auxfast.train.training_loss import GeneratedLabelsLoss, TrainingLoss, combiner_of, main_loss, with_decay

_MAX_RECORDED_PHI = 64  # entries; a longer phi would make most of a record, and nobody reads it number by number


class OuterRecord(NamedTuple):
    """Measurements at one outer step, before phi moves. Where nothing is learned, outer loss and residual are None.

    Without an outer step, the training loss and its weights are those of the last inner step's batch.
    """

    step: int  # counted from 0
    training_loss: float
    main_loss: float | None  # mean over the samples of the training batch that have it; None if none has
    outer_loss: float | None
    validation_score: float | None  # measured after the inner steps; None in runs of versions that did not always
    residual: float | None  # relative residual of the linear system behind the hypergradient; None if not certified
    matvecs: int | None  # Hessian-vector products of the outer step
    loss_weights: tuple[float, ...]  # d (training loss) / d (mean of loss j): see TrainingLoss.mean_weights
    phi: tuple[float, ...] | None  # None if there are more entries than a record holds, or none
    inner_seconds: float
    outer_seconds: float
    skipped: bool = False  # whether the outer step, or one of MAXL's, changed nothing: see HyperOptimizer.step
    validation_seconds: float = 0.0  # what the task's validation_score took


class Trainer:
    """Trains `task.model` on a training loss and, where that is a learned one, its outer parameters on the outer loss.

        trainer = Trainer(task, make_training_loss(method, config, task), config.train, seed=0)
        records = trainer.run()

    MAXL takes an outer step for each inner step, in warm-up and cool-down too: it holds nothing out. Its look-ahead is
    a step of gradient descent with the inner optimizer's learning rate at that time, whatever that optimizer is.

    The same seed gives the same run, to the bit, on the same machine with the same number of threads, if the task's
    model draws nothing (dropout), or torch's random state is the same at the start.

    Several processes share a run through a process group. Each takes its part of the batches that one process has (see
    `Part`), and all make the same steps, from losses and gradients averaged over the samples: to rounding the run is
    that of one process. BatchNorm, though, normalises each part by itself, and its running statistics become their
    mean after each round; and dropout draws for the parts as it would for batches of their sizes. The state holds
    nothing of the number of processes: a run goes on with any.

    Args:
        task, training_loss: on `config.device`, and at their start.
        seed: seed of the batches.
        process_group: processes of `torch.distributed` that share the run; `None`: this process alone.

    Raises:
        TypeError, ValueError: the task lacks a member, or has one that is not what it must be; or processes were given
            different runs.
    """

    def __init__(
        self,
        task: Task,
        training_loss: TrainingLoss,
        config: TrainConfig,
        seed: int,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_members(task)
        self.task, self.training_loss, self.config = task, training_loss, config
        self.ranks = ranks_of(process_group, torch.device(config.device))
        self.part = WHOLE
        if self.ranks is not None:
            check_takes_part(task)
            self.part = Part(self.ranks.rank, self.ranks.size)
            facts = {"config": repr(config), "seed": str(seed), "task": _fingerprint(task)}
            start_alike(self.ranks, facts, {"task.model": task.model, "training_loss": training_loss})
            for module in training_loss.modules():
                if isinstance(module, TrainingLoss):
                    module.ranks = self.ranks
        self._process_group = process_group
        self.parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        self.combiner = combiner_of(training_loss)
        self.maxl: GeneratedLabelsLoss | None = None
        if isinstance(training_loss, GeneratedLabelsLoss) and training_loss.with_lookahead:
            self.maxl = training_loss
        self.outer_parameters = [parameter for parameter in training_loss.parameters() if parameter.requires_grad]
        self.outer = self._hyper_optimizer() if training_loss.learned else None
        self.inner = make_optimizer(config.inner_optimizer, self.parameters)
        self.scheduler = None if config.inner_scheduler is None else make_scheduler(config.inner_scheduler, self.inner)
        self.records: list[OuterRecord] = []
        self._has_released = False
        self.best: dict[str, Any] | None = None  # {"step", "score", "model", "training_loss"}
        # Outer steps draw their batches apart, so that a frozen control sees the same inner steps.
        self.generator = torch.Generator().manual_seed(seed)
        outer_seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        self.outer_generator = torch.Generator().manual_seed(outer_seed)

    def _hyper_optimizer(self) -> HyperOptimizer:
        return HyperOptimizer(
            make_optimizer(self.config.outer_optimizer, self.training_loss.parameter_groups()),
            solver=self.config.solver,
            max_grad_norm=self.config.max_outer_grad_norm,
            max_weight_change=self.config.max_weight_change,
            keep_total=self.config.keep_total,
            project=[self.combiner] if isinstance(self.combiner, Projectable) else [],
            process_group=self._process_group,
            warn=False,  # the progress bar and the report show every residual, and count skipped steps
        )

    @property
    def done(self) -> bool:
        return len(self.records) >= self.config.outer_steps or self.stopped_early

    @property
    def warms_up(self) -> bool:
        """Whether phi still stays as it starts."""
        return len(self.records) < self._warmup_steps

    @property
    def _warmup_steps(self) -> int:
        return int(self.config.warmup * self.config.outer_steps)

    @property
    def cools_down(self) -> bool:
        """Whether the last outer step has been taken, and phi stays until the end."""
        left = self.config.outer_steps - len(self.records)
        return left <= int(self.config.cooldown * self.config.outer_steps)

    @property
    def stopped_early(self) -> bool:
        """Whether patience has run out before the last outer step."""
        if self.config.patience is None or self.best is None:
            return False
        waited = len(self.records) - max(self.best["step"] + 1, self._warmup_steps)
        return waited >= self.config.patience and len(self.records) < self.config.outer_steps

    def run(self, on_outer_step: Callable[[OuterRecord], None] | None = None) -> list[OuterRecord]:
        """Trains what is left of the run; then, with early stopping, model and training loss are the best ones.

        Args:
            on_outer_step: called with every record as it is made.

        Returns:
            One record for each outer step, those before a resumption included.

        Raises:
            FloatingPointError: training or outer loss are not finite any more; says when, and what to try.
            TypeError, ValueError: the task returns what it should not; says what it should.
        """
        while not self.done:
            self.records.append(self._round())
            if on_outer_step is not None:
                on_outer_step(self.records[-1])
        if self.best is not None:
            self.task.model.load_state_dict(self.best["model"])
            self.training_loss.load_state_dict(self.best["training_loss"])
        return self.records

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, torch's random states included, but for the records.

        Raises:
            FloatingPointError: parameters are not finite: no run could go on from there.
        """
        self._check_parameters()
        return {
            "step": len(self.records),
            "model": self.task.model.state_dict(),
            "training_loss": self.training_loss.state_dict(),
            "inner": self.inner.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "outer": None if self.outer is None else self.outer.state_dict(),
            "generator": self.generator.get_state(),
            "outer_generator": self.outer_generator.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.config.device) if self._cuda else None,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any], records: Sequence[OuterRecord]) -> None:
        """Goes on from `state`; `records` are those of the outer steps before it.

        Raises:
            ValueError, RuntimeError, KeyError, TypeError: it is the state of another run.
        """
        if len(records) != state["step"]:
            raise ValueError(f"{len(records)} records for a state after {state['step']} outer steps")
        self.task.model.load_state_dict(state["model"])
        self.training_loss.load_state_dict(state["training_loss"])
        self.inner.load_state_dict(state["inner"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.outer is not None:
            self.outer.load_state_dict(state["outer"])
        self.generator.set_state(state["generator"])
        self.outer_generator.set_state(state["outer_generator"])
        torch.set_rng_state(state["random"])
        if self._cuda:
            torch.cuda.set_rng_state(state["random_cuda"], self.config.device)
        self.best = state["best"]
        self.records = list(records)

    def _round(self) -> OuterRecord:
        """Takes `inner_steps` inner steps and an outer one, if phi moves by now. Returns what was measured."""
        learns = self.outer is not None and self.maxl is None and not (self.warms_up or self.cools_down)
        if self.cools_down and not self._has_released and hasattr(self.task, "release_auxiliary"):
            self.task.release_auxiliary()
            self._has_released = True
        start = time.perf_counter()
        batch, training_loss = self._inner_steps()
        inner_seconds = self._seconds_since(start)
        outer_loss: Tensor | None = None
        stats, outer_seconds = None, 0.0
        if learns:
            start = time.perf_counter()
            with preserved_state():  # BatchNorm's statistics, which scores depend on, are those of the inner steps
                batch, training_loss, outer_loss = self._bilevel_losses()
            outer_seconds = self._seconds_since(start)
        training_value, outer_value = self._value("training", training_loss), self._value("outer", outer_loss)
        start = time.perf_counter()
        validation_score = self._validate()
        validation_seconds = self._seconds_since(start)
        loss_weights, phi = self.training_loss.mean_weights(batch), self._phi()
        skipped = False
        if learns:
            assert self.outer is not None
            assert outer_loss is not None
            start, before = time.perf_counter(), self.outer.skipped_steps
            stats = self._outer_step(outer_loss, training_loss, batch)
            outer_seconds += self._seconds_since(start)
            skipped = self.outer.skipped_steps > before
        elif self.maxl is not None:
            assert self.outer is not None
            start, before = time.perf_counter(), self.outer.skipped_steps
            with preserved_state():
                outer_loss = self._maxl_steps(self.maxl)
            outer_seconds = self._seconds_since(start)
            skipped = self.outer.skipped_steps > before
            outer_value = self._value("outer", outer_loss)
        self._check_drawn_alike()
        assert training_value is not None
        return OuterRecord(
            step=len(self.records),
            training_loss=training_value,
            main_loss=_finite(self._mean(main_loss(batch, self.task.main, self.ranks))),
            outer_loss=outer_value,
            validation_score=validation_score,
            residual=None if stats is None else _finite(stats.residual),
            matvecs=None if stats is None else stats.matvecs,
            loss_weights=loss_weights,
            phi=phi,
            inner_seconds=inner_seconds,
            outer_seconds=outer_seconds,
            skipped=skipped,
            validation_seconds=validation_seconds,
        )

    def _inner_steps(self) -> tuple[Batch, Tensor]:
        """Takes the inner steps. Returns the last one's batch, and its training loss; of several ranks, their part of
        the batch, and the term of the loss whose mean over ranks it is."""
        parameters, decay, max_norm = self.parameters, self.config.weight_decay, self.config.max_inner_grad_norm
        for parameter in self.outer_parameters:  # only the outer step needs gradients in phi
            parameter.requires_grad_(False)
        try:
            for _ in range(self.config.inner_steps):
                self.inner.zero_grad()
                batch, loss = self._training_loss(self.generator)
                loss.backward()
                if self.ranks is not None:
                    average_gradients(self.ranks, parameters, len(batch.losses))
                if decay:
                    grads = [(p.grad, p.detach()) for p in parameters if p.grad is not None]
                    torch._foreach_add_(*map(list, zip(*grads, strict=True)), alpha=decay)
                if max_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
                self.inner.step()
                if self.scheduler is not None:
                    self.scheduler.step()
        finally:
            for parameter in self.outer_parameters:
                parameter.requires_grad_(True)
        if self.ranks is not None:
            average_buffers(self.ranks, [self.task.model, self.training_loss])
            share_random_state(self.ranks, torch.device(self.config.device))
            loss = loss * factor_of_part(self.ranks, len(batch.losses))
        return batch, loss.detach()

    def _training_loss(self, generator: torch.Generator) -> tuple[Batch, Tensor]:
        batch = self._batch(generator)
        # A combiner needs all digits of its few losses: it runs without autocast.
        return batch, self.training_loss(*batch)

    def _batch(self, generator: torch.Generator) -> Any:
        with self._autocast():
            batch = draw_batch(self.task, generator, self.part)
        check_batch(batch, len(self.task.loss_names))
        if self.ranks is not None:
            check_samples(batch, self.part)
        return batch

    def _bilevel_losses(self) -> tuple[Batch, Tensor, Tensor]:
        """A batch, its training loss, and the outer loss; of several ranks, this one's terms, whose means they are."""
        batch, training_loss = self._training_loss(self.outer_generator)
        if self.ranks is not None:
            training_loss = training_loss * factor_of_part(self.ranks, len(batch.losses))
        with self._autocast():
            if self.config.outer_set == "auxiliary":
                return batch, training_loss, self._outer_loss()
            outer_batch = draw_batch(self.task, self.outer_generator, self.part)
            return batch, training_loss, main_loss(outer_batch, self.task.main, self.ranks)

    def _outer_loss(self) -> Tensor:
        loss = self.task.outer_loss()
        check_scalar("outer_loss", loss)
        return loss

    def _outer_step(self, outer_loss: Tensor, training_loss: Tensor, batch: Any) -> SolveStats:
        assert self.outer is not None
        if isinstance(self.training_loss, GeneratedLabelsLoss) and self.training_loss.config.outer_entropy_weight:
            outer_loss = outer_loss + self.training_loss.entropy_term(batch)
        self.outer.solver = self._solver()
        inner_loss = with_decay(training_loss, self.parameters, self.config.weight_decay)
        return self.outer.step(outer_loss, inner_loss, self.parameters)

    def _solver(self) -> Solver:
        """The solver of this outer step: gradient flow without a time gets that of the inner steps so far."""
        solver = self.config.solver
        if not isinstance(solver, GradientFlow) or solver.time is not None:
            return solver
        read = GradientFlow.of(self.inner, (len(self.records) + 1) * self.config.inner_steps)
        return replace(solver, time=read.time, learning_rate=solver.learning_rate or read.learning_rate)

    def _maxl_steps(self, loss: GeneratedLabelsLoss) -> Tensor | None:
        """Takes as many of MAXL's outer steps as there are inner steps: it passes twice over the training data. Returns
        the mean of their outer losses, or None if none was taken."""
        assert self.outer is not None
        lr, decay = self.inner.param_groups[0]["lr"], self.config.weight_decay
        losses = [
            maxl_step(self._batch, loss, self.outer, self.parameters, lr, self.outer_generator, decay)
            for _ in range(self.config.inner_steps)
        ]
        taken = [loss for loss in losses if loss is not None]
        return torch.stack(taken).mean() if taken else None

    def _validate(self) -> float:
        """The validation score, the first rank's; with early stopping, keeps a copy of what scored best."""
        score = math.nan
        if self.part.rank == 0:
            with _untouched(self.task.model):
                score = as_number(self.task.validation_score())
        if self.ranks is not None:
            number = torch.tensor([score], dtype=torch.float64, device=self.config.device)
            score = self.ranks.of_first(number).item()
        if (
            self.config.patience is not None
            and not math.isnan(score)
            and (self.best is None or score > self.best["score"])
        ):
            self.best = {
                "step": len(self.records),
                "score": score,
                "model": deepcopy(self.task.model.state_dict()),
                "training_loss": deepcopy(self.training_loss.state_dict()),
            }
        return score

    def _phi(self) -> tuple[float, ...] | None:
        if self.combiner is None or sum(phi.numel() for phi in self.outer_parameters) > _MAX_RECORDED_PHI:
            return None
        return tuple(entry for phi in self.outer_parameters for entry in phi.flatten().tolist())

    def _mean(self, loss: Tensor) -> float:
        """The value of a loss; of several ranks, the mean of their terms."""
        return total(self.ranks, [loss.item()])[0] / self.part.size

    def _value(self, name: str, loss: Tensor | None) -> float | None:
        """The value of a loss. Raises FloatingPointError if it is not finite."""
        value = None if loss is None else self._mean(loss)
        if value is not None and not math.isfinite(value):
            raise FloatingPointError(
                f"the {name} loss is {value} at outer step {len(self.records)}: try a smaller lr of the inner or "
                "outer optimizer, or train.max_inner_grad_norm"
            )
        return value

    def _check_drawn_alike(self) -> None:
        """Raises RuntimeError, on all ranks, where they have not drawn the same batches."""
        if self.ranks is None:
            return
        states = [generator.get_state() for generator in (self.generator, self.outer_generator)]
        rows = self.ranks.gather([float(zlib.crc32(state.numpy().tobytes())) for state in states])
        other = next((rank for rank, row in enumerate(rows) if row != rows[0]), None)
        if other is not None:
            raise RuntimeError(
                f"task.training_batch: ranks 0 and {other} have drawn different numbers by outer step "
                f"{len(self.records)}, so that their batches are not parts of the same one: draw everything from "
                "the generator for the whole batch, then take part.of() of it"
            )

    def _check_parameters(self) -> None:
        norms = torch._foreach_norm([*self.parameters, *self.training_loss.parameters()])
        if not bool(torch.stack([norm.isfinite() for norm in norms]).all()):
            raise FloatingPointError(
                f"the parameters are not finite, with {len(self.records)} outer steps done: try a smaller lr of the "
                "inner or outer optimizer, or train.max_inner_grad_norm"
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.config.amp:
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, dtype=torch.bfloat16)

    @property
    def _cuda(self) -> bool:
        return torch.device(self.config.device).type == "cuda"

    def _seconds_since(self, start: float) -> float:
        if self._cuda:
            torch.cuda.synchronize(self.config.device)
        return time.perf_counter() - start


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Lets a measurement leave modes, buffers and random states as they were: a run is the same with and without it."""
    modes = [(module, module.training) for module in model.modules()]
    with preserved_state():
        yield
    for module, training in modes:
        module.training = training


def _fingerprint(task: Task) -> str:
    """What tells a task from that of another seed, or of other data."""
    checksums = [
        f"{name} {zlib.crc32(indices.cpu().contiguous().numpy().tobytes())}"
        for name, indices in split_indices(task).items()
    ]
    return ", ".join([type(task).__name__, *task.loss_names, *checksums])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
