"""Parts that the experiments' settings share: the check of options, methods, and the paper's outer loop."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from auxfast.train.config import CombinerConfig, TrainConfig

COMBINERS = ("linear", "deep-linear", "nonlinear")
# The methods are those of the paper's Table 1, and each combiner's control.
TABLE_1_METHODS = (
    *("stl", "equal", "uncertainty", "dwa", "gradnorm", "gcs"),
    *(f"{name}{ending}" for name in COMBINERS for ending in ("-frozen", "")),
)

# The paper's Algorithm 1 knows none of the safeguards that are the trainer's defaults.
PaperTraining = partial(TrainConfig, max_weight_change=None, keep_total=False, warmup=0.0, cooldown=0.0)
PaperCombiner = partial(CombinerConfig, skip=True, positive="clip")


def training_length(epochs: int, samples: int, batch_size: int, inner_steps: int) -> dict[str, Any]:
    """Entries of `TrainConfig` by which a run passes `epochs` times over so many samples: the paper counts epochs, and
    the trainer steps. All of them are trained, and in the end the model is the one of the best validation score: the
    patience is that of the whole run."""
    outer_steps = math.ceil(epochs * math.ceil(samples / batch_size) / inner_steps)
    return {"inner_steps": inner_steps, "outer_steps": outer_steps, "patience": outer_steps}


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Check that an option is from `low` to `high`.

    Raises:
        ValueError: it is not, or not a number; names the option.
    """
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, must be from {low:g} to {high:g}")
