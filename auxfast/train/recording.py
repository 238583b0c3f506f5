"""Runs are trained, scored and written here: one folder for each method and seed, which `resume` goes on from."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from auxfast.implicit.ranks import ProcessGroup
from auxfast.nn import Combiner
from auxfast.train.averaging import is_from_collective, of_first
from auxfast.train.config import RunConfig, TrainConfig
from auxfast.train.environment import environment
from auxfast.train.files import (
    RunError,
    WriteError,
    described,
    finite,
    fitting,
    load_checkpoint,
    load_indices,
    one_line,
    read_json,
    save_checkpoint,
    save_indices,
    start_again,
    write_bytes,
    write_json,
    writing,
)
from auxfast.train.folder_lock import locked
from auxfast.train.methods import Method
from auxfast.train.run import (
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RESULT,
    SPLIT,
    Run,
    RunResult,
    metrics_line,
    read_description,
    read_metrics,
    read_whole_run,
)
from auxfast.train.serialization import flattened, override, to_table
from auxfast.train.state_check import check_state
from auxfast.train.task import Task
from auxfast.train.task_check import as_number, check_members, further_scores, split_indices
from auxfast.train.tensorboard import tensorboard
from auxfast.train.trainer import OuterRecord, Trainer
from auxfast.train.training_loss import TrainingLoss, combiner_of, make_training_loss

OnOuterStep = Callable[[OuterRecord], None]


class DivergedError(RunError):
    """A loss or the parameters are not finite any more."""


@dataclass(frozen=True)
class RunPlan:
    """Everything that makes a run, decided before it starts.

    Args:
        out: the folder of all runs.
        experiment, setting: names, for the record.
        make_task: draws the task of this seed and this method.
        origin: where the experiment can be imported from, for the record; empty if it is one of auxfast, or nowhere.
    """

    out: Path
    experiment: str
    setting: str
    method: Method
    seed: int
    config: RunConfig
    make_task: Callable[[], Task]
    origin: str = ""

    @property
    def title(self) -> str:
        """Name in the progress bar."""
        return ", ".join(filter(None, (self.experiment, self.setting, f"seed {self.seed}", self.method.name)))

    @property
    def path(self) -> Path:
        """The folder of this run."""
        names = (self.experiment, self.setting, self.method.name, f"seed-{self.seed}")
        return self.out.joinpath(*(re.sub(r"[^A-Za-z0-9._-]+", "-", name) for name in names if name))

    def description(self) -> dict[str, Any]:
        """The table that tells this run from others, as its folder keeps it.

        Raises:
            ValueError: a table cannot hold the configuration, so that nobody could read it in the end.
        """
        config = to_table(self.config)
        override(self.config, config)
        return {
            "experiment": self.experiment,
            "setting": self.setting,
            "method": self.method.name,
            "seed": self.seed,
            "config": config,
        }


def draw_task(plan: RunPlan) -> Task:
    """The task of a run before its first step, on its device. The global random state is left as it was.

    Raises:
        RunError: there is no such device.
        ImportError: it needs a package that is not installed.
        TypeError, ValueError: it cannot be drawn, lacks a member, or has one that is not what it must be.
    """
    _check_device(plan.config.train.device)
    with reproducible(plan.seed, plan.config.train):
        try:
            task = plan.make_task()
        except (RunError, ImportError):
            raise
        except Exception as error:  # it is the user's code
            raise ValueError(f"make_task: raised {described(error)}") from error
        check_members(task)
        _move(task, plan.config.train.device)
        return task


def check_plans(plans: Sequence[RunPlan], *, resume: bool = False) -> None:
    """Refuses plans that cannot all be recorded, before any of them is trained.

    Raises:
        RunError: a folder holds a run already (without `resume`), or a fixed combiner has no learned run to take phi
            from, neither on disk nor among the plans.
    """
    methods = {(plan.setting, plan.method) for plan in plans}
    for plan in plans:
        if not resume and _has_begun(plan.path):
            raise _occupied(plan.path)
        if plan.method.phi == "fixed" and (plan.setting, replace(plan.method, phi="learned")) not in methods:
            _learned_run(plan)


def record_run(
    plan: RunPlan,
    *,
    resume: bool = False,
    on_outer_step: OnOuterStep | None = None,
    process_group: ProcessGroup | None = None,
) -> Run:
    """Trains and scores one method from one seed: the same numbers each time, whatever ran or was interrupted before.

    The global random state and torch's number of threads are left as they were.

    Of several processes the first one writes the folder, which lies where all can read it, and computes the scores. All
    return the run.

    Args:
        resume: go on from the last checkpoint; a finished run is only read. Without, the folder must not hold a run.
        on_outer_step: called with every record as it is made.
        process_group: processes that share the run, see `Trainer`; all call this with the same plan.

    Raises:
        ValueError: a table cannot hold the configuration.
        RunError: the folder holds a run already, or one of another configuration, or another process writes it; a file
            cannot be written, or read; the loss is not finite any more (DivergedError); there is no learned run to
            take phi from; or another process of the group has ended. What was saved is kept.
    """
    path, description = plan.path, plan.description()
    with ExitStack() as stack:

        def open_folder() -> bool:
            """Whether the run is finished. If not, nobody else writes it until the stack ends."""
            if _takes_phi(plan):
                _learned_run(plan)  # a run that cannot be made leaves no folder
            finished = _has_begun(path) and (path / RESULT).exists()  # it may lie where nobody can write
            if not finished:
                stack.enter_context(locked(path))
            started = _has_begun(path)
            if started and not resume:
                raise _occupied(path)
            if started:
                _check_same(path, description)
            return started and (path / RESULT).exists()

        if not of_first(process_group, open_folder):
            _record(plan, description, on_outer_step or (lambda record: None), process_group)
        return of_first(process_group, lambda: read_whole_run(path))


def _record(
    plan: RunPlan, description: dict[str, Any], on_outer_step: OnOuterStep, process_group: ProcessGroup | None
) -> None:
    """Makes the run, or what is left of it."""
    path, name = plan.path, f"{plan.experiment}, {plan.method.name}, seed {plan.seed}"
    with reproducible(plan.seed, plan.config.train):
        try:
            resumes = of_first(process_group, (path / CHECKPOINT).exists)
            trainer = _make_trainer(plan, process_group)
            description |= {"losses": list(trainer.task.loss_names), "main": trainer.task.main}
            if plan.origin:
                description["origin"] = plan.origin
            if plan.method.phi == "fixed" and not resumes:
                description["phi from"] = _take_phi(trainer.training_loss, plan, description["config"])
            if resumes:
                of_first(process_group, lambda: _check_split(path, trainer.task))
            else:  # it begins, or begins again
                of_first(process_group, lambda: _begin(path, description, trainer.task, process_group))
            _train(trainer, path, on_outer_step, resumes, process_group)
        except WriteError as error:
            kept = "; what was saved before is kept, and --resume goes on from there" if _has_begun(path) else ""
            raise RunError(f"{error}{kept}") from error
        except FloatingPointError as error:
            raise DivergedError(f"{name}: {error}. What was saved is kept") from error
        except RunError:
            raise
        except Exception as error:  # the task, the optimizer, the scheduler or a weighting raised it
            if is_from_collective(error):
                raise RunError(
                    f"{name}: another process of the group has ended, or does not answer ({one_line(error)}); what was "
                    "saved is kept, and --resume goes on from there"
                ) from error
            raise RunError(f"{name} cannot be trained: {described(error)}") from error


def restore_run(run: Run, config: RunConfig, make_task: Callable[[], Task]) -> tuple[Task, Combiner | None]:
    """Task and combiner as a run's last checkpoint has them, on the CPU; in the end these are the best ones. Outer
    parameters of the task's own are in its `training_loss`.

    Raises:
        RunError: there is no checkpoint, or it is corrupt.
    """
    checkpoint = run.path / CHECKPOINT
    state = load_checkpoint(checkpoint, "cpu")
    with reproducible(run.seed, config.train):
        task, loss = _start(make_task, run.method, run.seed, config)
    with fitting(checkpoint):
        task.model.load_state_dict(state["trainer"]["model"])
        loss.load_state_dict(state["trainer"]["training_loss"])
    combiner = combiner_of(loss)
    return task, combiner if isinstance(combiner, Combiner) else None


@contextmanager
def reproducible(seed: int, config: TrainConfig) -> Iterator[None]:
    """Random state of its own, seeded, and `config.threads` threads; what they were before comes back."""
    threads = torch.get_num_threads()
    cuda = range(torch.cuda.device_count()) if torch.device(config.device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ before the first step


def _make_trainer(plan: RunPlan, process_group: ProcessGroup | None) -> Trainer:
    """The trainer at the start of the run, on its device."""
    device = plan.config.train.device
    _check_device(device)
    task, loss = _start(plan.make_task, plan.method, plan.seed, plan.config)
    _move(task, device)
    return Trainer(task, loss.to(device), plan.config.train, plan.seed, process_group)


def _start(make_task: Callable[[], Task], method: Method, seed: int, config: RunConfig) -> tuple[Task, TrainingLoss]:
    """Task and training loss before the first step, on the CPU."""
    task = make_task()
    torch.manual_seed(seed)  # so that the combiner's start does not depend on what the task has drawn
    return task, make_training_loss(method, config, task)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the second
        reason = str(error).partition("\n")[0]
        raise RunError(f"train.device: this machine has no {name!r}: {reason}") from error


def _move(task: Task, device: str) -> None:
    """Moves the task's tensors and its model, which are its attributes."""
    for name, value in vars(task).items():
        if isinstance(value, (Tensor, nn.Module)):
            setattr(task, name, value.to(device))


