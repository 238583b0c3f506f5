"""Ranks with parts of the data get the hypergradient of all of it, whatever solves the system."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from ranks import error_of, on_ranks
from solvers.test_every_solver import SOLVERS
from torch import Tensor, nn

import auxfast
from auxfast.ops.krylov import NUMBERS
from auxfast.solvers import (
    MINRES,
    SAMA,
    BlockDiagonal,
    ConjugateGradient,
    Dense,
    FromOptimizer,
    Identity,
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
    """Logistic regression, convex, for each of some tasks, whose samples have learned weights. `branch` is used by some
    samples alone."""

    def __init__(self, dtypes: Sequence[torch.dtype] = (D, D), tasks: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        random = partial(torch.randn, generator=generator, dtype=D)
        self.weight = nn.Parameter(random(tasks, 3, 5).to(dtypes[0]))
        self.bias = nn.Parameter(random(tasks, 1, 3).to(dtypes[1]))
        self.branch = nn.Parameter(random(tasks))
        self.frozen = nn.Parameter(torch.ones(2, dtype=D), requires_grad=False)
        self.phi, self.unused = random(5).requires_grad_(), torch.ones(2, dtype=D, requires_grad=True)
        self.decay = torch.tensor(-3.0, dtype=D, requires_grad=True)
        self.x, self.y = random(INNER + OUTER, 5), torch.randint(3, (INNER + OUTER,), generator=generator)
        self.inner_params = [self.weight, self.frozen, self.bias, self.branch]
        self.outer_params = [self.phi, self.unused, self.decay]

    def outputs(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(D).transpose(1, 2) + self.bias.to(D)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.mT, y.expand(len(outputs), -1), reduction="none").sum(0)

    def inner(self, start: int = 0, end: int = INNER, with_outputs: bool = False) -> Any:
        return self.inner_of(torch.arange(start, end), with_outputs)

    def inner_of(self, samples: Tensor, with_outputs: bool = False) -> Any:
        outputs = self.outputs(self.x[samples])
        loss = (4 * self.losses(outputs, self.y[samples]) * torch.sigmoid(self.x[samples] @ self.phi)).mean()
        loss = loss + self.decay.exp() * sum(w.to(D).square().sum() for w in (self.weight, self.bias))
        share = (samples < 10).double().mean()
        if share:  # a rank may have no such sample, and one may have no others
            loss = loss + share * (self.branch - self.phi[0]).square().sum() / 2
        return (loss, outputs) if with_outputs else loss

    def outer(self, start: int = 0, end: int = OUTER) -> Tensor:
        x, y = self.x[INNER + start : INNER + end], self.y[INNER + start : INNER + end]
        share = max(0, end - max(start, 8)) / (end - start)
        rest = share * self.branch.square().sum() if share else 0.0
        return self.losses(self.outputs(x), y).mean() + 0.1 * self.decay.square() + rest

    def adam(self) -> torch.optim.Adam:
        """That has trained for some steps, with gradients of all data, as every rank has."""
        optimizer = torch.optim.Adam([self.weight, self.bias, self.branch], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            self.inner().backward(inputs=[self.weight, self.bias, self.branch])
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


# The vectors of Krylov methods lose their orthogonality, and rounding grows with every step, up to what tol leaves.
_AMPLIFIES = "MINRES, Jacobi", "ConjugateGradient, Nystrom", "NormalEquations"
_SETTINGS = {"Neumann": {"steps": 50}, **{name: {"tol": 1e-12} for name in _AMPLIFIES}}
HALF = {"free": [torch.arange(15).view(1, 3, 5) % 2 == 0, None, None, None]}
DTYPES = torch.float32, torch.bfloat16
STEPPERS = {"OneStep": OneStep(0.1), "SAMA": lambda problem: SAMA(problem.adam(), mixed="exact")}
CASES = {
    **{name: Case(replace(solver, **_SETTINGS.get(name, {}))) for name, solver in SOLVERS.items()},
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
    "narrow dtypes": Case(Dense(tol=0.1), dtypes=DTYPES, tolerance=0.02),
    "FromOptimizer": Case(lambda problem: ConjugateGradient(tol=1e-12, preconditioner=FromOptimizer(problem.adam()))),
    "BlockDiagonal": Case(BlockDiagonal(MINRES(tol=1e-12)), tasks=2),
    "fresh batches": Case(Neumann(4, 0.5, certify=False), "equal parts", fresh=True),
    "OneStep, look-ahead": Case(OneStep(0.1, lookahead=True), micro=6),
    "OneStep, look-ahead, no inner data on one": Case(OneStep(0.1, lookahead=True), "no inner data on one"),
    "OneStep, difference": Case(OneStep(0.1, mixed="difference"), micro=6, tolerance=1e-9),
    "SAMA": Case(lambda problem: SAMA(problem.adam(), mixed="exact")),
    "SAMA, difference": Case(lambda problem: SAMA(problem.adam()), tolerance=1e-9),
    "three ranks, Neumann": Case(SOLVERS["Neumann"], "three ranks"),
    "three ranks, Nystrom": Case(SOLVERS["ConjugateGradient, Nystrom"], "three ranks", tolerance=1e-9),
    "three ranks, finite differences": Case(
        SOLVERS["MINRES"], "three ranks", settings={"curvature": "finite-difference"}, tolerance=1e-7
    ),
    "three ranks, look-ahead": Case(OneStep(0.1, lookahead=True), "three ranks"),
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
            assert error <= tolerance, name
        assert stats.stop_reason == whole.stats.stop_reason, name
        assert abs(stats.matvecs - whole.stats.matvecs) <= 1, name  # rounding may decide on a step
        for grads_of_other, stats_of_other in others:
            assert repr(stats_of_other) == repr(stats), name
            assert all(map(torch.equal, grads_of_other, grads)), name


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.split != "three ranks"])
def test_two_ranks_get_the_hypergradient_of_all_data(name):
    check([name], 2)


@pytest.mark.slow
def test_three_ranks_get_the_hypergradient_of_all_data():
    """One of them has no data."""
    check([name for name, case in CASES.items() if case.split == "three ranks"], 3)


# ------------------------------------------------------------------------------------------------------------- failures


class Failing:
    """A loss that raises on rank 1, at one of its calls."""

    def __init__(self, loss: Callable[[], Any], at: int, rank: int) -> None:
        self._loss, self._left = loss, at if rank == 1 else 0

    def __call__(self) -> Any:
        self._left -= 1
        if self._left == 0:
            raise KeyError("no such sample")
        return self._loss()


def hypergradient(problem: Problem, outer: Any, inner: Any, **settings: Any) -> Any:
    settings = {"solver": MINRES(), "process_group": distributed.group.WORLD, "warn": False, **settings}
    return auxfast.hypergradient(outer, inner, problem.inner_params, problem.outer_params, **settings)


def minimum(problem: Problem, inner: Any, **settings: Any) -> Any:
    settings = {"process_group": distributed.group.WORLD, "warn": False, **settings}
    return auxfast.implicit_minimum(inner, problem.inner_params, problem.outer_params, **settings)


FAILURES: dict[str, Callable[[Problem, int], Any]] = {
    "outer_loss": lambda p, rank: hypergradient(p, Failing(p.outer, 1, rank), p.inner),
    "inner_loss": lambda p, rank: hypergradient(p, p.outer, Failing(p.inner, 1, rank)),
    "a product": lambda p, rank: hypergradient(p, p.outer, [p.inner, Failing(p.inner, 4, rank)]),
    "a difference": lambda p, rank: hypergradient(p, p.outer, Failing(p.inner, 9, rank), curvature="finite-difference"),
    "the look-ahead": lambda p, rank: hypergradient(
        p, p.outer, Failing(p.inner, 2, rank), solver=OneStep(0.1, lookahead=True, mixed="difference")
    ),
    "implicit_minimum": lambda p, rank: minimum(p, Failing(p.inner, 1, rank)),
    "its backward pass": lambda p, rank: minimum(p, [p.inner, Failing(p.inner, 5, rank)])[0].square().sum().backward(),
    "on_solve": lambda p, rank: (
        minimum(p, p.inner, on_solve=lambda stats: Failing(p.inner, 1, rank)())[0].square().sum().backward()
    ),
}
WRONG: dict[str, tuple[str, Callable[[Problem, int], Any]]] = {
    "weights of inner_loss must be finite": (
        "ValueError",
        lambda p, rank: hypergradient(p, p.outer, [(1.0 - 2 * rank, p.inner)]),
    ),
    "inner_loss must be a tensor, a function": (
        "TypeError",
        lambda p, rank: hypergradient(p, p.outer, [p.inner, rank][rank]),
    ),
    "outer_loss must be a scalar": (
        "ValueError",
        lambda p, rank: auxfast.HyperOptimizer(
            torch.optim.SGD([p.phi], lr=0.1), process_group=distributed.group.WORLD, warn=False
        ).step([p.outer(), p.weight][rank], p.inner(), p.inner_params),
    ),
    "outer_loss has no graph": (
        "ValueError",
        lambda p, rank: hypergradient(p, [p.outer(), p.phi.detach().sum()][rank], p.inner()),
    ),
    "does not depend on any of inner_params": (
        "ValueError",
        lambda p, rank: hypergradient(p, p.outer, [p.inner, lambda: p.phi.sum()][rank]),
    ),
    "inner_loss must be a function for curvature='finite-difference'": (
        "TypeError",
        lambda p, rank: hypergradient(p, p.outer, [[], p.inner()][rank], curvature="finite-difference"),
    ),
}


def fail(rank: int) -> list[dict[str, str]]:
    """What each failure raises, and whether the group is of use after it."""
    found: list[dict[str, str]] = [{}, {}]
    for errors, table in zip(found, (FAILURES, {name: compute for name, (_, compute) in WRONG.items()}), strict=True):
        for name, compute in table.items():
            problem = Problem()
            errors[name] = error_of(partial(compute, problem, rank))
            assert hypergradient(problem, problem.outer, problem.inner).grads[0].isfinite().all()
    return found


def test_what_one_rank_raises_ends_the_call_on_all():
    (others, wrong_others), (own, wrong_own) = on_ranks(fail)
    for name in FAILURES:
        assert own[name] == "KeyError: 'no such sample'", name
        assert others[name].startswith("RuntimeError: Rank 1 of process_group has raised, and this"), name
        assert others[name].endswith("KeyError: 'no such sample'"), name
    for text, (kind, _) in WRONG.items():
        assert wrong_own[text].startswith(f"{kind}: "), wrong_own[text]
        assert text in wrong_own[text]
        assert f"Rank 1 of process_group has raised, and this one stops with it: {kind}: " in wrong_others[text]


class Activations:
    """What a graph holds."""


def freed_after_failure(rank: int) -> bool:
    held: list[weakref.ref[Activations]] = []
    problem = Problem()

    def failing() -> Tensor:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise KeyError("no such sample")

    gc.disable()
    try:
        assert error_of(partial(hypergradient, problem, problem.outer, failing)).startswith("KeyError")
        return held[0]() is None
    finally:
        gc.enable()


def test_what_a_failed_loss_held_goes_with_its_error():
    """It does not wait for the garbage collector."""
    assert on_ranks(freed_after_failure) == [True, True]


def not_finite(rank: int) -> list[str]:
    problem = Problem()
    group = distributed.group.WORLD
    optimizer = auxfast.HyperOptimizer(torch.optim.SGD(problem.outer_params, lr=1.0), process_group=group, warn=False)
    nan = 1.0 if rank else torch.nan
    errors = [
        error_of(lambda: hypergradient(problem, lambda: nan * problem.outer(), problem.inner)),
        error_of(lambda: hypergradient(problem, problem.outer, lambda: nan * problem.inner())),
    ]
    before = [phi.clone() for phi in problem.outer_params]
    optimizer.step(lambda: nan * problem.outer(), problem.inner, problem.inner_params)
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, before, problem.outer_params))
    return errors


def test_nan_on_one_rank_is_not_finite_on_all():
    for errors in on_ranks(not_finite):
        assert errors[0].startswith("NotFiniteError: The gradients of outer_loss in inner_params hold NaN")
        assert errors[1].startswith("NotFiniteError: The second derivatives of inner_loss in inner_params hold NaN")


# ------------------------------------------------------------------------------------------------------------ agreement


def with_params(change: Callable[[Problem], Any], rank: int) -> Problem:
    problem = Problem()
    if rank == 1:
        change(problem)
    return problem


def move(problem: Problem) -> None:
    problem.weight.data += 0.1


def freeze(problem: Problem) -> None:
    problem.bias.requires_grad_(False)


def widen(problem: Problem) -> None:
    problem.phi = torch.ones(5, requires_grad=True)
    problem.outer_params[0] = problem.phi


def state_with_eigenvalues(rank: int) -> SolverState:
    return SolverState(largest_eigenvalue=1.0 + rank)


DIFFERENT: dict[str, Callable[[Problem, int], Any]] = {
    "solver must be the same": lambda p, rank: hypergradient(p, p.outer, p.inner, solver=MINRES(20 + rank)),
    "curvature must be the same": lambda p, rank: hypergradient(
        p, p.outer, p.inner, curvature=("hessian", "finite-difference")[rank]
    ),
    "state must be the same": lambda p, rank: hypergradient(p, p.outer, p.inner, state=state_with_eigenvalues(rank)),
    "free must be the same": lambda p, rank: hypergradient(
        p, p.outer, p.inner, free=[torch.arange(15).view(1, 3, 5) > rank, None, None, None]
    ),
    "inner_loss must be of one kind": lambda p, rank: hypergradient(p, p.outer, [p.inner, p.inner()][rank]),
    "outer_loss must be of one kind": lambda p, rank: hypergradient(p, [p.outer(), p.outer][rank], p.inner),
    "inner_loss must be of one kind on all ranks, not functions without weights (each counts 1) and pairs": (
        lambda p, rank: hypergradient(p, p.outer, [p.inner, [(10, p.inner)]][rank])
    ),
    "inner_params must have the same values": lambda p, rank: hypergradient(
        p := with_params(move, rank), p.outer, p.inner
    ),
    "inner_params must be the same": lambda p, rank: hypergradient(p := with_params(freeze, rank), p.outer, p.inner),
    "outer_params must be the same": lambda p, rank: hypergradient(p := with_params(widen, rank), p.outer, p.inner),
}


def differ(rank: int) -> list[str]:
    return [error_of(partial(compute, Problem(), rank)) for compute in DIFFERENT.values()]


@dataclass(frozen=True)
class Scaled:
    """A solver of one's own with a function, whose text has an address."""

    factor: Callable[[], float]

    def solve(self, matvec: Any, rhs: Sequence[Tensor], **settings: Any) -> Any:
        return [self.factor() * b for b in rhs], Identity().solve(matvec, rhs)[1]


