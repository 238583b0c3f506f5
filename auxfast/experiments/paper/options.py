"""What the experiments' settings share: the check of options, and the paper's outer loop as it stands."""

from __future__ import annotations

from functools import partial

from auxfast.train.config import CombinerConfig, TrainConfig

# The paper's Algorithm 1 knows none of the safeguards that are the trainer's defaults.
PaperTraining = partial(TrainConfig, max_weight_change=None, keep_total=False, warmup=0.0, cooldown=0.0)
PaperCombiner = partial(CombinerConfig, skip=True, positive="clip")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Check that an option is from `low` to `high`.

    Raises:
        ValueError: it is not, or not a number; names the option.
    """
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, must be from {low:g} to {high:g}")
