"""Makes the suite's runs, goes on where it was stopped, and writes what they show."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from auxfast.train.environment import environment
from auxfast.train.methods import parse_method
from auxfast.train.serialization import to_table
from benchmarks.learning.defaults import METHODS
from benchmarks.learning.table import as_json, as_markdown, make_rows
from benchmarks.learning.tasks import TASKS
from benchmarks.learning.training import make_plans, train_all

ROOT = Path(__file__).resolve().parents[2]
LEARNED = tuple(method for method in METHODS if parse_method(method).learned)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--smoke", action="store_true", help="one seed, two steps of each kind, nothing is kept")
    kind.add_argument("--crashes", action="store_true", help="learned combiners only, more seeds")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, help="their number (10; with --crashes 20)")
    parser.add_argument("--first-seed", type=int, default=0, help="to choose defaults, take 1000")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--out", type=Path, default=ROOT / "auxfast-runs" / "learning", help="folder of all runs")
    parser.add_argument("--results", type=Path, help="folder of table and figures (benchmarks/results, if all was run)")
    given = parser.parse_args(arguments)
    everything = not (given.smoke or given.methods or given.seeds or given.first_seed) and given.tasks == list(TASKS)
    methods = given.methods or (LEARNED if given.crashes else METHODS)
    count = given.seeds or (1 if given.smoke else 20 if given.crashes else 10)
    seeds = range(given.first_seed, given.first_seed + count)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if given.smoke else given.out
        runs = train_all(list(make_plans(given.tasks, methods, seeds, out, smoke=given.smoke)), given.processes)
    rows = make_rows(runs)
    text = as_markdown(rows)
    print(text)
    folder = given.results or (ROOT / "benchmarks" / "results" if everything else None)
    if folder is not None:
        name = f"learning{'-crashes' * given.crashes}-{_machine()}"
        folder.mkdir(parents=True, exist_ok=True)
        figures = {"environment": environment(), "outer loop": _outer_loop(), "rows": [as_json(row) for row in rows]}
        (folder / f"{name}.json").write_text(json.dumps(figures) + "\n")
        (folder / f"{name}.md").write_text(text + "\n")
        print(f"\nWrote {folder / name}.json and .md")


def _outer_loop() -> dict[str, object]:
    """The configuration of the outer loop, as the tasks have it in common."""
    tables = [to_table(task.config) for task in TASKS.values()]
    return {
        section: {
            key: value
            for key, value in tables[0][section].items()
            if all(table[section][key] == value for table in tables)
        }
        for section in ("train", "combiner")
    }


def _machine() -> str:
    model = re.sub(r"\(.*?\)|@.*|CPU|Processor", "", environment()["cpu"]["model"])
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


if __name__ == "__main__":
    main()
