"""How a static hypergradient is run: as it is, or as CUDA graphs that were captured of it once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.preserved_state import preserved_buffers
from auxfast.implicit.losses import check_call
from auxfast.implicit.static_hypergradient import StaticHypergradient

_NOT_CAPTURED = (
    "outer_loss and inner_loss cannot be captured in a CUDA graph. They must not read numbers on the host (.item(), "
    "float(), bool(), if), use data of the CPU (torch.tensor(...), random numbers drawn there), or make tensors whose "
    "shapes depend on numbers (nonzero(), boolean masks as indices); and no graph of the parameters that was recorded "
    "elsewhere may be alive. The error was: "
)


class Program:
    """A static hypergradient, run operation by operation.

    Attributes:
        behind: chunks that are begun before the host knows whether they were needed.
    """

    behind = 1

    def __init__(self, static: StaticHypergradient) -> None:
        self._static = static

    def run(self) -> int:
        """Runs it from begin to end; returns how many steps were taken."""
        chunks = self._static.solve.chunks
        self._begin()
        taken = 0
        for i, count in enumerate(chunks):
            if i >= self.behind and self._has_stopped(i - self.behind):
                break
            self._steps(count)
            taken += count
            if i + self.behind < len(chunks):
                self._note(i)
        self._end()
        return taken

    def _begin(self) -> None:
        self._static.begin()

    def _steps(self, count: int) -> None:
        self._static.steps(count)

    def _end(self) -> None:
        self._static.end()

    def _note(self, chunk: int) -> None:
        """Takes down, for `_has_stopped`, whether the system is solved after this chunk."""

    def _has_stopped(self, chunk: int) -> bool:
        return bool(self._static.solve.status())

    def results(self) -> tuple[list[Tensor], Tensor]:
        """The hypergradients and the numbers of the last run, for the caller to keep."""
        return self._static.flat_grads, self._static.numbers


class CapturedProgram(Program):
    """The same, captured: one CUDA graph, or where there are several chunks one for the beginning, one for each length
    of a chunk, and one for the end. The host is one chunk ahead of what it knows, so that the device never waits.

    Args:
        static: a program that has run before on this stream.
        stream: the present stream, another than the default one.

    Raises:
        RuntimeError: something in the losses cannot be captured.
    """

    behind = 2

    def __init__(self, static: StaticHypergradient, stream: torch.cuda.Stream) -> None:
        super().__init__(static)
        self._stream = stream
        self._pool: Any = torch.cuda.graph_pool_handle()
        chunks = static.solve.chunks
        self._chunks: dict[int, torch.cuda.CUDAGraph] = {}
        self._last: torch.cuda.CUDAGraph | None = None
        try:
            with preserved_buffers(check_call):
                if len(chunks) == 1:
                    self._first = self._captured(partial(run_through, static))
                else:
                    self._first = self._captured(static.begin)
                    for count in dict.fromkeys(chunks):
                        self._chunks[count] = self._captured(partial(static.steps, count))
                    self._last = self._captured(static.end)
        except Exception as error:
            torch.cuda.synchronize()
            cause = error.__context__ or error  # what ended the capture; that it has ended is an error of its own
            raise RuntimeError(f"{_NOT_CAPTURED}{cause}") from error
        self._flags = torch.zeros(len(chunks), dtype=torch.float64, pin_memory=True)
        self._events = [torch.cuda.Event() for _ in chunks]

    def _captured(self, part: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Autograd's engine works in threads of its own, and other threads of the user may go on with theirs.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            part()
        return graph

    def _begin(self) -> None:
        self._first.replay()

    def _steps(self, count: int) -> None:
        if self._chunks:
            self._chunks[count].replay()

    def _end(self) -> None:
        if self._last is not None:
            self._last.replay()

    def _note(self, chunk: int) -> None:
        self._flags[chunk : chunk + 1].copy_(self._static.solve.status(), non_blocking=True)
        self._events[chunk].record()

    def _has_stopped(self, chunk: int) -> bool:
        self._events[chunk].synchronize()
        return bool(self._flags[chunk])

    def results(self) -> tuple[list[Tensor], Tensor]:
        flat_grads, numbers = super().results()
        return [flat.clone() for flat in flat_grads], numbers.clone()


def check_waits_for_nothing(static: StaticHypergradient) -> None:
    """Runs the program once where torch raises an error for what waits for the device. A capture would find the same,
    and leave torch's generator and allocator as if it were still under way.

    Raises:
        RuntimeError: something in the losses waits.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():  # that this mode does not know all that waits
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        run_through(static)
    except RuntimeError as error:
        raise RuntimeError(f"{_NOT_CAPTURED}{error}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def run_through(static: StaticHypergradient) -> None:
    """Runs all of the program without a look at anything."""
    static.begin()
    for count in static.solve.chunks:
        static.steps(count)
    static.end()
