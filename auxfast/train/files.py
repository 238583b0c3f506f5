"""Files that are written whole or not at all, and errors that say why one cannot be used."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PACKAGE, _OTHERS = Path(__file__).parents[1], Path(torch.__file__).parents[1]  # folders of auxfast and of libraries


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


def read_json(path: Path, remedy: str | None = None) -> Any:
    """The content of a JSON file.

    Args:
        remedy: what to do where the file is missing or corrupt, for the message.

    Raises:
        RunError: the file is missing or corrupt.
    """
    content = read_bytes(path, remedy)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, error, remedy) from error


def read_bytes(path: Path, remedy: str | None = None) -> bytes:
    """The content of a file. Raises RunError where there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; {remedy or start_again(path)}") from error


def corrupt(path: Path, reason: object, remedy: str | None = None) -> RunError:
    """The error of a file that does not hold what it should."""
    return RunError(f"{path} is corrupt ({one_line(reason)}): {remedy or start_again(path)}")


def start_again(path: Path) -> str:
    """The remedy for a file that its run cannot do without."""
    return f"delete {path.parent} to start that run again"


def one_line(reason: object) -> str:
    """The text of an error in a line."""
    if isinstance(reason, KeyError) and len(reason.args) == 1:  # its own text is the key alone
        return f"there is no {reason}"
    return " ".join(str(reason).split()) or type(reason).__name__


def described(error: BaseException) -> str:
    """An error of a user's code in a line: its kind, its text, and the last line of code that is no library's."""
    frames = [(Path(frame.filename), frame.lineno) for frame in extract_tb(error.__traceback__)]
    own = [(path, line) for path, line in frames if path.is_file() and not {_PACKAGE, _OTHERS} & {*path.parents}]
    place = f" ({own[-1][0].name}, line {own[-1][1]})" if own else ""
    return f"{type(error).__name__}: {one_line(error)}{place}"


def save_checkpoint(path: Path, state: Any) -> None:
    """Writes a state whole or not at all: the previous checkpoint stays until the new one is safe."""
    content = io.BytesIO()  # torch's own writer hides why the disk refuses
    torch.save(state, content)
    write_bytes(path, content.getvalue())


def load_checkpoint(path: Path, device: str | dict[str, str] | None = None) -> Any:
    """The state that was saved, on `device` or, if that is None, where it was; a dict says which device stands for
    which. No code from the file is run.

    Raises:
        RunError: the file is missing or corrupt.
    """
    remedy = "delete it to start that run again"
    content = io.BytesIO(read_bytes(path, start_again(path)))
    try:
        with zipfile.ZipFile(content) as archive:
            damaged = archive.testzip()  # torch does not compare the checksums that it has written
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        content.seek(0)
        return torch.load(content, map_location=device, weights_only=True)
    except Exception as error:  # a file of something else can raise any
        reason = one_line(error).partition(". ")[0] if content.getbuffer().nbytes else "it is empty"
        raise corrupt(path, reason, remedy) from error


def save_indices(path: Path, parts: Mapping[str, Tensor]) -> None:
    """Writes the indices of each part as sorted arrays of numpy's format, of which 70,000 take 0.1 MB.

    Raises:
        WriteError: see `write_bytes`.
    """
    content = io.BytesIO()
    arrays: dict[str, Any] = {
        name: indices.sort().values.cpu().numpy().astype(np.int32) for name, indices in parts.items()
    }
    np.savez_compressed(content, **arrays)
    write_bytes(path, content.getvalue())


def load_indices(path: Path) -> dict[str, Tensor]:
    """The indices that were saved, (n,) int64, sorted.

    Raises:
        RunError: the file is missing or corrupt.
    """
    content = io.BytesIO(read_bytes(path))
    try:
        with np.load(content, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in arrays.files}
    except Exception as error:  # a file of something else can raise any
        raise corrupt(path, error) from error


@contextmanager
def fitting(checkpoint: Path) -> Iterator[None]:
    """Turns what goes wrong when a state is loaded that is not one of this run into a RunError."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # a state of something else can raise any
        raise RunError(
            f"{checkpoint} does not fit this run ({one_line(error)}): delete it to start that run again"
        ) from error
