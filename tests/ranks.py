"""Functions that run on several ranks at once: real processes with gloo, started once for all tests that need them."""

from __future__ import annotations

import atexit
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed

TIMEOUT = 60  # seconds


class RankError(AssertionError):
    """A rank has raised, or does not answer."""


def on_ranks(function: Callable[..., Any], *args: Any, size: int = 2, timeout: float = TIMEOUT) -> list[Any]:
    """The results of `function(rank, *args)` on each rank, within a process group of all ranks.

    Args:
        function: one of a module, not nested. Arguments and results are pickled.
        timeout: seconds after which ranks that do not answer are ended.

    Raises:
        RankError: with the traceback of each rank that has raised; or one does not answer.
    """
    return _pool(size).run(function, args, timeout)


def error_of(compute: Callable[[], Any]) -> str:
    """The kind and the text of the error that a call raises."""
    try:
        compute()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@cache
def _pool(size: int) -> _Pool:
    return _Pool(size)


class _Pool:
    def __init__(self, size: int) -> None:
        self._size = size
        self._workers: list[tuple[Any, Connection]] = []
        atexit.register(self.end)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        answers = []
        for rank, (_, pipe) in enumerate(self._workers):
            try:
                answers.append(pipe.recv() if pipe.poll(timeout) else (False, f"rank {rank} does not answer"))
            except EOFError:
                answers.append((False, f"rank {rank} has died"))
        if all(good for good, _ in answers):
            return [result for _, result in answers]
        self.end()  # their process groups are of no use any more
        raise RankError("\n".join(text for good, text in answers if not good))

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        store = f"{tempfile.mkdtemp()}/store"
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, rank, self._size, store), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append((worker, ours))

    def end(self) -> None:
        for worker, pipe in self._workers:
            worker.kill()
            worker.join()
            pipe.close()
        self._workers = []


def _work(pipe: Connection, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
