"""Products and time that each solver needs until the hypergradient is right to 1e-3 and to 1e-6, relative, in float64.

The truth is the hypergradient with a dense solve. Each solver's tolerance (or, without one, its number of steps) is
tightened until the hypergradient is as near as asked; "products" counts every Hessian-vector product: those that
estimate eigenvalues, build a preconditioner or certify the residual included. Neumann with the best fixed step knows
the largest and smallest eigenvalue, which nobody does; it is what the others are measured against.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timing import interleaved
from torch import Tensor, nn

from auxfast.implicit import hypergradient
from auxfast.solvers import (
    MINRES,
    Chebyshev,
    ConjugateGradient,
    Dense,
    Jacobi,
    Neumann,
    Nystrom,
    Solver,
    SolveStats,
)

MOST_STEPS = 5000


@dataclass
class Problem:
    """A bilevel problem at a minimum of its inner loss."""

    losses: Callable[[], tuple[Tensor, Tensor]]  # outer, inner
    w: list[Tensor]
    phi: list[Tensor]

    def solve(self, solver: Solver) -> tuple[Tensor, SolveStats]:
        """The hypergradient, flat, and the solver's statistics."""
        result = hypergradient(*self.losses(), self.w, self.phi, solver=solver, warn=False)
        return torch.cat([grad.reshape(-1) for grad in result.grads]), result.stats

    def eigenvalues(self) -> Tensor:
        """The eigenvalues of the inner Hessian, ascending."""
        _, inner = self.losses()
        grads = torch.autograd.grad(inner, self.w, create_graph=True)
        size = sum(w.numel() for w in self.w)
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        rows = torch.autograd.grad(flat, self.w, torch.eye(size, dtype=flat.dtype), is_grads_batched=True)
        return torch.linalg.eigvalsh(torch.cat([row.reshape(size, -1) for row in rows], 1))


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@functools.cache
def made(problem: Callable[[], Problem]) -> tuple[Problem, Tensor]:
    """The problem, and its true hypergradient."""
    torch.manual_seed(0)
    case = problem()
    return case, case.solve(Dense())[0]


def logistic() -> Problem:
    """A logistic regression, 1000 x 300, with a learned penalty for each weight; features of different scales."""
    x, x_outer = (torch.randn(1000, 300) * torch.logspace(0, -1, 300) for _ in range(2))
    truth = torch.randn(300)
    y, y_outer = ((torch.sigmoid(z @ truth) > torch.rand(1000)).double() for z in (x, x_outer))
    w = torch.zeros(300, requires_grad=True)
    penalty = torch.full((300,), math.log(1e-3), requires_grad=True)

    def losses() -> tuple[Tensor, Tensor]:
        outer = F.binary_cross_entropy_with_logits(x_outer @ w, y_outer)
        inner = F.binary_cross_entropy_with_logits(x @ w, y) + 0.5 * (penalty.exp() * w.square()).sum()
        return outer, inner

    minimise(losses, [w])
    return Problem(losses, [w], [penalty])


def ridge() -> Problem:
    """Ridge regression in 200 weights, condition 1e3, eigenvalues evenly spread in their logarithms."""
    left, right = (torch.linalg.qr(torch.randn(200, 200)).Q for _ in range(2))
    x = left * torch.logspace(0, -1.5, 200) @ right
    y, target = torch.randn(200), torch.randn(200)
    weights = torch.zeros(200, requires_grad=True)  # logarithms, of the examples
    w = torch.linalg.solve(x, y).requires_grad_()

    def losses() -> tuple[Tensor, Tensor]:
        return (w - target).square().sum(), 0.5 * (weights.exp() * (x @ w - y).square()).sum()

    return Problem(losses, [w], [weights])


