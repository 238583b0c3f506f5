"""Other threads of the program: whether one may have used torch, and its random numbers, for a while."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

_POOLS = ("concurrent.futures.thread", "multiprocessing.pool")  # their threads run anybody's functions


class OtherThreads:
    """Watches the other threads that Python has started, from its construction on.

    Stacks would tell what they run, but those of running threads cannot be read safely. So a thread may use torch if it
    is the main thread or one of a pool, or if it was started with a function from a module that has torch, or something
    of it, among its globals.
    """

    def __init__(self) -> None:
        self._before = _others()

    def may_have_used_torch(self) -> bool:
        """Whether a thread that may use torch has run since. One that was started and has ended since is not seen."""
        if not self._before and threading.active_count() == 1:
            return False
        now = _others()
        for thread in self._before.keys() | now.keys():
            seen = [each[thread] for each in (self._before, now) if thread in each]
            has_run = len(seen) == 1 or seen[0].cpu_time is None or seen[0].cpu_time != seen[1].cpu_time
            if has_run and (thread is threading.main_thread() or any(map(_may_use_torch, seen[0].code))):
                return True
        return False


def is_started_by_python() -> bool:
    """Whether the present thread is one of Python's own, and not one of C++ that has called Python."""
    own = threading.get_ident()
    return any(thread.ident == own and not thread.name.startswith("Dummy-") for thread in threading.enumerate())


class _Thread(NamedTuple):
    code: tuple[Any, ...]  # what the thread was started with; a thread that has ended has forgotten it
    cpu_time: bytes | None  # as Linux writes it; None where it does not tell


def _others() -> dict[threading.Thread, _Thread]:
    if threading.active_count() == 1:
        return {}
    own = threading.get_ident()
    return {thread: _seen(thread) for thread in threading.enumerate() if thread.ident != own}


def _seen(thread: threading.Thread) -> _Thread:
    code = (type(thread).run, getattr(thread, "_target", None), getattr(thread, "function", None))
    return _Thread(code, _cpu_time(thread.native_id))


def _cpu_time(native_id: int | None) -> bytes | None:
    try:
        file = os.open(f"/proc/self/task/{native_id}/schedstat", os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.read(file, 100)
    except OSError:  # it has ended
        return None
    finally:
        os.close(file)


def _may_use_torch(code: Any) -> bool:
    while isinstance(code, functools.partial):
        code = code.func
    code = inspect.unwrap(code)
    module = str(getattr(code, "__module__", None))
    if module in _POOLS:
        return True
    names = getattr(code, "__globals__", None) or getattr(sys.modules.get(module), "__dict__", {})
    return not module.startswith("torch.") and "torch" in map(_origin, [*names.values()])


def _origin(value: object) -> str:
    """The package that a global comes from."""
    if isinstance(value, ModuleType):
        name = value.__name__
    elif isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        name = getattr(value, "__module__", None) or ""
    else:
        return ""
    return name.partition(".")[0]
