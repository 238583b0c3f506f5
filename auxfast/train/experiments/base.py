"""What an experiment is, which methods it compares, and how one of its runs is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from auxfast.nn import Combiner, LinearCombiner, NonlinearCombiner
from auxfast.train.config import TrainConfig
from auxfast.train.loop import OuterRecord, Task, train


@dataclass(frozen=True)
class Method:
    """A way to combine the losses.

    `learned` methods update their combiner; the frozen ones are their controls: the same in everything else.
    Both keep the auxiliary set from training. `stl` and `equal` need none, and train on its labels too.
    """

    name: str
    label: str
    combiner: Literal["none", "equal", "linear", "nonlinear"]
    learned: bool = False

    @property
    def holds_out(self) -> bool:
        return self.combiner in ("linear", "nonlinear")


METHODS = (
    Method("stl", "STL (main loss only)", "none"),
    Method("equal", "Equal (one common weight)", "equal"),
    Method("linear-frozen", "Linear, frozen", "linear"),
    Method("linear", "Linear, learned", "linear", learned=True),
    Method("nonlinear-frozen", "Nonlinear, frozen", "nonlinear"),
    Method("nonlinear", "Nonlinear, learned", "nonlinear", learned=True),
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
        hidden: layers of the nonlinear combiner.
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


class Run(NamedTuple):
    """One seed of one method."""

    score: float
    seconds: float
    records: list[OuterRecord]


def run_method(
    experiment: Experiment,
    method: Method,
    seed: int,
    on_outer_step: Callable[[OuterRecord], None] | None = None,
) -> Run:
    """Train and score one method from one seed: the same numbers each time, whatever ran before."""
    start = time.perf_counter()
    task = experiment.make_task(seed, hold_out=method.holds_out)
    combine = make_combiner(experiment, method, seed)
    records = train(
        task,
        main_loss if combine is None else combine,
        experiment.config,
        torch.Generator().manual_seed(seed),
        outer=experiment.config.outer_optimizer(combine) if combine is not None and method.learned else None,
        on_outer_step=on_outer_step,
    )
    return Run(task.score(), time.perf_counter() - start, records)


@torch.no_grad()
def make_combiner(experiment: Experiment, method: Method, seed: int) -> Combiner | None:
    """The method's combiner at its initial values; None if it needs none.

    All start as the main loss + a network of all losses (paper, section 3.2). The linear one gives every auxiliary
    `initial_weight`, the nonlinear one has that for their mean weight at losses of 1.
    """
    num_losses = len(experiment.loss_names)
    if method.combiner == "none":
        return None
    if method.combiner == "nonlinear":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nonlinear = NonlinearCombiner(num_losses, experiment.hidden, main=0)
        weights = nonlinear.loss_weights(torch.ones(1, num_losses))
        nonlinear.layers()["out.weight"].mul_(experiment.initial_weight / weights[:, 1:].mean())
        return nonlinear
    weight = experiment.equal_weight if method.combiner == "equal" else experiment.initial_weight
    linear = LinearCombiner(num_losses, main=0, init_value=weight)
    linear.phi[0] = 0  # on top of the main loss itself
    return linear


def main_loss(losses: Tensor, mask: Tensor | None) -> Tensor:
    """Single-task learning: what every combiner here becomes if it gives all losses the weight 0. A
    scalar."""
    main = losses[:, 0]
    return (main if mask is None else torch.where(mask[:, 0].bool(), main, 0.0)).mean()
