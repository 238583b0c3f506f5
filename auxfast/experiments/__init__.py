"""Experiments, trained method by method and seed by seed, and reports of their runs: the paper's, and one's own."""

from auxfast.experiments.base import Axis, Experiment, Finding, restore, train_run
from auxfast.experiments.comparison import ComparisonResult, compare

__all__ = ["Axis", "ComparisonResult", "Experiment", "Finding", "compare", "restore", "train_run"]
