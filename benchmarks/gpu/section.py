"""Sections of the benchmark: figures that are written as they come, within a share of the time."""

from __future__ import annotations

import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks.gpu.timing import Figure, Timer, in_turn

Call = Callable[[], Any]
_MOST_SETS = 48
"""Sets of inputs that take turns. Where twice the L2 cache takes more, they are so small that they would be in the
cache in a training too."""

_GRAPH_US, _MOST_CALLS_OF_A_GRAPH = 2000.0, 100
"""Eager time of the calls of one graph, and their number at most: the launch of a graph takes some microseconds, which
must not count."""


class Section:
    """Figures by row and by way, such as auxfast's and torch's.

    Args:
        timer: what measures.
        seconds: when these have passed, nothing more is measured, and `left_out` says what.
        small: whether sizes are those of a dry run.
        save: called after each row.

    Attributes:
        figures: rows, of ways, of numbers.
        left_out: rows and ways that there was no time for.
        errors: number of figures that have an "error" in place of numbers.
    """

    def __init__(self, timer: Timer, seconds: float, small: bool, save: Callable[[], None] = lambda: None) -> None:
        self.timer, self.small, self._save = timer, small, save
        self.device = timer.device
        self._begin, self._end = time.monotonic(), time.monotonic() + seconds
        self._clocks = [nvidia_smi(CLOCKS)] if timer.on_gpu else []
        self.figures: dict[str, Any] = {}
        self.left_out: list[str] = []
        self.errors = 0

    def compare(
        self,
        row: str,
        ways: dict[str, Callable[[int], Call]],
        *,
        graph: bool = True,
        launches: bool = True,
        set_bytes: int | None = None,
        contexts: Mapping[str, AbstractContextManager[Any]] = {},
    ) -> None:
        """Measures each way of a row. Where there are several, "times" says how many times longer the others take than
        the first.

        Args:
            ways: functions from a number to a call, which has inputs of its own for each number.
            graph: whether the calls can be captured.
            launches: whether to count them.
            set_bytes: the size of one set of inputs; as many sets take turns as keep these out of the L2 cache. `None`:
                one set.
            contexts: what a way is made and measured in, by its name.
        """
        found = self.figures.setdefault(row, {})
        for way, make in ways.items():
            if time.monotonic() > self._end:
                self.left_out.append(f"{row}, {way}")
                continue
            try:
                with contexts.get(way, nullcontext()):
                    found[way] = self._measure(make, graph, launches, self._sets(set_bytes))
            except Exception:  # on a lent machine the other figures must come all the same
                self.errors += 1
                found[way] = {"error": traceback.format_exc()[-2000:]}
        first, *others = ways
        for kind in ("eager us", "graph us"):
            for way in others:
                times = [found.get(name, {}).get(kind) for name in (first, way)]
                if all(times):
                    found[way].setdefault("times", {})[kind] = round(times[1] / times[0], 3)
        self._save()

    def _measure(self, make: Callable[[int], Call], graph: bool, launches: bool, sets: int) -> Figure:
        calls = [make(i) for i in range(sets)]
        call = in_turn(calls) if sets > 1 else calls[0]
        figure: Figure = {"eager us": self.timer.eager(call)}
        if graph:
            several = min(_MOST_CALLS_OF_A_GRAPH, _GRAPH_US / figure["eager us"])
            figure["graph us"] = self.timer.graph(call, sets * max(1, round(several / sets)))
        if launches:
            figure |= self.timer.launches(call) or {}
        if sets > 1:
            figure["sets"] = sets
        return figure

    def _sets(self, set_bytes: int | None) -> int:
        if set_bytes is None or not self.timer.on_gpu:
            return 1
        sets = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size // set_bytes + 1
        return sets if sets <= _MOST_SETS else 1

    def note(self, name: str, value: Any) -> None:
        """Keeps a number that is no time of a call."""
        self.figures[name] = value
        self._save()

    def report(self) -> dict[str, Any]:
        if self.timer.on_gpu:
            self._clocks[1:] = [nvidia_smi(CLOCKS)]
        return {
            "seconds": round(time.monotonic() - self._begin, 1),
            "clocks": self._clocks,
            "left out": self.left_out,
            "figures": self.figures,
        }


CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"


def nvidia_smi(query: str) -> str:
    """What nvidia-smi answers to a query, such as CLOCKS; or why it does not."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"
