"""The paper's experiments, trained method by method and seed by seed, and reports of their runs."""

from auxfast.experiments.base import Experiment, Finding, restore, train_run

__all__ = ["Experiment", "Finding", "restore", "train_run"]
