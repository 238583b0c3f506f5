"""Scalars of a run for TensorBoard, if that is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from auxfast.train.trainer import OuterRecord

_NUMBERS = ("training_loss", "outer_loss", "validation_score", "residual", "inner_seconds", "outer_seconds")


@contextmanager
def tensorboard(path: Path, loss_names: Sequence[str], first_step: int) -> Iterator[Callable[[OuterRecord], None]]:
    """A function that writes a record as event files below `path`; it does nothing if TensorBoard is not installed.

    Args:
        first_step: TensorBoard no longer shows what was written from this step on, before the run was interrupted.
    """
    if find_spec("tensorboard") is None:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(path, purge_step=first_step) as writer:

        def write(record: OuterRecord) -> None:
            for name in _NUMBERS:
                value = getattr(record, name)
                if value is not None:
                    writer.add_scalar(name, value, record.step)
            for name, weight in zip(loss_names, record.loss_weights, strict=True):
                writer.add_scalar(f"loss_weights/{name}", weight, record.step)
            writer.flush()

        yield write
