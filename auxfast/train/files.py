"""Files that are written whole or not at all, and the errors that say why one cannot be written or read."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class RunError(Exception):
    """A run cannot be made, read or gone on with; the message is one line, and says what to do."""


class WriteError(RunError):
    """A file cannot be written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError (disk full, no permission) into a WriteError that names the file."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {error.filename or path}: {error.strerror}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, whatever happens in between: kill, disk full or power failure.

    Raises:
        WriteError: it cannot be written; what was there before is still there.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, whole or not at all.

    Raises:
        ValueError: `content` holds a number that JSON does not have (inf, NaN); see `finite`.
        WriteError: see `write_bytes`.
    """
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """`value` for JSON, which has no inf and NaN: they become null."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        RunError: the file is missing or corrupt.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is corrupt ({error}): delete {path.parent} to start that run again") from error


def save_checkpoint(path: Path, state: Any) -> None:
    """Writes a state whole or not at all: the previous checkpoint stays until the new one is safe."""
    content = io.BytesIO()  # torch's own writer hides why the disk refuses
    torch.save(state, content)
    write_bytes(path, content.getvalue())


def load_checkpoint(path: Path, device: str | None = None) -> Any:
    """The state that was saved, on `device` or, if that is None, where it was. No code from the file is run.

    Raises:
        RunError: the file is missing or corrupt.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or "empty"
        raise RunError(f"{path} is corrupt ({reason}): delete it to start that run again") from error


@contextmanager
def fitting(checkpoint: Path) -> Iterator[None]:
    """Turns what goes wrong when a state is loaded that is not one of this run into a RunError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{checkpoint} does not fit this run ({reason}): delete it to start that run again") from error
