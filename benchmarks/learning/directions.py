"""Which hypergradient points where retraining goes: `auxfast.verify_against_retraining` on tasks of the suite.

    python -m benchmarks.learning.directions [NAME ...] [--seeds 8] [--step 0.5] [--outer auxiliary test smoothed]

prints one table for each setting and outer loss, the figures of docs/outer-loop.md. The outer parameters are those of
the recommended combiners in their simplest form: logarithms of the losses' weights, whose sum is kept. A training is
done once, and serves all solvers and outer losses. Seeds are from 1000 on, on which the defaults are chosen.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import auxfast
from auxfast.experiments.paper import fashion_attributes, fashion_selfsupervised
from auxfast.nn import LinearCombiner
from auxfast.solvers import MINRES, GradientFlow, Identity, Neumann, Solver, SolveStats
from auxfast.train import Trainer
from auxfast.train.config import Component
from auxfast.train.training_loss import CombinedLoss, mean_losses
from benchmarks.learning.tasks import TASKS

OUTER_LOSSES = ("auxiliary", "smoothed", "test")
BATCHES = 6  # behind the curvature: one alone is as noisy as it is small
_SMOOTHING = 0.1  # of labels
_DAMPED = MINRES(steps=10, damping=0.1, tol=None)


@dataclass(frozen=True)
class Setting:
    """Inner training whose direction is asked for. What is None is the task's own."""

    task: str
    auxiliary_weight: float  # for a weight of 1 of the main loss
    optimizer: Component | None = None
    outer_steps: int | None = None  # rounds of `inner_steps`


_SGD, _ADAM = Component("SGD", {"lr": 0.05}), Component("Adam", {"lr": 2e-3})
SETTINGS = {
    "cnn, SGD, 0.05": Setting("cnn", 0.05, _SGD),
    "cnn, SGD, 0.3": Setting("cnn", 0.3, _SGD),
    "cnn, Adam, 0.05": Setting("cnn", 0.05, _ADAM),
    "cnn, Adam, 0.3": Setting("cnn", 0.3, _ADAM),
    "cnn, Adam, 1": Setting("cnn", 1.0, _ADAM),
    "cnn, Adam, 1, early": Setting("cnn", 1.0, _ADAM, outer_steps=10),
    "diabetes": Setting("diabetes", 1.0),
    "diabetes, early": Setting("diabetes", 1.0, outer_steps=3),
    "breast-cancer": Setting("breast-cancer", 1.0),
    "digits": Setting("digits", 1.0),
    "wine": Setting("wine", 1.0),
    "fashion-selfsupervised": Setting("fashion-selfsupervised", 0.3),
    "fashion, early": Setting("fashion-attributes", 1.0, outer_steps=25),
    "fashion": Setting("fashion-attributes", 1.0),
}
# Beside the suite's there are two, whose data not everybody has.
_EXPERIMENTS = TASKS | {e.name: e for e in (fashion_attributes.EXPERIMENT, fashion_selfsupervised.EXPERIMENT)}


class End(NamedTuple):
    """Where a training has ended."""

    model: dict[str, Tensor]
    generator: Tensor  # its state: the batches that would come next
    root_of_metric: list[Tensor]  # of Adam; see `InMetric`


@dataclass(frozen=True)
class InMetric:
    """A solver in the metric of the inner Adam, whose step is `P g` for a gradient g: with `P = 1 / (sqrt(v) + eps)`,
    `x = sqrt(P) solve(sqrt(P) H sqrt(P), sqrt(P) b)`."""

    solver: Solver
    root_of_metric: Callable[[], list[Tensor]]

    def solve(
        self, matvec: Any, rhs: Sequence[Tensor], *, batched: bool = False, state: Any = None
    ) -> tuple[list[Tensor], SolveStats]:
        root = self.root_of_metric()

        def scaled(vectors: Sequence[Tensor]) -> list[Tensor]:
            return [p * v for p, v in zip(root, vectors, strict=True)]

        solution, stats = self.solver.solve(lambda v: scaled(matvec(scaled(v))), scaled(rhs))
        return scaled(solution), stats


