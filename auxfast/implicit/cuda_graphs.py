"""How a static hypergradient is run: as it is, or as CUDA graphs that were captured of it once."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from auxfast.autograd.preserved_state import preserved_buffers
from auxfast.implicit.losses import check_call
from auxfast.implicit.static_hypergradient import StaticHypergradient

_NOT_CAPTURED = (
    "outer_loss and inner_loss cannot be captured in a CUDA graph. They must not read numbers on the host (.item(), "
    "float(), bool(), if), use data of the CPU (torch.tensor(...), random numbers drawn there), or make tensors whose "
    "shapes depend on numbers (nonzero(), boolean masks as indices); and no graph of the parameters that was recorded "
    "elsewhere may be alive. The error was: "
)
_LEFT_BEHIND = (
    "torch's allocator may take the capture for one that is still under way, and then gives no memory of "
    "record_stream() back until the process ends"
)
_unfinished: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture has failed: torch's allocators ask them, from then on, whether a stream is theirs."""


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
            with _no_collection(), preserved_buffers(check_call):
                if len(chunks) <= 1:
                    self._first = self._captured(partial(run_through, static))
                else:
                    self._first = self._captured(static.begin)
                    for count in dict.fromkeys(chunks):
                        self._chunks[count] = self._captured(partial(static.steps, count))
                    self._last = self._captured(static.end)
        except Exception as error:
            self._end_captures()
            cause = error.__context__ or error  # what ended the capture; that it has ended is an error of its own
            raise RuntimeError(f"{_NOT_CAPTURED}{cause}. {_LEFT_BEHIND}") from error
        self._flags = torch.zeros(len(chunks), dtype=torch.float64, device="cpu", pin_memory=True)
        self._events = [torch.cuda.Event() for _ in chunks]

    def _captured(self, part: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        _unfinished.append(graph)
        # Autograd's engine works in threads of its own, and other threads of the user may go on with theirs.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            part()
        _unfinished.remove(graph)
        return graph

    def _end_captures(self) -> None:
        """After a capture that failed torch's generator believes that it goes on, and refuses to draw numbers: another
        one, of next to nothing, ends that."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            suppress(RuntimeError),  # the error that ended the capture is raised after this
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            torch.zeros(1, device=self._stream.device)

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


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collects garbage before, and none within: what it frees may call for something that no capture may hold, and
    graphs of the parameters that are garbage should be gone."""
    gc.collect()
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


class _ReadFromOutside(TorchDispatchMode):
    """Notes the memory that operations read and that none of them has made, also those of autograd's threads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: dict[int, torch.UntypedStorage] = {}  # by address
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages([args, kwargs]):
            if storage.data_ptr() not in self._made:
                self.memory[storage.data_ptr()] = storage
        result = func(*args, **(kwargs or {}))
        self._made.update(storage.data_ptr() for storage in _storages(result) if storage.data_ptr() not in self.memory)
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
    return [tensor.untyped_storage() for tensor in tensors]


def memory_read(static: StaticHypergradient) -> list[torch.UntypedStorage]:
    """The memory that the program reads and does not make: a graph has its address, so that it must stay, even where
    nothing else holds it any more, as when a loss sees a variable that gets another tensor.

    It runs the program once, where torch raises an error for what waits for the device. A capture would find the same,
    and leave torch's generator and allocator as if it were still under way.

    Raises:
        RuntimeError: something in the losses waits.
    """
    outside = _ReadFromOutside()
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():  # that this mode does not know all that waits
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        with outside:
            run_through(static)
    except RuntimeError as error:
        raise RuntimeError(f"{_NOT_CAPTURED}{error}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return [*outside.memory.values()]


def run_through(static: StaticHypergradient) -> None:
    """Runs all of the program without a look at anything."""
    static.begin()
    for count in static.solve.chunks:
        static.steps(count)
    static.end()
