"""Interleaved timing: the ratio of two functions on a shared machine, not their absolute speed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

ROUND_SECONDS = 5e-3  # long enough for the clock, short enough that neighbours disturb all functions alike


def interleaved(
    functions: dict[str, Callable[[], Any]], rounds: int = 30, inner: int | None = None
) -> dict[str, float]:
    """Median seconds of CPU time one call takes, measured on one thread in alternating rounds.

    Each round times every function once, in turn, so that a slow stretch of the machine (frequency,
    cache or memory traffic of a neighbour) falls on all of them and cancels in their ratio.

    Args:
        functions: what to time, by name; called without arguments.
        rounds: how many times each function is timed.
        inner: calls in one timed stretch; `None` picks as many of each function as take about 5 ms.

    Returns:
        The median over the rounds of the thread's CPU seconds per call, by name.
    """
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    try:
        calls = {name: inner or _calls_per_round(function) for name, function in functions.items()}
        samples: dict[str, list[float]] = {name: [] for name in functions}
        gc.disable()
        for _ in range(rounds):
            for name, function in functions.items():
                function()  # the previous function's data has left the caches: bring ours back first
                samples[name].append(_cpu_seconds(function, calls[name]) / calls[name])
            gc.collect(0)
        return {name: statistics.median(values) for name, values in samples.items()}
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def _cpu_seconds(function: Callable[[], Any], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        function()
    return time.thread_time() - start


def _calls_per_round(function: Callable[[], Any]) -> int:
    function()  # first calls allocate, compile or load
    calls = 1
    while (seconds := _cpu_seconds(function, calls)) < ROUND_SECONDS / 4:
        calls *= 2
    return max(1, round(calls * ROUND_SECONDS / seconds))
