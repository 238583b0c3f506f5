"""A reference trainer for Algorithm 1 of the paper: inner steps on a combined loss, outer ones on its weights."""

from auxfast.train.config import CombinerConfig, RunConfig, TrainConfig
from auxfast.train.files import RunError
from auxfast.train.methods import Method, parse_method
from auxfast.train.optimizers import Component
from auxfast.train.serialization import override
from auxfast.train.task import Batch, Task
from auxfast.train.trainer import OuterRecord, Trainer
from auxfast.train.training_loss import make_training_loss

__all__ = [
    "Batch",
    "CombinerConfig",
    "Component",
    "Method",
    "OuterRecord",
    "RunConfig",
    "RunError",
    "Task",
    "TrainConfig",
    "Trainer",
    "make_training_loss",
    "override",
    "parse_method",
]
