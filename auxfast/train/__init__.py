"""A small trainer for Algorithm 1 of the paper: inner steps on a combined loss, outer ones on its weights."""

from auxfast.train.config import TrainConfig
from auxfast.train.loop import Batch, OuterRecord, Task, train

__all__ = ["Batch", "OuterRecord", "Task", "TrainConfig", "train"]
