"""Benchmarks run on one thread; what they put into `extra_info` is printed as a table for each group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

ROWS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _collect_extra_info(request: pytest.FixtureRequest) -> Iterator[None]:
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is not None and benchmark.extra_info:
        groups = request.config.stash.setdefault(ROWS, {})
        groups.setdefault(benchmark.group or "", []).append({"": request.node.name, **benchmark.extra_info})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for group, rows in config.stash.get(ROWS, {}).items():
        terminalreporter.section(group or "benchmarks")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = [columns, *([_text(row.get(column, "")) for column in columns] for row in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
        for line in table:
            cells = [
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            terminalreporter.write_line("  ".join(cells).rstrip())


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