def scaled(rank: int) -> Tensor:
    problem, functions = Problem(), [lambda: 0.5 for _ in range(1 + rank)]  # of other addresses on other ranks
    gradient: Tensor = hypergradient(problem, problem.outer, problem.inner, solver=Scaled(functions[-1])).grads[0]
    return gradient


def test_solvers_may_hold_functions():
    problem = Problem()
    whole = hypergradient(problem, problem.outer, problem.inner, solver=Identity(0.5), process_group=None).grads[0]
    for gradient in on_ranks(scaled):
        torch.testing.assert_close(gradient, whole, rtol=1e-12, atol=1e-14)


def test_ranks_that_differ_are_told_so():
    for errors in on_ranks(differ):
        for text, error in zip(DIFFERENT, errors, strict=True):
            assert error.startswith(f"ValueError: {text}")
            assert "all ranks" in error


def sama_of_own_gradients(rank: int) -> str:
    problem = Problem()
    optimizer = problem.adam()
    optimizer.zero_grad()
    problem.inner(10 * rank, 10 * rank + 10).backward()
    return error_of(partial(hypergradient, problem, problem.outer, problem.inner, solver=SAMA(optimizer)))


def test_optimizers_that_differ_are_found_in_the_solution():
    """`SAMA` reads `.grad`, which is the rank's own unless DistributedDataParallel has joined it."""
    for error in on_ranks(sama_of_own_gradients):
        assert error.startswith("RuntimeError: The solutions of rank 0 and rank 1 of process_group differ. Does the")


