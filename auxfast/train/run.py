"""A run as a plain record, read from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from auxfast.train.config import RunConfig
from auxfast.train.files import RunError, finite, read_json
from auxfast.train.methods import Method, parse_method
from auxfast.train.serialization import override
from auxfast.train.trainer import OuterRecord

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
CHECKPOINT, RESULT = "checkpoint.pt", "result.json"
_DESCRIPTION = {"experiment": str, "setting": str, "method": str, "seed": int, "config": dict}


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


@dataclass(frozen=True)
class Run:
    """A run as its folder describes it. It knows its experiment by name only: whoever knows more asks `read_config`.

    Args:
        path: the folder.
        config: table of the whole configuration.
        records: one for each outer step that is on disk.
        result: the result; None while the run is unfinished.
        environment: the machine and the versions that it started with.
    """

    path: Path
    experiment: str
    setting: str
    method: Method
    seed: int
    config: Mapping[str, Any]
    records: tuple[OuterRecord, ...]
    result: RunResult | None
    environment: Mapping[str, Any]


def read_run(path: Path) -> Run:
    """The run in the folder `path`.

    Raises:
        RunError: a file is missing or corrupt; names it.
    """
    description, environment = read_json(path / CONFIG), read_json(path / ENVIRONMENT)
    result = read_json(path / RESULT) if (path / RESULT).exists() else None
    try:
        for key, kind in _DESCRIPTION.items():
            if not isinstance(description[key], kind):
                raise ValueError(f"{key}: got {description[key]!r}")
        method = parse_method(description["method"])
    except (KeyError, TypeError, ValueError) as error:
        raise not_of_this_version(path, error) from error
    return Run(
        path=path,
        experiment=description["experiment"],
        setting=description["setting"],
        method=method,
        seed=description["seed"],
        config=description["config"],
        records=tuple(read_metrics(path / METRICS)) if (path / METRICS).exists() else (),
        result=None if result is None else _result(result, path / RESULT),
        environment=environment,
    )


def read_config(defaults: RunConfig, run: Run) -> RunConfig:
    """The configuration of a run.

    Args:
        defaults: configuration of its experiment, which says what entries there are.

    Raises:
        RunError: the run's entries are not those of `defaults` (any more).
    """
    try:
        return override(defaults, run.config)
    except ValueError as error:
        raise not_of_this_version(run.path, error) from error


def not_of_this_version(path: Path, error: object) -> RunError:
    """The error of a run whose description makes no sense here."""
    return RunError(f"{path / CONFIG} does not describe a run of this version: {error}")


def find_runs(paths: Iterable[Path]) -> list[Run]:
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
    return sorted(map(read_run, sorted(folders)), key=lambda run: (run.path.parent, run.seed))


def metrics_line(record: OuterRecord) -> bytes:
    """A record as a line of `METRICS`."""
    return (json.dumps(finite(record._asdict()), allow_nan=False) + "\n").encode()


def read_metrics(path: Path, count: int | None = None) -> list[OuterRecord]:
    """The first `count` records of a file (None: all). An incomplete last line is ignored."""
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


def _result(table: Any, path: Path) -> RunResult:
    try:
        numbers: dict[str, Any] = {key: math.nan if value is None else value for key, value in table.items()}
        return RunResult(**numbers)
    except (TypeError, AttributeError) as error:
        raise RunError(f"{path} is corrupt: delete {path.parent} to start that run again") from error