def _takes_phi(plan: RunPlan) -> bool:
    """Whether the run starts with the phi of another run."""
    return plan.method.phi == "fixed" and not (plan.path / CHECKPOINT).exists()


def _take_phi(loss: TrainingLoss, plan: RunPlan, config: dict[str, Any]) -> str:
    """Sets phi to what the learned method ended with from the first of its seeds, with the same configuration. Returns
    that run's folder, by name."""
    source = _learned_run(plan)
    with fitting(source / CHECKPOINT):
        if _with_newer_entries(read_json(source / CONFIG)["config"], config) != config:
            raise RunError(
                f"{plan.method.name} takes phi from {source}, which has another configuration: choose another --out"
            )
        loss.load_state_dict(load_checkpoint(source / CHECKPOINT, "cpu")["trainer"]["training_loss"])
    return source.name


def _learned_run(plan: RunPlan) -> Path:
    """Folder that a method which is fixed at the learned phi takes it from: that of the learned method's finished run
    from the first seed."""
    learned = replace(plan, method=replace(plan.method, phi="learned"))
    found = [result.parent for result in learned.path.parent.glob(f"seed-*/{RESULT}")]
    folders = [folder for folder in found if re.fullmatch(r"seed--?\d+", folder.name)]  # others are not the trainer's
    if not folders:
        raise RunError(
            f"{plan.method.name} takes phi from {learned.method.name}, of which {plan.out} has no finished run: train "
            "that first"
        )
    return min(folders, key=lambda folder: int(folder.name.removeprefix("seed-")))


