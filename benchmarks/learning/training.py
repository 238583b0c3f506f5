"""Trains many runs, several at a time; what is there already is only read."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from auxfast.experiments.base import plan_run, run_config
from auxfast.train.files import RunError, WriteError
from auxfast.train.methods import parse_method
from auxfast.train.recording import RunPlan, record_run
from auxfast.train.run import Run, read_run
from benchmarks.learning.tasks import TASKS

SMOKE = {"train.outer_steps": 2, "train.inner_steps": 2}


def make_plans(
    tasks: Iterable[str], methods: Iterable[str], seeds: Iterable[int], out: Path, *, smoke: bool
) -> Iterator[RunPlan]:
    """Plans seed by seed, so that what is interrupted has the same seeds of all tasks and methods."""
    for seed in seeds:
        for task in map(TASKS.__getitem__, tasks):
            for setting in task.settings:
                config = run_config(task, setting, SMOKE if smoke else None)
                for method in methods:
                    yield plan_run(task, setting, parse_method(method), seed, out, config)


def train_all(plans: Sequence[RunPlan], processes: int) -> list[Run]:
    """Makes the runs, or what is left of them. One that crashes has no result, and is told of on stderr.

    Raises:
        RunError: it is no fault of training: a folder holds another configuration, or cannot be written.
    """
    runs = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for run, crash in pool.imap_unordered(_train, plans):
            runs.append(run)
            if crash or len(runs) % 50 == 0:
                print(crash or f"{len(runs)} of {len(plans)} runs", file=sys.stderr, flush=True)
    return sorted(runs, key=lambda run: run.seed)


def _train(plan: RunPlan) -> tuple[Run, str]:
    """The run, and why it crashed, if it did."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the auxiliary set takes")  # a tenth of few labels says little
        try:
            return record_run(plan, resume=True), ""
        except RunError as error:
            if error.__cause__ is None or isinstance(error.__cause__, WriteError):
                raise
            return read_run(plan.path), f"crashed: {error}"
