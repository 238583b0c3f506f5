"""Runs on disk: one folder for each method and seed, which reports read and `--resume` goes on from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auxfast.experiments.base import Experiment
from auxfast.experiments.run_folder import (
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RESULT,
    RunFolder,
    RunResult,
    find_runs,
    finite,
    fitting,
    metrics_line,
    read_metrics,
    reproducible,
    run_path,
    start_run,
)
from auxfast.train.config import RunConfig
from auxfast.train.environment import environment
from auxfast.train.files import (
    RunError,
    WriteError,
    load_checkpoint,
    read_json,
    save_checkpoint,
    write_bytes,
    write_json,
    writing,
)
from auxfast.train.methods import Method
from auxfast.train.serialization import flattened, override, to_table
from auxfast.train.task import Task
from auxfast.train.tensorboard import tensorboard
from auxfast.train.trainer import OuterRecord, Trainer
from auxfast.train.training_loss import TrainingLoss

__all__ = ["RunError", "RunFolder", "RunResult", "check_new", "find_runs", "run_config", "run_path", "train_run"]

OnOuterStep = Callable[[OuterRecord], None]


def train_run(
    experiment: Experiment,
    setting: str,
    method: Method,
    seed: int,
    out: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_outer_step: OnOuterStep | None = None,
) -> RunFolder:
    """Train and score one method from one seed: the same numbers each time, whatever ran or was interrupted before.

    The global random state and torch's number of threads are left as they were.

    Args:
        setting: one of `experiment.settings`.
        out: the folder of all runs.
        overrides: changes of the configuration, see `tables.override`; they come after those of the setting.
        resume: go on from the last checkpoint; a finished run is only read. Without, the folder must not hold a run.
        on_outer_step: called with every record as it is made.

    Raises:
        ValueError: a setting, an entry of the configuration or a method that does not fit.
        RunError: the folder holds a run already, or one of another configuration; a file cannot be written, or read;
            the loss is not finite any more; or there is no learned run to take phi from. What was saved is kept.
    """
    config = run_config(experiment, setting, overrides)
    path = run_path(out, experiment, setting, method, seed)
    description = {
        "experiment": experiment.name,
        "setting": setting,
        "method": method.name,
        "seed": seed,
        "config": to_table(config),
    }
    started = _has_begun(path)
    if started:
        if not resume:
            check_new(path)
        _check_same(path / CONFIG, description)
        if (path / RESULT).exists():
            return RunFolder(path, experiment)
    name = f"{experiment.name}, {method.name}, seed {seed}"
    with reproducible(seed, config.train):
        try:
            _check_device(config.train.device)
            task, loss = start_run(experiment, method, seed, config)
            if method.phi == "fixed" and not (path / CHECKPOINT).exists():
                description["phi from"] = _take_phi(loss, experiment, setting, method, out, description["config"])
            _move(task, config.train.device)
            trainer = Trainer(task, loss.to(config.train.device), config.train, seed, learn=method.learned)
            if not started:
                _begin(path, description, experiment)
            _train(trainer, path, on_outer_step or (lambda record: None))
        except WriteError as error:
            kept = "; what was saved before is kept, and --resume goes on from there" if _has_begun(path) else ""
            raise RunError(f"{error}{kept}") from error
        except FloatingPointError as error:
            raise RunError(f"{name}: {error}. What was saved is kept") from error
        except (ValueError, RuntimeError) as error:  # of the task, the optimizer, a weighting
            reason = " ".join(str(error).split())
            raise RunError(f"{name} cannot be trained: {type(error).__name__}: {reason}") from error
    return RunFolder(path, experiment)


def run_config(experiment: Experiment, setting: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The experiment's configuration in this setting, with `overrides`.

    Raises:
        ValueError: there is no such setting; or see `tables.override`.
    """
    if setting not in experiment.settings:
        names = ", ".join(map(repr, filter(None, experiment.settings)))
        allowed = f"must be one of {names}" if names else "which has no settings: leave it out"
        raise ValueError(f"setting: got {setting!r} for {experiment.name}, {allowed}")
    return override(override(experiment.config, experiment.settings[setting]), overrides or {})


def learned_run(out: Path, experiment: Experiment, setting: str, method: Method) -> Path:
    """Where a method that is fixed at the learned phi takes it from: the learned method's finished run of the first
    seed.

    Raises:
        RunError: there is none.
    """
    learned = replace(method, phi="learned")
    results = run_path(out, experiment, setting, learned, 0).parent.glob(f"seed-*/{RESULT}")
    folders = sorted((result.parent for result in results), key=lambda folder: int(folder.name.removeprefix("seed-")))
    if not folders:
        raise RunError(
            f"{method.name} takes phi from {learned.name}, of which {out} has no finished run: train that first"
        )
    return folders[0]


