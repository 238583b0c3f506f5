"""Ranks with parts of the data get the hypergradient of all of it, whatever solves the system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_ranks
from solvers.test_every_solver import SOLVERS
from torch import Tensor, nn

import auxfast
from auxfast.solvers import (
    MINRES,
    SAMA,
    BlockDiagonal,
    ConjugateGradient,
    Dense,
    FromOptimizer,
    Neumann,
    OneStep,
    Solver,
    SolverState,
)

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

D = torch.float64
INNER, OUTER = 20, 13  # samples
Part = tuple[int, int]
SPLITS: dict[str, tuple[list[Part], list[Part]]] = {  # of the inner and of the outer data
    "unequal parts": ([(0, 14), (14, 20)], [(0, 4), (4, 13)]),
    "no outer data on one": ([(0, 14), (14, 20)], [(0, 13), (13, 13)]),
    "no inner data on one": ([(0, 0), (0, 20)], [(0, 4), (4, 13)]),
    "no data on one": ([(0, 20), (20, 20)], [(0, 13), (13, 13)]),
    "equal parts": ([(0, 10), (10, 20)], [(0, 6), (6, 12)]),
    "three ranks": ([(0, 11), (11, 11), (11, 20)], [(0, 0), (0, 0), (0, 13)]),
}


class Problem:
    """Logistic regression, convex, for each of some tasks, whose samples have learned weights."""

    def __init__(self, dtypes: Sequence[torch.dtype] = (D, D), tasks: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        random = partial(torch.randn, generator=generator, dtype=D)
        self.weight = nn.Parameter(random(tasks, 3, 5).to(dtypes[0]))
        self.bias = nn.Parameter(random(tasks, 1, 3).to(dtypes[1]))
        self.frozen = nn.Parameter(torch.ones(2, dtype=D), requires_grad=False)
        self.phi, self.unused = random(5).requires_grad_(), torch.ones(2, dtype=D, requires_grad=True)
        self.decay = torch.tensor(-3.0, dtype=D, requires_grad=True)
        self.x, self.y = random(INNER + OUTER, 5), torch.randint(3, (INNER + OUTER,), generator=generator)
        self.inner_params = [self.weight, self.frozen, self.bias]
        self.outer_params = [self.phi, self.unused, self.decay]

    def outputs(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(D).transpose(1, 2) + self.bias.to(D)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.mT, y.expand(len(outputs), -1), reduction="none").sum(0)

    def inner(self, start: int = 0, end: int = INNER, with_outputs: bool = False) -> Any:
        return self.inner_of(slice(start, end), with_outputs)

    def inner_of(self, samples: Any, with_outputs: bool = False) -> Any:
        outputs = self.outputs(self.x[samples])
        loss = (4 * self.losses(outputs, self.y[samples]) * torch.sigmoid(self.x[samples] @ self.phi)).mean()
        loss = loss + self.decay.exp() * sum(w.to(D).square().sum() for w in (self.weight, self.bias))
        return (loss, outputs) if with_outputs else loss

    def outer(self, start: int = 0, end: int = OUTER) -> Tensor:
        x, y = self.x[INNER + start : INNER + end], self.y[INNER + start : INNER + end]
        return self.losses(self.outputs(x), y).mean() + 0.1 * self.decay.square()

    def adam(self) -> torch.optim.Adam:
        """That has trained for some steps, with gradients of all data, as every rank has."""
        optimizer = torch.optim.Adam([self.weight, self.bias], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            self.inner().backward(inputs=[self.weight, self.bias])
            optimizer.step()
        return optimizer


@dataclass(frozen=True)
class Case:
    """What is computed, on all data by one process and on parts of them by ranks.

    Attributes:
        solver: or what makes it of the problem.
        split: a key of SPLITS.
        micro: the most samples of a micro-batch.
        settings: those of `hypergradient`.
        tensors: whether losses are tensors.
        tolerance: relative difference; rounding is amplified where an iteration is unstable, or a difference is taken.
    """

    solver: Solver | Callable[[Problem], Solver]
    split: str = "unequal parts"
    micro: int = 100
    settings: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, torch.dtype] = (D, D)
    tasks: int = 1
    tensors: bool = False
    fresh: bool = False
    state: bool = False
    tolerance: float = 1e-12

    def run(self, inner: Part, outer: Part, micro: int = 100, **settings: Any) -> Any:
        problem = Problem(self.dtypes, self.tasks)
        solver = self.solver if hasattr(self.solver, "solve") else self.solver(problem)
        with_outputs = self.settings.get("curvature") == "gauss-newton"
        inner_loss: Any = self._losses(partial(problem.inner, with_outputs=with_outputs), *inner, micro)
        outer_loss: Any = self._losses(problem.outer, *outer, micro)
        if self.fresh:
            samples = torch.arange(INNER).view(2, 2, 5).transpose(0, 1)  # (batches, ranks, samples of each)
            own = samples if inner == (0, INNER) else samples[:, inner[0] // 10]
            inner_loss = auxfast.FreshBatches(problem.inner_of, list(own.flatten(1)))
        return auxfast.hypergradient(
            outer_loss,
            inner_loss,
            problem.inner_params,
            problem.outer_params,
            warn=False,
            state=SolverState() if self.state else None,
            **{"solver": solver, **self.settings, **settings},
        )

    def _losses(self, loss: Callable[..., Any], start: int, end: int, micro: int) -> Any:
        ends = [(first, min(first + micro, end)) for first in range(start, end, micro)]
        if self.tensors and ends:
            return loss(start, end)
        return [(last - first, partial(loss, first, last)) for first, last in ends]


# Krylov vectors lose their orthogonality step by step, and rounding grows with that, up to what the solver's tol leaves.
_AMPLIFIES = {"ConjugateGradient, Nystrom": 1e-10, "NormalEquations": 1e-8}
HALF = {"free": [torch.arange(15).view(1, 3, 5) % 2 == 0, None, None]}
DTYPES = torch.float32, torch.bfloat16
STEPPERS = {"OneStep": OneStep(0.1), "SAMA": lambda problem: SAMA(problem.adam(), mixed="exact")}
CASES = {
    **{name: Case(solver, tolerance=_AMPLIFIES.get(name, 1e-12)) for name, solver in SOLVERS.items()},
    **{name: Case(SOLVERS["MINRES"], split) for name, split in zip(SPLITS, SPLITS, strict=True)},
    "micro-batches": Case(SOLVERS["MINRES"], micro=3),
    "micro-batches, no data on one": Case(SOLVERS["ConjugateGradient"], "no data on one", micro=6),
    "tensors": Case(SOLVERS["MINRES"], "equal parts", tensors=True),
    "tensors, no data on one": Case(SOLVERS["MINRES"], "no data on one", tensors=True),
    "free": Case(SOLVERS["ConjugateGradient"], settings=HALF),
    "Gauss-Newton": Case(SOLVERS["MINRES"], settings={"curvature": "gauss-newton"}, micro=7),
    "Gauss-Newton, no inner data on one": Case(
        SOLVERS["MINRES"], "no inner data on one", settings={"curvature": "gauss-newton"}
    ),
    "finite differences": Case(SOLVERS["MINRES"], settings={"curvature": "finite-difference"}, tolerance=1e-7, micro=6),
    "finite differences, no data on one": Case(
        SOLVERS["MINRES"], "no data on one", settings={"curvature": "finite-difference"}, tolerance=1e-7
    ),
    "several dtypes": Case(MINRES(tol=1e-3), dtypes=(torch.float32, D), tolerance=1e-5),
    "narrow dtypes": Case(Dense(), dtypes=DTYPES, tolerance=0.02),
    "FromOptimizer": Case(lambda problem: ConjugateGradient(tol=1e-8, preconditioner=FromOptimizer(problem.adam()))),
    "BlockDiagonal": Case(BlockDiagonal(MINRES(tol=1e-12)), tasks=2),
    "fresh batches": Case(Neumann(4, 0.5, certify=False), "equal parts", fresh=True),
    "OneStep, look-ahead": Case(OneStep(0.1, lookahead=True), micro=6),
    "OneStep, look-ahead, no inner data on one": Case(OneStep(0.1, lookahead=True), "no inner data on one"),
    "OneStep, difference": Case(OneStep(0.1, mixed="difference"), micro=6, tolerance=1e-9),
    "SAMA": Case(lambda problem: SAMA(problem.adam(), mixed="exact")),
    "SAMA, difference": Case(lambda problem: SAMA(problem.adam()), tolerance=1e-9),
    "symmetry is checked": Case(SOLVERS["MINRES"], state=True),
}


def of_rank(rank: int, names: Sequence[str]) -> list[Any]:
    results = []
    for case in map(CASES.__getitem__, names):
        inner, outer = SPLITS[case.split]
        result = case.run(inner[rank], outer[rank], case.micro, process_group=distributed.group.WORLD)
        results.append((result.grads, result.stats))
    return results


def check(names: Sequence[str], size: int) -> None:
    wholes = []
    for name in names:
        case = CASES[name]
        ((start, _), *_, (_, end)) = SPLITS[case.split][1]
        wholes.append(case.run((0, INNER), (start, max(end, 12)), case.micro))
    for name, whole, *of_ranks in zip(names, wholes, *on_ranks(of_rank, names, size=size), strict=True):
        (grads, stats), *others = of_ranks
        tolerance = CASES[name].tolerance
        for found, expected in zip(grads, whole.grads, strict=True):
            error = float((found - expected).norm() / max(expected.norm(), 1e-3))
            print(name, error, stats.matvecs, stats.stop_reason)
            assert error <= tolerance, name
        assert (stats.matvecs, stats.stop_reason) == (whole.stats.matvecs, whole.stats.stop_reason), name
        for grads_of_other, stats_of_other in others:
            assert repr(stats_of_other) == repr(stats), name
            assert all(map(torch.equal, grads_of_other, grads)), name


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.split != "three ranks"])
def test_two_ranks_get_the_hypergradient_of_all_data(name):
    check([name], 2)
