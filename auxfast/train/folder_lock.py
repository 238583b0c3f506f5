"""A lock on a folder: one process at a time writes a run."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from auxfast.train.files import RunError, writing

_LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other process out of a folder, which is made if there is none. Only writers ask for the lock.

    The kernel frees the lock when its holder ends, however that comes about.

    Raises:
        RunError: another process holds the lock, or the file system has no locks.
        WriteError: the folder or the file cannot be made.
    """
    path = folder / _LOCK
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = _open_locked(path)
    try:
        with writing(path):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):  # a file that is left over does no harm
            path.unlink()  # before the lock is free, so that it is never the file of the next holder
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    """A descriptor of the file, which has the lock."""
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except BlockingIOError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise RunError(
                f"{path.parent} is being written by {holder}: wait for it, or choose another --out"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise RunError(
                f"cannot lock {path}: {error.strerror}; choose an --out on a file system that has locks (flock)"
            ) from error
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """What the holder of the lock has written. It takes the lock first, and may not have come to writing."""
    for _ in range(100):
        if text := os.pread(descriptor, 1000, 0).decode(errors="replace").strip():
            return text
        time.sleep(0.01)
    return "another process"


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at `path`: its last holder may just have deleted it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