def check_new(path: Path) -> None:
    """Raises RunError if there is a run at `path`."""
    if _has_begun(path):
        raise RunError(f"{path} holds a run already: --resume goes on with it; or choose another --out")


def _has_begun(path: Path) -> bool:
    """Whether a run at `path` has anything to lose: a first record."""
    metrics = path / METRICS
    return (path / CONFIG).exists() and metrics.exists() and metrics.stat().st_size > 0


def _begin(path: Path, description: dict[str, Any], experiment: Experiment) -> None:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    write_json(path / ENVIRONMENT, environment())
    write_json(path / CONFIG, description)
    RunFolder(path, experiment)  # what cannot be read in the end is refused before training


def _train(trainer: Trainer, path: Path, on_outer_step: OnOuterStep) -> None:
    """Trains from the last checkpoint on, or from the start, and writes everything that comes of it."""
    start, spent = time.perf_counter(), 0.0

    def save() -> None:
        state = {"trainer": trainer.state_dict(), "seconds": spent + time.perf_counter() - start}
        save_checkpoint(path / CHECKPOINT, state)

    def save_record(record: OuterRecord) -> None:
        with writing(metrics), metrics.open("ab") as file:
            file.write(metrics_line(record))
            checkpoint = (record.step + 1) % trainer.config.checkpoint_every == 0
            if checkpoint:
                file.flush()
                os.fsync(file.fileno())  # a checkpoint counts on the lines before it
        if checkpoint:
            save()

    metrics = path / METRICS
    if (path / CHECKPOINT).exists():
        spent = _go_on(trainer, path)
    write_bytes(metrics, b"".join(map(metrics_line, trainer.records)))  # what is beyond the checkpoint comes again
    names, first = trainer.task.loss_names, len(trainer.records)
    with writing(path / "tensorboard"), tensorboard(path / "tensorboard", names, first) as write_scalars:

        def record_step(record: OuterRecord) -> None:
            save_record(record)
            write_scalars(record)
            on_outer_step(record)

        records = trainer.run(record_step)
    save()
    result = RunResult(
        score=trainer.task.score(),
        validation_score=trainer.task.validation_score(),
        outer_steps=len(records),
        stopped_early=trainer.stopped_early,
        inner_seconds=sum(record.inner_seconds for record in records),
        outer_seconds=sum(record.outer_seconds for record in records),
        seconds=spent + time.perf_counter() - start,
    )
    write_json(path / RESULT, finite(result._asdict()))


def _go_on(trainer: Trainer, path: Path) -> float:
    """Brings the trainer to the last checkpoint. Returns the seconds that were spent until then."""
    state = load_checkpoint(path / CHECKPOINT)
    with fitting(path / CHECKPOINT):
        count: int = state["trainer"]["step"]
        trainer.load_state_dict(state["trainer"], read_metrics(path / METRICS, count))
        seconds: float = state["seconds"]
    return seconds


def _take_phi(
    loss: TrainingLoss, experiment: Experiment, setting: str, method: Method, out: Path, config: dict[str, Any]
) -> str:
    """Sets phi to what the learned method ended with from the first of its seeds, with the same configuration. Returns
    that run's folder, by name."""
    source = learned_run(out, experiment, setting, method)
    if read_json(source / CONFIG)["config"] != json.loads(json.dumps(config)):
        raise RunError(f"{method.name} takes phi from {source}, which has another configuration: choose another --out")
    with fitting(source / CHECKPOINT):
        loss.load_state_dict(load_checkpoint(source / CHECKPOINT, "cpu")["trainer"]["training_loss"])
    return source.name


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # of a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise RunError(f"train.device: this machine has no {name!r}: {reason}") from error


def _move(task: Task, device: str) -> None:
    """The task's tensors and its model, which are its attributes, to the device."""
    for name, value in vars(task).items():
        if isinstance(value, (Tensor, nn.Module)):
            setattr(task, name, value.to(device))


def _check_same(path: Path, description: dict[str, Any]) -> None:
    """That the folder's run is the one that is asked for, wherever a fixed phi came from."""
    table = read_json(path)
    if not isinstance(table, dict):
        raise RunError(f"{path} is corrupt: delete {path.parent} to start that run again")
    table.pop("phi from", None)
    before, now = (flattened(entries) for entries in (table, json.loads(json.dumps(description))))
    missing = "missing"
    differing = [key for key in {**before, **now} if before.get(key, missing) != now.get(key, missing)]
    if differing:
        changes = "; ".join(
            f"{key.removeprefix('config.')} was {before.get(key, missing)!r} and is {now.get(key, missing)!r}"
            for key in differing
        )
        raise RunError(
            f"{path.parent} holds another run, which this cannot go on with ({changes}): choose another --out, or "
            "delete it"
        )
