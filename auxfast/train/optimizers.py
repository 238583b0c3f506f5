"""Optimizers and schedulers of torch by their names, checked before a run starts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from auxfast.train.files import one_line

_MOST_REHEARSED = 1000  # steps of a scheduler, some 5 ms: divisions by zero come at the end of a warm-up or a cycle
_UNSUPPORTED = {
    "LBFGS": "needs a closure",
    "SparseAdam": "is for sparse gradients",
    "LambdaLR": "needs a function",
    "MultiplicativeLR": "needs a function",
    "ReduceLROnPlateau": "needs a metric at each step",
    "SequentialLR": "needs other schedulers",
    "ChainedScheduler": "needs other schedulers",
}


def _subclasses(module: Any, base: type) -> dict[str, type]:
    named = {name: getattr(module, name) for name in sorted(dir(module)) if not name.startswith("_")}
    kinds = {name: kind for name, kind in named.items() if isinstance(kind, type) and issubclass(kind, base)}
    return {name: kind for name, kind in kinds.items() if kind is not base and name not in _UNSUPPORTED}


OPTIMIZERS = _subclasses(torch.optim, torch.optim.Optimizer)
SCHEDULERS = _subclasses(lr_scheduler, lr_scheduler.LRScheduler)


@dataclass(frozen=True)
class Component:
    """A class of torch by its name, and its keyword arguments; as a table: {name = "SGD", lr = 0.1, momentum = 0.9}."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def make_optimizer(
    component: Component, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer, without any weight decay of its own (AdamW has one by default)."""
    kind = OPTIMIZERS[component.name]
    decay = {"weight_decay": 0.0} if has_weight_decay(component) else {}
    optimizer: torch.optim.Optimizer = kind(parameters, **component.options, **decay)
    return optimizer


def has_weight_decay(component: Component) -> bool:
    """Whether the optimizer reads the entry `weight_decay` of its groups; torch says nothing where it does not."""
    return "weight_decay" in inspect.signature(OPTIMIZERS[component.name]).parameters


def make_scheduler(component: Component, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """The scheduler of an optimizer's learning rate."""
    scheduler: lr_scheduler.LRScheduler = SCHEDULERS[component.name](optimizer, **component.options)
    return scheduler


def check_optimizer(key: str, component: Component) -> None:
    """Raises ValueError, which says what is allowed, unless the optimizer can be made, and step."""
    _check_names(key, component, OPTIMIZERS, {"params", "weight_decay"})
    parameter = nn.Parameter(torch.zeros(1, 1))

    def rehearse() -> None:
        optimizer = make_optimizer(component, [parameter])
        if not component.options.get("capturable"):  # that needs a GPU
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()

    _try(key, component, rehearse)


def check_scheduler(
    key: str, component: Component, optimizer: Component, steps: int, may_stop_early: bool = False
) -> None:
    """Raises ValueError, which says what is allowed, unless the scheduler of a checked optimizer can be made and step.

    Args:
        steps: number of its steps in the run. The first of them are rehearsed.
        may_stop_early: whether the run may end before.
    """
    _check_names(key, component, SCHEDULERS, {"optimizer", "last_epoch"})
    made = make_optimizer(optimizer, [nn.Parameter(torch.zeros(1, 1))])

    def rehearse() -> None:
        scheduler = make_scheduler(component, made)
        made.step()  # torch warns of schedulers that step first
        possible = scheduler.total_steps if isinstance(scheduler, lr_scheduler.OneCycleLR) else steps
        if possible < steps and not may_stop_early:
            raise ValueError(f"its total_steps are {possible}, and the run takes {steps} inner steps")
        for step in range(min(steps, possible, _MOST_REHEARSED)):
            scheduler.step()
            if not all(math.isfinite(group["lr"]) for group in made.param_groups):
                raise ValueError(f"the learning rate is not finite after step {step + 1}")

    _try(key, component, rehearse)


def _check_names(key: str, component: Component, kinds: Mapping[str, type], reserved: set[str]) -> None:
    """Raises ValueError unless `kinds` have the component's name, and that class its options; `reserved` are the
    parameters of the class that the trainer gives."""
    if component.name not in kinds:
        why = f", which {_UNSUPPORTED[component.name]}" if component.name in _UNSUPPORTED else ""
        near = get_close_matches(component.name, kinds)
        guess = f" (did you mean {' or '.join(near)}?)" if near and not why else ""
        raise ValueError(f"{key}.name: got {component.name!r}{why}{guess}; must be one of {', '.join(kinds)}")
    parameters = inspect.signature(kinds[component.name]).parameters
    allowed = [name for name in parameters if name not in reserved]
    for name, value in component.options.items():
        if name == "weight_decay":
            remedy = "combiner.weight_decay or labels.weight_decay"
            if "inner" in key:
                remedy = "train.weight_decay, a part of the inner loss, which the hypergradient knows"
            raise ValueError(f"{key}.weight_decay: the trainer sets it to 0; set {remedy}")
        if name not in allowed:
            raise ValueError(f"{key}.{name}: not an option of {component.name}, which has {', '.join(allowed)}")
        _check_value(f"{key}.{name}", value, parameters[name].default)


def _check_value(key: str, value: Any, default: Any) -> None:
    """Raises ValueError where an option is not finite, or of another kind than its default. Torch checks it seldom."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise ValueError(f"{key}: got {value!r}, must be finite")
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"{key}: got {value!r}, must be true or false")
    is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
    if is_number and (isinstance(value, (bool, str)) or value is None):
        raise ValueError(f"{key}: got {value!r}, must be a number")


def _try(key: str, component: Component, make: Callable[[], object]) -> None:
    try:
        make()
    except Exception as error:  # torch checks few of the options, and the others raise whatever comes of them
        reason = f"{type(error).__name__}: " * (not isinstance(error, ValueError)) + one_line(error)
        raise ValueError(f"{key}: {component.name} cannot be made with {dict(component.options)}: {reason}") from error