# --------------------------------------------------------------------------------------------------------- the folder


def _has_begun(path: Path) -> bool:
    """Whether a run at `path` has anything to lose: a first record, or what comes after it."""
    metrics = path / METRICS
    recorded = metrics.exists() and metrics.stat().st_size > 0
    return recorded or (path / CHECKPOINT).exists() or (path / RESULT).exists()


def _occupied(path: Path) -> RunError:
    return RunError(f"{path} holds a run already: --resume (resume=True) goes on with it; or choose another --out")


def _with_newer_entries(config: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run on disk, with what it lacks and does not depend on if it is older than generated
    labels, or than a decay of combiners."""
    config = {"labels": current["labels"], **config}
    if isinstance(config.get("combiner"), dict):
        config["combiner"] = {"weight_decay": 0.0, **config["combiner"]}
    return config


def _check_same(path: Path, description: dict[str, Any]) -> None:
    """Refuses to go on with a run that is not the one that is asked for, wherever a fixed phi or the code came from."""
    table = read_description(path)
    for name in ("phi from", "losses", "main", "origin"):
        table.pop(name, None)
    table["config"] = _with_newer_entries(table["config"], description["config"])
    before, now = flattened(table), flattened(description)
    missing = "missing"
    differing = [key for key in {**before, **now} if before.get(key, missing) != now.get(key, missing)]
    if differing:
        changes = "; ".join(
            f"{key.removeprefix('config.')} was {before.get(key, missing)!r} and is {now.get(key, missing)!r}"
            for key in differing
        )
        raise RunError(
            f"{path} holds another run, which this cannot go on with ({changes}): choose another --out, or delete it"
        )


def _check_split(path: Path, task: Task) -> None:
    """Refuses to go on with other samples, such as those of a copy of the data that has changed."""
    if not (path / SPLIT).exists():  # the task has none, or had none when the run began
        return
    before, now = load_indices(path / SPLIT), split_indices(task)
    for part in {**before, **now}:
        if part not in before or part not in now or not torch.equal(before[part], now[part].sort().values.cpu()):
            raise RunError(
                f"{path / SPLIT} has other samples in its part {part} than the task draws now, as where the data have "
                f"changed: choose another --out, or {start_again(path / SPLIT)}"
            )


def _begin(path: Path, description: dict[str, Any], task: Task, process_group: ProcessGroup | None) -> None:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    processes = {}
    if process_group is not None:
        number, backend = distributed.get_world_size(process_group), distributed.get_backend(process_group)
        processes = {"processes": {"number": number, "writer": "rank 0", "backend": backend}}
    write_json(path / ENVIRONMENT, {**environment(), **processes})
    if parts := split_indices(task):
        save_indices(path / SPLIT, parts)
    write_json(path / CONFIG, description)


# ----------------------------------------------------------------------------------------------------------- training


def _train(
    trainer: Trainer, path: Path, on_outer_step: OnOuterStep, resumes: bool, process_group: ProcessGroup | None
) -> None:
    """Trains from the last checkpoint on, or from the start. The first process writes everything that comes of it."""
    start, metrics = time.perf_counter(), path / METRICS
    spent = _load_last_checkpoint(trainer, path) if resumes else 0.0
    first, own = of_first(process_group, lambda: len(trainer.records)), len(trainer.records)
    if own != first:
        raise RunError(
            f"{path / CHECKPOINT} is of {own} outer steps here, and of {first} where the first process runs: --out "
            "must be a folder that all processes see alike"
        )
    if trainer.part.rank > 0:
        trainer.run(on_outer_step)
        return
    write_bytes(metrics, b"".join(map(metrics_line, trainer.records)))  # records beyond the checkpoint are made again

    def seconds() -> float:
        return spent + time.perf_counter() - start

    def save() -> None:
        save_checkpoint(path / CHECKPOINT, {"trainer": trainer.state_dict(), "seconds": seconds()})

    def save_record(record: OuterRecord) -> None:
        with writing(metrics), metrics.open("ab") as file:
            file.write(metrics_line(record))
            checkpoint = (record.step + 1) % trainer.config.checkpoint_every == 0
            if checkpoint:
                file.flush()
                os.fsync(file.fileno())  # a checkpoint relies on the lines before it
        if checkpoint:
            save()

    names = trainer.task.loss_names
    with writing(path / "tensorboard"), tensorboard(path / "tensorboard", names, first) as write_scalars:

        def record_step(record: OuterRecord) -> None:
            save_record(record)
            write_scalars(record)
            on_outer_step(record)

        records = trainer.run(record_step)
    save()
    result = RunResult(
        score=as_number(trainer.task.score()),
        validation_score=as_number(trainer.task.validation_score()),
        outer_steps=len(records),
        stopped_early=trainer.stopped_early,
        inner_seconds=sum(record.inner_seconds for record in records),
        outer_seconds=sum(record.outer_seconds for record in records),
        seconds=seconds(),
        further_scores=further_scores(trainer.task),
    )
    write_json(path / RESULT, finite(result._asdict()))


def _load_last_checkpoint(trainer: Trainer, path: Path) -> float:
    """Brings the trainer to the last checkpoint. Returns the seconds that were spent until then."""
    places = None
    if torch.device(trainer.config.device).type == "cuda":  # the first process has written it, from a GPU of its own
        places = {"cuda:0": f"cuda:{torch.cuda.current_device()}"}
    state = load_checkpoint(path / CHECKPOINT, places)
    with fitting(path / CHECKPOINT):
        check_state(state, {"trainer": trainer.state_dict(), "seconds": 0.0})
        records = read_metrics(path / METRICS, state["trainer"]["step"])
        trainer.load_state_dict(state["trainer"], records)
        seconds: float = state["seconds"]
    return seconds
