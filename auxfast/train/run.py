"""A run as a plain record, read from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from auxfast.train.config import RunConfig
from auxfast.train.files import RunError, corrupt, finite, one_line, read_bytes, read_json, start_again
from auxfast.train.methods import Method, parse_method
from auxfast.train.serialization import override, words
from auxfast.train.trainer import OuterRecord

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
CHECKPOINT, RESULT, SPLIT = "checkpoint.pt", "result.json", "split.npz"
_DESCRIPTION = {"experiment": str, "setting": str, "method": str, "seed": int, "config": dict}
_NEWER = {"losses": list, "main": int, "origin": str}  # older runs do not have them

Entries = TypeVar("Entries")


class RunResult(NamedTuple):
    """How a finished run ended. `inner_seconds` and `outer_seconds` are the sums over its records; `seconds` is all of
    its time, scoring and saving included. `further_scores` are those of the task, by name; older runs have none."""

    score: float
    validation_score: float
    outer_steps: int
    stopped_early: bool
    inner_seconds: float
    outer_seconds: float
    seconds: float
    further_scores: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A run as its folder describes it. It knows its experiment by name only: whoever knows more asks `read_config`.

    Args:
        path: the folder.
        config: table of the whole configuration.
        records: one for each outer step that is on disk.
        result: the result; None while the run is unfinished.
        environment: the machine and the versions that it started with; empty if that file is gone.
        losses: names of the task's losses.
        main: index of the main loss among them.
        origin: where the experiment can be imported from, such as /home/me/mine.py:EXPERIMENT; empty if it is one of
            auxfast, or nowhere.
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
    losses: tuple[str, ...] = ()
    main: int = 0
    origin: str = ""


def read_run(path: Path) -> Run:
    """The run in the folder `path`.

    Raises:
        RunError: a file is missing or corrupt; names it.
    """
    description = read_description(path)
    result_path = path / RESULT  # read before the records: a run that ends meanwhile is unfinished
    result = _read_result(result_path) if result_path.exists() else None
    return Run(
        path=path,
        experiment=description["experiment"],
        setting=description["setting"],
        method=parse_method(description["method"]),
        seed=description["seed"],
        config=description["config"],
        records=tuple(read_metrics(path / METRICS)) if (path / METRICS).exists() else (),
        result=result,
        environment=_read_environment(path / ENVIRONMENT),
        losses=tuple(description.get("losses", ())),
        main=description.get("main", 0),
        origin=description.get("origin", ""),
    )


def read_whole_run(path: Path) -> Run:
    """The run in the folder `path`, with a record of each step that its result counts.

    Raises:
        RunError: see `read_run`; or records of a finished run are missing.
    """
    run = read_run(path)
    if run.result is not None and run.result.outer_steps != len(run.records):
        reason = f"it has {len(run.records)} lines, and {RESULT} is of {run.result.outer_steps} steps"
        raise corrupt(path / METRICS, reason)
    return run


def read_description(path: Path) -> dict[str, Any]:
    """The table that tells the run in the folder `path` from others.

    Raises:
        RunError: the file is missing or corrupt.
    """
    table = read_json(path / CONFIG)
    try:
        if not isinstance(table, dict):
            raise ValueError(f"got {table!r}, must be a table")
        for key, kind in _DESCRIPTION.items():
            if type(table.get(key)) is not kind:
                raise ValueError(f"{key}: got {table.get(key)!r}, must be {words(kind)}")
        for key, kind in _NEWER.items():
            if key in table and type(table[key]) is not kind:
                raise ValueError(f"{key}: got {table[key]!r}, must be {'a list' if kind is list else words(kind)}")
        if any(type(name) is not str for name in table.get("losses", ())):
            raise ValueError(f"losses: got {table['losses']!r}, must be a list, each entry a string")
        parse_method(table["method"])
    except ValueError as error:
        raise not_of_this_version(path, error) from error
    return table


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
    return RunError(
        f"{path / CONFIG} does not describe a run of this version: {one_line(error)}; {start_again(path / CONFIG)}"
    )


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """All runs at or below the `paths`, in the order of their folders and seeds.

    Raises:
        RunError: a run cannot be read, or there are none.
    """
    given = list(paths)
    missing = [str(path) for path in given if not path.exists()]
    if missing:
        raise RunError(f"there is no {', '.join(missing)}")
    # A run whose description is gone is found by its records, and not left out in silence.
    folders = {found.parent for path in given for name in (CONFIG, METRICS) for found in path.rglob(name)}
    if not folders:
        raise RunError(f"no runs in {', '.join(map(str, given))}: `auxfast train` makes some")
    return sorted(map(read_whole_run, sorted(folders)), key=lambda run: (run.path.parent, run.seed))


def metrics_line(record: OuterRecord) -> bytes:
    """A record as a line of `METRICS`."""
    return (json.dumps(finite(record._asdict()), allow_nan=False) + "\n").encode()


def read_metrics(path: Path, count: int | None = None) -> list[OuterRecord]:
    """The first `count` records of a file (None: all). An incomplete last line is ignored.

    Raises:
        RunError: the file is missing, too short, or a line is not the record of its step; says which line.
    """
    lines = read_bytes(path).split(b"\n")[:-1]
    if count is not None and len(lines) < count:
        raise RunError(f"{path} has {len(lines)} lines of {count}: {start_again(path)}")
    records: list[OuterRecord] = []
    for step, line in enumerate(lines[:count]):
        try:
            record = _entries(OuterRecord, json.loads(line), OuterRecord._field_defaults)
            if record.step != step:  # two processes have written it
                raise ValueError(f"step: got {record.step}, must be {step}")
            for name in ("loss_weights", "phi"):
                one, first = (len(getattr(r, name) or ()) for r in (record, records[0] if records else record))
                if one != first:
                    raise ValueError(f"{name}: got {one} entries, and line 1 has {first}")
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path}, line {step + 1}, is corrupt ({one_line(error)}): {start_again(path)}") from error
        records.append(record)
    return records


def _read_result(path: Path) -> RunResult:
    """The result in a file. It can be made again from the checkpoint."""
    remedy = "delete it, and `auxfast train` with --resume makes it anew"
    table = read_json(path, remedy)
    try:
        return _entries(RunResult, table, {"further_scores": {}})
    except ValueError as error:
        raise corrupt(path, error, remedy) from error


def _read_environment(path: Path) -> Mapping[str, Any]:
    """The environment in a file; nothing if there is no file, since no number depends on it."""
    remedy = "delete it, for no number depends on it"
    table = read_json(path, remedy) if path.exists() else {}
    if not isinstance(table, dict):
        raise corrupt(path, f"got {table!r}, must be a table", remedy)
    return table


def _entries(kind: Callable[..., Entries], table: Any, defaults: Mapping[str, Any] = {}) -> Entries:
    """The named tuple that a table from JSON describes. `defaults`: of fields that are newer than the table may be."""
    if not isinstance(table, dict):
        raise ValueError(f"got {table!r}, must be a table")
    hints, table = _hints(kind), {**defaults, **table}
    for name in [*hints, *table]:
        if name not in table or name not in hints:
            raise ValueError(f"{name}: {'there is none' if name in hints else 'no such entry'}")
    return kind(**{name: _entry(name, table[name], hint) for name, hint in hints.items()})


_hints = cache(get_type_hints)


def _entry(name: str, value: Any, hint: Any) -> Any:
    """An entry of a type that its hint allows: a list as a tuple, and null as NaN where there has to be a number."""
    kinds = _kinds(hint)
    if type(value) is dict and dict in kinds:
        return {key: _entry(f"{name}.{key}", entry, float) for key, entry in value.items()}
    if type(value) in kinds:
        return value
    if type(value) is list and tuple in kinds:
        return tuple([_entry(name, entry, float) for entry in value])
    if value is None and float in kinds:
        return math.nan
    raise ValueError(f"{name}: got {value!r}, must be {words(hint)}")


@cache
def _kinds(hint: Any) -> frozenset[type]:
    """The types that a hint allows."""
    alternatives = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = {get_origin(kind) or kind for kind in alternatives}
    return frozenset(kinds | {int} if float in kinds else kinds)
