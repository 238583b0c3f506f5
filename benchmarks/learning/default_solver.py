"""What the default solver buys: solvers beside a solve of 300 steps, on the suite's tasks and on a tiny transformer.

    python -m benchmarks.learning.default_solver [NAME ...]

prints, for eight outer steps of each task, the medians of the residual and of the cosine with the hypergradient of 300
steps, and the mean number of products: the table of docs/solvers.md. All solvers see the same systems, each with a
state of its own, and what is learned moves along `Identity`, so that none of them changes what the others see.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import auxfast
from auxfast.solvers import DEFAULT_SOLVER, MINRES, ConjugateGradient, Identity, Solver, SolverState
from auxfast.train import Trainer
from auxfast.train.methods import parse_method
from auxfast.train.training_loss import make_training_loss
from benchmarks.learning.tasks import TASKS

SOLVERS: dict[str, Solver] = {
    "default": DEFAULT_SOLVER,
    "MINRES(10)": MINRES(steps=10),
    "MINRES(20)": MINRES(steps=20),
    "MINRES()": MINRES(),
    "CG(10)": ConjugateGradient(steps=10),
    "Identity()": Identity(),
}
_REFERENCE = MINRES(steps=300, tol=1e-6)
_STEPS = 8  # that are compared
_SKIPPED = 8  # outer steps of the trainer's runs before them, the first after the warm-up


class Row(NamedTuple):
    residual: float
    cosine: float
    products: int


class Comparison:
    """Hypergradients of one problem, step by step."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {name: [] for name in SOLVERS}
        self._states = {name: SolverState() for name in SOLVERS}

    def add(self, outer_loss: Tensor, inner_loss: Tensor, params: Sequence[Tensor], phi: Sequence[Tensor]) -> None:
        def flat_and_stats(solver: Solver, state: SolverState | None = None) -> tuple[Tensor, Any]:
            result = auxfast.hypergradient(
                outer_loss, inner_loss, params, phi, solver=solver, state=state, retain_graph=True, warn=False
            )
            return torch.cat([grad.reshape(-1) for grad in result.grads]), result.stats

        reference, _ = flat_and_stats(_REFERENCE)
        for name, solver in SOLVERS.items():
            grads, stats = flat_and_stats(solver, self._states[name])
            self.rows[name].append(
                Row(stats.residual, float(F.cosine_similarity(grads, reference, dim=0)), stats.matvecs)
            )


def of_task(name: str) -> Comparison:
    """The suite's task, with a linear combiner that the trainer learns by its own defaults."""
    experiment, comparison = TASKS[name], Comparison()
    task = experiment.make_task(1000, experiment.config.task, hold_out=True)
    loss = make_training_loss(parse_method("linear"), experiment.config, task)
    trainer = Trainer(task, loss, experiment.config.train, seed=1000)
    assert trainer.outer is not None
    step, seen = trainer.outer.step, iter(range(_SKIPPED + _STEPS))

    def compared(outer_loss: Tensor, inner_loss: Tensor, params: Sequence[Tensor], **options: Any) -> Any:
        if next(seen, 0) >= _SKIPPED:
            comparison.add(outer_loss, inner_loss, params, trainer.outer_parameters)
        return step(outer_loss, inner_loss, params, **options)

    trainer.outer.step = compared  # type: ignore[method-assign]
    trainer.run()
    return comparison


class _Transformer(nn.Module):
    """Two layers over 16 tokens of a vocabulary of 100: 23,874 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(100, 32), nn.Parameter(0.02 * torch.randn(16, 32))
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "activation": "gelu", "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, **options) for _ in range(2))
        self.classes = nn.Linear(32, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        return self.classes(hidden.mean(dim=1))


def of_transformer(inner_steps: int) -> Comparison:
    """Weights of 256 samples, of which 40% have the wrong label, after each `inner_steps` steps of Adam."""
    torch.manual_seed(0)
    net, comparison = _Transformer(), Comparison()
    tokens, held_out = torch.randint(100, (256, 16)), torch.randint(100, (64, 16))
    labels, held_out_labels = ((each < 20).sum(dim=1) > 3 for each in (tokens, held_out))
    noisy = labels ^ (torch.rand(256) < 0.4)
    phi = torch.zeros(256, requires_grad=True)
    inner, outer = torch.optim.Adam(net.parameters(), lr=1e-3), torch.optim.Adam([phi], lr=0.05)
    optimizer = auxfast.HyperOptimizer(outer, solver=Identity(), warn=False)

    def inner_loss() -> Tensor:
        batch = torch.randint(256, (64,))
        losses = F.cross_entropy(net(tokens[batch]), noisy[batch].long(), reduction="none")
        return 2 * (phi[batch].sigmoid() * losses).mean()

    with sdpa_kernel(SDPBackend.MATH):
        for step in range(2 * _STEPS):
            for _ in range(inner_steps):
                inner.zero_grad()
                inner_loss().backward()
                inner.step()
            losses = F.cross_entropy(net(held_out), held_out_labels.long()), inner_loss()
            if step >= _STEPS:
                comparison.add(*losses, list(net.parameters()), [phi])
            optimizer.step(*losses, net.parameters())
    return comparison


PROBLEMS: dict[str, Callable[[], Comparison]] = {
    **{name: lambda name=name: of_task(name) for name in TASKS},
    "transformer, 2 inner steps": lambda: of_transformer(2),
    "transformer, 20 inner steps": lambda: of_transformer(20),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the default solver buys.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PROBLEMS)}; all, if none is given")
    names = parser.parse_args(arguments).names or [*PROBLEMS]
    if unknown := [name for name in names if name not in PROBLEMS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    torch.set_num_threads(1)
    for name in names:
        print(name)
        for solver, rows in PROBLEMS[name]().rows.items():
            residual, cosine = (median(row[i] for row in rows) for i in (0, 1))
            print(f"  {solver:12} {residual:7.3f} {cosine:6.2f} {fmean(row.products for row in rows):6.1f}", flush=True)


if __name__ == "__main__":
    main()