class Retraining:
    """`train` of `verify_against_retraining` for one setting, and its outer parameter."""

    def __init__(self, name: str) -> None:
        self.setting = SETTINGS[name]
        self.experiment = _EXPERIMENTS[self.setting.task]
        config = self.experiment.config.train
        self.config = replace(
            config,
            inner_optimizer=self.setting.optimizer or config.inner_optimizer,
            outer_steps=self.setting.outer_steps or config.outer_steps,
            cooldown=0.0,  # it would train on the auxiliary set
        )
        self.start = torch.full((len(self.experiment.loss_names),), self.setting.auxiliary_weight)
        self.start[0] = 1.0
        self.logs = self.start.log().requires_grad_()
        self.outer, self.batches, self.with_outputs = "auxiliary", BATCHES, False
        self.draw = cache(self._draw)
        self.end = cache(self._end)
        self.last: End | None = None

    @property
    def time(self) -> float:
        """Learning rate x steps of inner training, of its plain gradient descent."""
        options = self.config.inner_optimizer.options
        steps = self.config.outer_steps * self.config.inner_steps
        return float(options["lr"] / (1 - options.get("momentum", 0)) * steps)

    def stability(self, largest_eigenvalues: Iterable[float]) -> str:
        """The learning rate as a part of the largest stable one, 2 (1 + momentum) / (largest eigenvalue)."""
        options = self.config.inner_optimizer.options
        if self.config.inner_optimizer.name != "SGD":
            return "not known"
        limits = [2 * (1 + options.get("momentum", 0)) / value for value in largest_eigenvalues]
        return f"{fmean(options['lr'] / limit for limit in limits):.2f}"

    def weights(self) -> Tensor:
        """(num_losses,): their sum stays that of the start."""
        return self.logs.softmax(0) * self.start.sum()

    def _draw(self, seed: int) -> Any:
        return self.experiment.make_task(seed, self.experiment.config.task, hold_out=True)

    def _end(self, seed: int, weights: tuple[float, ...]) -> End:
        task, combiner = self._draw(seed), LinearCombiner(len(weights), main=None)
        with torch.no_grad():
            combiner.phi.copy_(torch.tensor(weights))
        trainer = Trainer(task, CombinedLoss(combiner, learned=False), self.config, seed)
        trainer.run()
        return End(task.model.state_dict(), trainer.generator.get_state(), _root_of_metric(trainer.inner))

    def __call__(self, seed: int) -> tuple[Any, Any, list[Tensor]]:
        task = self.draw(seed)
        self.last = end = self.end(seed, tuple(self.weights().tolist()))
        task.model.load_state_dict(end.model)
        parameters, generator = list(task.model.parameters()), torch.Generator()

        def inner_loss() -> Any:
            generator.set_state(end.generator)
            outputs: list[Tensor] = []
            with _recorded(task.model, outputs):
                batches = [task.training_batch(generator) for _ in range(self.batches)]
            means = torch.stack([mean_losses(batch.losses, batch.mask) for batch in batches]).mean(dim=0)
            squares = torch.stack([p.square().sum() for p in parameters]).sum()
            loss = means @ self.weights() + 0.5 * self.config.weight_decay * squares
            return (loss, outputs) if self.with_outputs else loss

        return partial(_outer_loss, task, self.outer), inner_loss, parameters


def _outer_loss(task: Any, kind: str) -> Tensor:
    smoothed = partial(F.cross_entropy, label_smoothing=_SMOOTHING if kind == "smoothed" else 0.0)
    auxiliary = task.auxiliary
    if kind == "test":
        task.auxiliary = torch.cat([task.validation, task.test])
    try:
        with mock.patch.object(F, "cross_entropy", smoothed):
            return task.outer_loss()
    finally:
        task.auxiliary = auxiliary