# ---------------------------------------------------------------------------------------------------------- collectives


def counted(rank: int, name: str) -> tuple[list[int], list[int]]:
    """Elements of each all-reduce, and of each other collective, in a hypergradient."""
    sums: list[int] = []
    others: list[int] = []
    wrapped = {name: getattr(distributed, name) for name in ("all_reduce", "all_gather", "broadcast")}
    refused = ("reduce", "all_gather_object", "gather", "scatter", "reduce_scatter", "all_to_all", "barrier")

    def counting(name: str, tensor_of: Callable[..., Tensor]) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            (sums if name == "all_reduce" else others).append(tensor_of(*args).numel())
            return wrapped[name](*args, **settings)

        return call

    def none(*args: Any, **settings: Any) -> None:
        raise AssertionError("another collective")

    with pytest.MonkeyPatch.context() as patch:
        for each in wrapped:
            patch.setattr(
                distributed, each, counting(each, (lambda rows, own: own) if "gather" in each else lambda t: t)
            )
        for each in refused:
            patch.setattr(distributed, each, none)
        of_rank(rank, [name])
    return sums, others


@pytest.mark.parametrize("name", ["Neumann", "MINRES", "micro-batches", "OneStep, look-ahead"])
def test_what_ranks_exchange(name):
    """|W| for a product, and for the outer gradient; |phi| once; and numbers."""
    (grads, stats), *_ = on_ranks(of_rank, [name])[0]
    inner, outer = 15 + 3 + 1, sum(grad.numel() for grad in grads)
    lookahead = name.startswith("OneStep")
    for sums, others in on_ranks(counted, name):
        flags = 3  # `None` on all ranks, for each parameter
        gradients = [inner + flags] * (2 if lookahead else 1)
        assert sums == [*gradients, *[inner] * stats.matvecs, outer], sums
        assert max(others) <= NUMBERS  # what a Krylov solver knows of its system
        assert len(others) <= 12 + 2 * stats.matvecs


