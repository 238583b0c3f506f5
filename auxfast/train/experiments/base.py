"""What an experiment is, which methods it compares, and how one of its runs is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from auxfast.nn import Combiner, ConvCombiner, LinearCombiner, NonlinearCombiner
from auxfast.train.config import TrainConfig
from auxfast.train.loop import Combine, OuterRecord, Task, train


@dataclass(frozen=True)
class Method:
    """A way to combine the losses.

    `learned` methods update their combiner; the frozen ones are their controls: the same in everything else.
    Both keep the auxiliary set from training. `stl` and `equal` need none, and train on its labels too.
    """

    name: str
    label: str
    combiner: Literal["none", "equal", "linear", "nonlinear", "conv"]
    learned: bool = False

    @property
    def holds_out(self) -> bool:
        return self.combiner not in ("none", "equal")


_COMMON = (
    Method("stl", "STL (main loss only)", "none"),
    Method("equal", "Equal (one common weight)", "equal"),
    Method("linear-frozen", "Linear, frozen", "linear"),
    Method("linear", "Linear, learned", "linear", learned=True),
)
METHODS = (
    *_COMMON,
    Method("nonlinear-frozen", "Nonlinear, frozen", "nonlinear"),
    Method("nonlinear", "Nonlinear, learned", "nonlinear", learned=True),
)
IMAGE_METHODS = (
    *_COMMON,
    Method("conv-frozen", "Convolutional, frozen", "conv"),
    Method("conv", "Convolutional, learned", "conv", learned=True),
)


class MakeTask(Protocol):
    """Draws a task; `hold_out`: keep the auxiliary set from training."""

    def __call__(self, seed: int, *, hold_out: bool) -> Task: ...


@dataclass(frozen=True)
class Experiment:
    """A problem, and the settings that were chosen for it.

    Args:
        score_name: what `Task.score` is, with its unit.
        loss_names: as the task's; for the report, the main loss first.
        equal_weight: that of every auxiliary loss under `equal`; the main loss has 1.
        initial_weight: the same, for the linear combiner at its start, and so for its frozen control.
        hidden: layers of the nonlinear combiner, or channels of the convolutional one.
        methods: what is compared; the last one's combiner is the one to time.
        package: what has to be installed for the data: the module, and its name on the package index.
        draw: makes a picture of a run of the last method.
    """

    name: str
    title: str
    score_name: str
    loss_names: tuple[str, ...]
    config: TrainConfig
    equal_weight: float
    initial_weight: float
    hidden: tuple[int, ...]
    make_task: MakeTask
    methods: tuple[Method, ...] = METHODS
    package: tuple[str, str] = ("sklearn", "scikit-learn")
    draw: Callable[[Path, Run], None] | None = None


class Run(NamedTuple):
    """One seed of one method; task and combiner as training left them."""

    score: float
    seconds: float
    records: list[OuterRecord]
    task: Task
    combiner: Combiner | None


def run_method(
    experiment: Experiment,
    method: Method,
    seed: int,
    on_outer_step: Callable[[OuterRecord], None] | None = None,
) -> Run:
    """Train and score one method from one seed: the same numbers each time, whatever ran before."""
    start = time.perf_counter()
    task = experiment.make_task(seed, hold_out=method.holds_out)
    combiner = make_combiner(experiment, method, seed)
    records = train(
        task,
        as_function(combiner),
        experiment.config,
        torch.Generator().manual_seed(seed),
        outer=experiment.config.outer_optimizer(combiner) if combiner is not None and method.learned else None,
        on_outer_step=on_outer_step,
    )
    return Run(task.score(), time.perf_counter() - start, records, task, combiner)


@torch.no_grad()
def make_combiner(experiment: Experiment, method: Method, seed: int) -> Combiner | None:
    """The method's combiner at its initial values; None if it needs none.

    All start as the main loss + a network of all losses (paper, section 3.2). The linear one gives every auxiliary
    `initial_weight`, the others have that for their mean weight at losses of 1 (in an image of 64 x 64 pixels).
    """
    num_losses = len(experiment.loss_names)
    if method.combiner == "none":
        return None
    if method.combiner in ("nonlinear", "conv"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: NonlinearCombiner | ConvCombiner
            if method.combiner == "nonlinear":
                network, ones = NonlinearCombiner(num_losses, experiment.hidden), torch.ones(1, num_losses)
            else:
                network, ones = ConvCombiner(num_losses, experiment.hidden), torch.ones(1, num_losses, 64, 64)
        auxiliaries = network.loss_weights(ones)[0, 1:]
        network.layers()["out.weight"].mul_(experiment.initial_weight * (num_losses - 1) / auxiliaries.sum())
        return network
    weight = experiment.equal_weight if method.combiner == "equal" else experiment.initial_weight
    linear = LinearCombiner(num_losses, main=0, init_value=weight)
    linear.phi[0] = 0  # on top of the main loss itself
    return linear


def as_function(combiner: Combiner | None) -> Combine:
    """(losses, mask) -> training loss. Of images of losses, a combiner of samples sees every pixel as a sample."""
    if combiner is None:
        return main_loss
    if isinstance(combiner, ConvCombiner):
        return combiner
    return lambda losses, mask: combiner(_samples(losses), None if mask is None else _samples(mask))


def _samples(losses: Tensor) -> Tensor:
    """(batch, num_losses, H, W) as (batch * H * W, num_losses); (batch, num_losses) as it is."""
    return losses.movedim(1, -1).flatten(0, -2)


def main_loss(losses: Tensor, mask: Tensor | None) -> Tensor:
    """Single-task learning: what every combiner here becomes if it gives all losses the weight 0. A
    scalar."""
    main = losses[:, 0]
    return (main if mask is None else torch.where(mask[:, 0].bool(), main, 0.0)).mean()