def network() -> Problem:
    """An MLP 10-16-5 on 200 examples, trained to a minimum, with a learned weight decay for each parameter tensor."""
    net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 5))
    x, x_outer = torch.randn(200, 10), torch.randn(200, 10)
    teacher = torch.randn(10, 5)
    y, y_outer = (x @ teacher + torch.randn(200, 5)).argmax(1), (x_outer @ teacher).argmax(1)
    w = list(net.parameters())
    decay = torch.full((len(w),), math.log(1e-3), requires_grad=True)

    def losses() -> tuple[Tensor, Tensor]:
        penalty = sum(d.exp() * p.square().sum() for d, p in zip(decay, w, strict=True))
        return F.cross_entropy(net(x_outer), y_outer), F.cross_entropy(net(x), y) + 0.5 * penalty

    minimise(losses, w)
    return Problem(losses, w, [decay])


def minimise(losses: Callable[[], tuple[Tensor, Tensor]], w: list[Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        w, max_iter=5000, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        inner = losses()[1]
        inner.backward(inputs=w)
        return inner

    optimizer.step(closure)


def settings(solver: str, problem: Problem) -> Iterator[Solver]:
    """The solver at ever more work."""
    if solver == "Neumann, best fixed step":
        values = problem.eigenvalues()
        best = 2 / float(values[0] + values[-1])
        yield from (Neumann(int(steps), best) for steps in torch.logspace(0, math.log10(MOST_STEPS), 40).unique())
        return
    by_name: dict[str, Solver] = {
        "Neumann": Neumann(steps=MOST_STEPS, tol=0.5),
        "Chebyshev": Chebyshev(steps=MOST_STEPS, tol=0.5),
        "CG": ConjugateGradient(steps=MOST_STEPS, tol=0.5),
        "CG, Jacobi": ConjugateGradient(steps=MOST_STEPS, tol=0.5, preconditioner=Jacobi()),
        "CG, Nystrom(20)": ConjugateGradient(steps=MOST_STEPS, tol=0.5, preconditioner=Nystrom(rank=20)),
        "MINRES (default)": MINRES(steps=MOST_STEPS, tol=0.5),
    }
    if solver == "Dense":
        yield Dense()
        return
    yield from (replace(by_name[solver], tol=float(tol)) for tol in torch.logspace(-1, -9, 17))  # type: ignore[type-var, call-arg]


SOLVERS = [
    "Neumann, best fixed step",
    "Neumann",
    "Chebyshev",
    "CG",
    "CG, Jacobi",
    "CG, Nystrom(20)",
    "MINRES (default)",
    "Dense",
]


@pytest.mark.benchmark(group="solvers: products and ms to a relative hypergradient error, float64, one thread")
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", [logistic, ridge, network], ids=lambda problem: problem.__name__)
def test_solver(benchmark: Any, problem: Callable[[], Problem], solver: str) -> None:
    case, truth = made(problem)
    run = functools.partial(case.solve, next(settings(solver, case)))
    for accuracy in (1e-3, 1e-6):
        products, milliseconds = f"products, {accuracy:g}", f"ms, {accuracy:g}"
        setting = cheapest(settings(solver, case), case, truth, accuracy if benchmark.enabled else math.inf)
        if setting is None:
            benchmark.extra_info |= {products: f"> {MOST_STEPS}", milliseconds: ""}
            continue
        run = functools.partial(case.solve, setting)
        seconds = interleaved({"solve": run}, rounds=5 if benchmark.enabled else 1, inner=1)["solve"]
        benchmark.extra_info |= {products: run()[1].matvecs, milliseconds: seconds * 1e3}
    benchmark.pedantic(run, rounds=1)


def cheapest(candidates: Iterator[Solver], case: Problem, truth: Tensor, accuracy: float) -> Solver | None:
    """The first that is as near to the truth as asked."""
    for setting in candidates:
        grads, stats = case.solve(setting)
        if float((grads - truth).norm() / truth.norm()) <= accuracy:
            return setting
        if stats.matvecs >= MOST_STEPS:
            return None
    return None