# --------------------------------------------------------------------------------------------------------------- others


class Combined:
    """A combiner of two losses of a small network, whose weights depend on the samples."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.combiner = auxfast.nn.NonlinearCombiner(2, hidden=(3,), main=0).double()
        self.x = torch.randn(INNER + OUTER, 4, dtype=D)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def inner(self, start: int = 0, end: int = INNER) -> Tensor:
        mask = torch.ones(end - start, 2, dtype=torch.bool)
        mask[:, 1] = self.x[start:end, 3] > 0
        combined: Tensor = self.combiner((self.net(self.x[start:end]) - self.x[start:end, :2]).square(), mask)
        return combined

    def outer(self, start: int = 0, end: int = OUTER) -> Tensor:
        x = self.x[INNER + start : INNER + end]
        return (self.net(x) - x[:, :2])[:, 0].square().mean()

    def steps(self, inner: Part, outer: Part, count: int, group: Any = None) -> dict[str, Any]:
        """The state after some steps, which a second optimizer has finished from the first one's state_dict."""
        saved: dict[str, Any] = {}
        for _ in range(2):
            hyper = auxfast.HyperOptimizer(
                torch.optim.Adam(self.combiner.parameters(), lr=0.3),
                solver=Neumann(4, 0.1),
                max_grad_norm=1.0,
                keep_total=True,
                project=[self.combiner],
                process_group=group,
                warn=False,
            )
            if saved:
                hyper.load_state_dict(saved)
            for _ in range(count):
                for task in range(2):
                    parts = [
                        (end - start, partial(loss, start, end)) if end > start else None
                        for loss, (start, end) in ((self.outer, outer), (self.inner, inner))
                    ]
                    hyper.accumulate(
                        *[[part] if part else [] for part in parts], self.net.parameters(), weight=0.5 + task
                    )
                hyper.step()
            saved = hyper.state_dict()
        return {"phi": self.combiner.phi.detach(), "totals": saved["totals"], "watch": saved["watch"]}


