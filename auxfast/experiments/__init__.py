"""The paper's experiments, trained method by method and seed by seed, and reports of their runs."""

from auxfast.experiments.base import Experiment, Finding
from auxfast.experiments.runs import RunFolder, RunResult, find_runs, train_run

__all__ = ["Experiment", "Finding", "RunFolder", "RunResult", "find_runs", "train_run"]
