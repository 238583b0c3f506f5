"""Times of a call on a GPU, in microseconds, and the kernels that it launches.

Three figures, since they answer different questions:

- eager: calls one after the other, between two CUDA events. Where kernels are short, it is the host's time.
- graph: the same calls captured in a CUDA graph, and replayed: what the device needs, gaps between kernels included.
- launches: kernels and copies of one call, by torch's profiler, and the sum of their times without gaps.

On a CPU there are the times of eager calls alone: enough to see that a benchmark runs.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Figure = dict[str, Any]
ROUNDS = 5
_MOST_CALLS = 1000  # a round of more, of some microseconds each, tells no more
_KERNELS_SHOWN = 8


class Timer:
    """Measures calls on `device`, within about `seconds` for each figure.

    Everything that is measured must be recorded and run within `stream()`: autograd runs a node on the stream of its
    forward pass, so that a graph which was recorded on another stream cannot be captured.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.on_gpu else None

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A stream beside the default one, as a capture needs it."""
        with torch.cuda.stream(self._stream):
            yield
        self.wait()

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def eager(self, function: Callable[[], Any]) -> float:
        """Median over rounds of the time of a call."""
        function()  # first calls allocate, compile or load
        self.wait()
        once = self._time(function, 1)
        rounds = ROUNDS if once < 1e6 * self.seconds else 2
        calls = min(_MOST_CALLS, max(1, int(1e6 * self.seconds / rounds / max(once, 0.1))))
        return statistics.median(self._time(function, calls) for _ in range(rounds))

    def _time(self, function: Callable[[], Any], calls: int) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls * 1e6
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / calls * 1e3

    def graph(self, function: Callable[[], Any], calls: int) -> float | None:
        """The time of a call in replays of a graph of `calls` calls; `None` on a CPU."""
        if not self.on_gpu:
            return None
        for _ in range(2):
            function()  # what only the first calls do cannot be captured
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            kept = [function() for _ in range(calls)]  # so that no call's results lie where another's do
        time_of_all = self.eager(graph.replay)
        del kept
        return time_of_all / calls

    def launches(self, function: Callable[[], Any]) -> Figure | None:
        """Number and times of the kernels of one call, the longest ones by name; `None` on a CPU."""
        if not self.on_gpu:
            return None
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            function()
            self.wait()
        count: Counter[str] = Counter()
        times: Counter[str] = Counter()
        for event in profiled.events():
            if event.device_type == DeviceType.CUDA:
                count[event.name] += 1
                times[event.name] += event.device_time
        longest = [[name[:90], count[name], round(us, 1)] for name, us in times.most_common(_KERNELS_SHOWN)]
        return {"launches": count.total(), "kernels us": round(times.total(), 1), "longest": longest}


def in_turn(functions: list[Callable[[], Any]]) -> Callable[[], Any]:
    """A function whose calls are those of `functions`, one after the other, for ever."""
    place = 0

    def call() -> Any:
        nonlocal place
        place = (place + 1) % len(functions)
        return functions[place]()

    return call