def steps_of_rank(rank: int, split: str) -> dict[str, Any]:
    inner, outer = SPLITS[split]
    return Combined().steps(inner[rank], outer[rank], 2, distributed.group.WORLD)


@pytest.mark.parametrize("split", ["unequal parts", "no inner data on one"])
def test_outer_steps_are_those_of_one_process(split):
    """What limits a step are the combiner's weights on the batches of all ranks."""
    whole = Combined().steps((0, INNER), (0, OUTER), 2)
    first, second = on_ranks(steps_of_rank, split)
    assert torch.equal(first["phi"], second["phi"])
    assert (first["totals"], first["watch"]) == (second["totals"], second["watch"])
    torch.testing.assert_close(first["phi"], whole["phi"], rtol=1e-9, atol=1e-12)
    assert first["totals"] == pytest.approx(whole["totals"])
    assert first["watch"]["first_total"] == pytest.approx(whole["watch"]["first_total"])


def far_from_the_minimum() -> Problem:
    problem = Problem()
    problem.weight.data *= 4
    return problem


def rows_of(solved: Sequence[Tensor], phi: Tensor) -> Tensor:
    """The derivative of the solved bias in phi, by one batched backward pass."""
    (rows,) = torch.autograd.grad(
        solved[2], [phi], torch.eye(3, dtype=D).view(3, 1, 1, 3), is_grads_batched=True, retain_graph=True
    )
    return rows


