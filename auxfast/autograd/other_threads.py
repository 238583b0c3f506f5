"""Other threads of the program: whether one may have used torch, and its random numbers, for a while."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType
from typing import NamedTuple

_POOL = "concurrent.futures.thread"  # whose threads do anybody's work and show nothing of it afterwards


class OtherThreads:
    """Watches the threads that Python has started, from its construction on. It holds what they run until then."""

    def __init__(self) -> None:
        self._before = _others()

    def may_have_used_torch(self) -> bool:
        """Whether another thread has run, and code that knows torch is or was on its stack. Threads that live for less
        than the watch, and those of torch itself, are not seen."""
        if not self._before and threading.active_count() == 1:
            return False
        before, now = self._before, _others()
        for ident in before.keys() | now.keys():
            seen = [each[ident] for each in (before, now) if ident in each]
            has_run = len(seen) == 1 or seen[0].cpu_time is None or seen[0].cpu_time != seen[1].cpu_time
            if has_run and any(map(_knows_torch, {frame for thread in seen for frame in _stack(thread.frame)})):
                return True
        return False


def is_started_by_python() -> bool:
    """Whether the present thread is one of Python's own, and not one of C++ that has called Python."""
    own = threading.get_ident()
    return any(thread.ident == own and not thread.name.startswith("Dummy-") for thread in threading.enumerate())


class _Thread(NamedTuple):
    frame: FrameType
    cpu_time: bytes | None  # as Linux writes it; None where it does not tell


def _others() -> dict[int, _Thread]:
    if threading.active_count() == 1:
        return {}
    frames, own = sys._current_frames(), threading.get_ident()
    threads = {thread.ident: thread.native_id for thread in threading.enumerate() if thread.ident != own}
    return {i: _Thread(frames[i], _cpu_time(native)) for i, native in threads.items() if i is not None and i in frames}


def _cpu_time(native_id: int | None) -> bytes | None:
    try:
        file = os.open(f"/proc/self/task/{native_id}/schedstat", os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.read(file, 100)
    finally:
        os.close(file)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _knows_torch(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__"))
    return module == _POOL or (_package(module) != "torch" and "torch" in map(_origin, [*frame.f_globals.values()]))


def _origin(value: object) -> str:
    """Package that a global comes from."""
    if isinstance(value, ModuleType):
        return _package(value.__name__)
    is_code = isinstance(value, (type, FunctionType, BuiltinFunctionType))
    return _package(getattr(value, "__module__", None) or "") if is_code else ""


def _package(module: str) -> str:
    return module.partition(".")[0]
