"""The settings that the inner optimizer has for each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def groups_of(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The parameter group of each of `params`, the inner parameters of a system.

    Raises:
        ValueError: the optimizer does not hold one.
    """
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    for i, param in enumerate(params):
        if id(param) not in groups:
            raise ValueError(
                f"optimizer, the {type(optimizer).__name__}, does not hold inner parameter {i} of the system, of shape "
                f"{tuple(param.shape)}: pass the one that trains the inner parameters"
            )
    return [groups[id(param)] for param in params]