def outer_of(problem: Problem, solved: Sequence[Tensor], start: int, end: int) -> Tensor:
    weight, _, bias, branch = solved
    x, y = problem.x[INNER + start : INNER + end], problem.y[INNER + start : INNER + end]
    return problem.losses(x @ weight.mT + bias, y).mean() + branch.square().sum()


def solved_minimum(rank: int) -> list[Any]:
    """Gradients through `implicit_minimum`, and what is said of them."""
    problem, stats, found = far_from_the_minimum(), [], []
    (start, end), (first, last) = (parts[rank] for parts in SPLITS["equal parts"])
    inner = [partial(problem.inner, start, end)]
    on_solve = stats.append if rank == 0 else None
    solved = minimum(problem, inner, solver=SOLVERS["MINRES"], on_solve=on_solve)
    loss = outer_of(problem, solved, first, last)
    for _ in range(2):
        found.append(torch.autograd.grad(loss, [problem.phi, problem.decay], retain_graph=True))
    found.append(rows_of(solved, problem.phi))
    assert len(stats) == (3 if rank == 0 else 0)
    (gradient,) = torch.autograd.grad(loss, [problem.phi], create_graph=True)
    torch.testing.assert_close(gradient.detach(), found[0][0])
    found.append(error_of(lambda: gradient.sum().backward()))
    for losses in (inner, 2 * inner):  # of micro-batches no gradient is recorded
        solved = minimum(problem, losses, solver=SOLVERS["MINRES"], warn=rank == 0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outer_of(problem, solved, first, last).backward()
        found.append([str(warning.message) for warning in caught])
    return found


def minimum_of_scalar(rank: int) -> list[Tensor]:
    """Of data 1 and 3 of the ranks; the other scalar plays no part on rank 1, and one on none."""
    w, phi, some, none = (torch.tensor(2.0, dtype=D, requires_grad=True) for _ in range(4))

    def inner() -> Tensor:
        return 0.5 * (w - phi * (1 + 2 * rank)).square() + (0 if rank else some * w)

    solved = auxfast.implicit_minimum(
        inner, [w], [phi, some, none], process_group=distributed.group.WORLD, solver=MINRES(tol=1e-12), warn=False
    )
    solved[0].backward()
    return [phi.grad, some.grad, none.grad]


def test_scalars_have_a_minimum_too():
    wanted = [torch.tensor(value, dtype=D) for value in (2.0, -0.5, 0.0)]  # w = 2 phi - some / 2
    for grads in on_ranks(minimum_of_scalar):
        torch.testing.assert_close(grads, wanted)


def test_the_minimum_is_that_of_all_data():
    problem = far_from_the_minimum()
    group = {"process_group": None, "solver": SOLVERS["MINRES"]}
    solved = minimum(problem, problem.inner, **group)
    whole = torch.autograd.grad(outer_of(problem, solved, 0, 12), [problem.phi, problem.decay], retain_graph=True)
    rows = rows_of(solved, problem.phi)
    for rank, (first, second, rows_of_rank, error, *caught) in enumerate(on_ranks(solved_minimum)):
        torch.testing.assert_close(first, whole, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(rows_of_rank, rows, rtol=1e-12, atol=1e-14)
        assert error.startswith("NotImplementedError: implicit_minimum has second derivatives in one process alone")
        assert [len(messages) for messages in caught] == [1 - rank, 0]
        assert rank or "The inner parameters are not at a minimum" in caught[0][0]
