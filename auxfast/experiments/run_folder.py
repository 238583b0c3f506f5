"""A run's folder: what is in it, and how it is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from auxfast.experiments.base import Experiment
from auxfast.nn import Combiner
from auxfast.train.config import RunConfig, TrainConfig
from auxfast.train.files import RunError, load_checkpoint, read_json
from auxfast.train.methods import Method, parse_method
from auxfast.train.serialization import override
from auxfast.train.task import Task
from auxfast.train.trainer import OuterRecord
from auxfast.train.training_loss import CombinedLoss, TrainingLoss, make_training_loss

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
CHECKPOINT, RESULT = "checkpoint.pt", "result.json"


class RunResult(NamedTuple):
    """How a finished run ended. `inner_seconds` and `outer_seconds` are the sums over its records; `seconds` is all of
    its time, scoring and saving included."""

    score: float
    validation_score: float
    outer_steps: int
    stopped_early: bool
    inner_seconds: float
    outer_seconds: float
    seconds: float


class RunFolder:
    """A run as it is on disk.

    Args:
        path: the folder.
        experiment: None: the one of the name that the folder says.

    Raises:
        RunError: a file is missing or corrupt, or its entries are not those of the experiment (any more); names it.
    """

    experiment: str
    setting: str
    method: Method
    seed: int
    config: RunConfig
    records: list[OuterRecord]
    result: RunResult | None  # None: unfinished
    environment: dict[str, Any]

    def __init__(self, path: Path, experiment: Experiment | None = None) -> None:
        self.path = path
        given = read_json(path / CONFIG)
        try:
            self.experiment, self.setting, self.seed = given["experiment"], given["setting"], given["seed"]
            self._experiment = experiment or _registered(self.experiment)
            self.method = parse_method(given["method"])
            self.config = override(self._experiment.config, given["config"])
            if self.setting not in self._experiment.settings:
                raise ValueError(f"{self.experiment} has no setting {self.setting!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path / CONFIG} does not describe a run of this version: {error}") from error
        self.records = read_metrics(path / METRICS) if (path / METRICS).exists() else []
        self.environment = read_json(path / ENVIRONMENT)
        self.result = None
        if (path / RESULT).exists():
            result = read_json(path / RESULT)
            try:
                numbers: dict[str, Any] = {key: math.nan if x is None else x for key, x in result.items()}
                self.result = RunResult(**numbers)
            except (TypeError, AttributeError) as error:
                raise RunError(f"{path / RESULT} is corrupt: delete {path} to start that run again") from error

    def restore(self) -> tuple[Task, Combiner | None]:
        """Task and combiner as the last checkpoint has them, on the CPU; in the end these are the best ones.

        Raises:
            RunError: there is no checkpoint, or it is corrupt.
        """
        state = load_checkpoint(self.path / CHECKPOINT, "cpu")
        with reproducible(self.seed, self.config.train):
            task, loss = start_run(self._experiment, self.method, self.seed, self.config)
        with fitting(self.path / CHECKPOINT):
            task.model.load_state_dict(state["trainer"]["model"])
            loss.load_state_dict(state["trainer"]["training_loss"])
        return task, loss.combiner if isinstance(loss, CombinedLoss) else None


def run_path(out: Path, experiment: Experiment, setting: str, method: Method, seed: int) -> Path:
    """Where a run is."""
    names = [experiment.name, *([setting] if setting else []), method.name, f"seed-{seed}"]
    return out.joinpath(*(re.sub(r"[^A-Za-z0-9._-]+", "-", name) for name in names))


def find_runs(paths: Iterable[Path]) -> list[RunFolder]:
    """All runs at or below the `paths`, in the order of their folders and seeds.

    Raises:
        RunError: a run cannot be read, or there are none.
    """
    given = list(paths)
    missing = [str(path) for path in given if not path.exists()]
    if missing:
        raise RunError(f"there is no {', '.join(missing)}")
    folders = {found.parent for path in given for found in path.rglob(CONFIG)}
    if not folders:
        raise RunError(f"no runs in {', '.join(map(str, given))}: `auxfast train` makes some")
    runs = [RunFolder(folder) for folder in sorted(folders)]
    return sorted(runs, key=lambda run: (run.path.parent, run.seed))


def start_run(experiment: Experiment, method: Method, seed: int, config: RunConfig) -> tuple[Task, TrainingLoss]:
    """Task and training loss before the first step, on the CPU."""
    task = experiment.make_task(seed, config.task, hold_out=method.is_combiner)
    torch.manual_seed(seed)  # whatever the task has drawn
    return task, make_training_loss(method, config, task)


@contextmanager
def fitting(checkpoint: Path) -> Iterator[None]:
    """Turns what goes wrong when a state is loaded that is not one of this run into a RunError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{checkpoint} does not fit this run ({reason}): delete it to start that run again") from error


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


def metrics_line(record: OuterRecord) -> bytes:
    return (json.dumps(finite(record._asdict()), allow_nan=False) + "\n").encode()


def finite(value: Any) -> Any:
    """JSON has no inf and NaN: null."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path, count: int | None = None) -> list[OuterRecord]:
    """The first `count` records; None: all. A last line that is being written is none."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    if count is not None and len(lines) < count:
        raise RunError(f"{path} has {len(lines)} lines of {count}: delete {path.parent} to start that run again")
    records = []
    for number, line in enumerate(lines[:count], start=1):
        try:
            entries = json.loads(line)
            tuples = {key: _tuple(entries[key]) for key in ("loss_weights", "phi")}
            records.append(OuterRecord(**{**entries, **tuples}))
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{path}, line {number}, is corrupt ({error}): delete {path.parent} to start that run again"
            ) from error
    return records


def _tuple(values: list[float | None] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(math.nan if value is None else value for value in values)


def _registered(name: str) -> Experiment:
    from auxfast.experiments.paper import get_experiment  # experiments know this module

    return get_experiment(name)