@contextmanager
def _recorded(model: torch.nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """Adds the model's outputs to the list."""
    hook = model.register_forward_hook(lambda _, __, out: outputs.extend(out if isinstance(out, tuple) else [out]))
    try:
        yield
    finally:
        hook.remove()


def _root_of_metric(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The square root of Adam's metric, see `InMetric`; nothing for other optimizers."""
    if not isinstance(optimizer, torch.optim.Adam):
        return []
    (group,) = optimizer.param_groups
    states = [optimizer.state[parameter] for parameter in group["params"]]
    unbiased = [state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"]) for state in states]
    return [(v.sqrt() + group["eps"]).rsqrt() for v in unbiased]


def solvers(retraining: Retraining) -> dict[str, Solver]:
    """What is compared with the Hessian; `compare` adds Gauss-Newton products and single batches."""

    def root_of_metric() -> list[Tensor]:
        assert retraining.last is not None
        return retraining.last.root_of_metric

    flow = GradientFlow(retraining.time, tol=None)
    chosen: dict[str, Solver] = {
        "identity": Identity(retraining.time),
        "Neumann, 3": Neumann(steps=3, step_size="auto", tol=None),
        "GradientFlow": flow,
        "MINRES, 10, damping 1": MINRES(steps=10, damping=1.0, tol=None),
        "MINRES, 10, damping 0.1": _DAMPED,
        "MINRES, 50": MINRES(steps=50, tol=None),
    }
    if retraining.config.inner_optimizer.name == "Adam":
        chosen["identity, Adam's metric"] = InMetric(Identity(retraining.time), root_of_metric)
        chosen["GradientFlow, Adam's metric"] = InMetric(flow, root_of_metric)
    return chosen


def compare(name: str, seeds: Iterable[int], step: float, outer_losses: Iterable[str]) -> None:
    """Prints a table of solvers for each outer loss."""
    retraining, seeds = Retraining(name), list(seeds)
    verify = partial(auxfast.verify_against_retraining, retraining, [retraining.logs], seeds=seeds, step=step)
    for outer in outer_losses:
        retraining.outer = outer
        report = verify(solver=solvers(retraining))
        predictions = dict(report.predictions)
        retraining.with_outputs = True
        (predictions["Gauss-Newton, 10, damping 0.1"],) = verify(
            solver=_DAMPED, curvature="gauss-newton"
        ).predictions.values()
        retraining.with_outputs, retraining.batches = False, 1
        single = {"identity, one batch": Identity(), "MINRES, 10, damping 0.1, one batch": _DAMPED}
        predictions |= verify(solver=single).predictions
        retraining.batches = BATCHES
        print(f"\n### {name}, outer loss: {outer}\n")
        stability = retraining.stability(stats.largest_eigenvalue for stats in predictions["GradientFlow"].stats)
        print(
            f"{len(seeds)} seeds; outer loss {report.outer_losses.mean():.3g}; inner gradient "
            f"{report.inner_gradient_norms.mean():.2g}; learning rate by the largest stable one {stability}; "
            f"negative curvature for {sum(s.negative_curvature for s in predictions['MINRES, 50'].stats)} of them; "
            f"moves up against moves down: cosine {report.agreement}\n"
        )
        print("| | cosine | of means | signs | size | outcome |\n|---|---|---|---|---|---|")
        for label, prediction in predictions.items():
            print(
                f"| {label} | {prediction.cosine} | {prediction.cosine_of_means:+.2f} | {100 * prediction.signs:.0f}% "
                f"| {prediction.size:.2g} | {prediction.outcome} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(map(repr, SETTINGS))}; default: all")
    parser.add_argument("--seeds", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--step", type=float, default=0.5, help="of the weights' logarithms (default: 0.5)")
    parser.add_argument("--outer", nargs="+", choices=OUTER_LOSSES, default=OUTER_LOSSES, help="outer losses")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # auxiliary sets are large on purpose
    for name in arguments.names or SETTINGS:
        compare(name, range(1000, 1000 + arguments.seeds), arguments.step, arguments.outer)


if __name__ == "__main__":
    main()
