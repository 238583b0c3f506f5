"""A reference trainer for Algorithm 1 of the paper: inner steps on a combined loss, outer ones on its weights."""

from auxfast.train.config import CombinerConfig, LabelsConfig, RunConfig, TrainConfig
from auxfast.train.files import RunError
from auxfast.train.methods import Method, parse_method
from auxfast.train.optimizers import Component
from auxfast.train.recording import DivergedError, RunPlan, record_run
from auxfast.train.run import Run, RunResult, find_runs, read_config, read_run
from auxfast.train.serialization import override
from auxfast.train.task import WHOLE, Batch, LabelBatch, Part, Task
from auxfast.train.task_check import check_task
from auxfast.train.trainer import OuterRecord, Trainer
from auxfast.train.training_loss import make_training_loss

__all__ = [
    "WHOLE",
    "Batch",
    "CombinerConfig",
    "Component",
    "DivergedError",
    "LabelBatch",
    "LabelsConfig",
    "Method",
    "OuterRecord",
    "Part",
    "Run",
    "RunConfig",
    "RunError",
    "RunPlan",
    "RunResult",
    "Task",
    "TrainConfig",
    "Trainer",
    "check_task",
    "find_runs",
    "make_training_loss",
    "override",
    "parse_method",
    "read_config",
    "read_run",
    "record_run",
]
