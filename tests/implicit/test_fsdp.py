"""Networks that `fully_shard` has cut: the hypergradient of the whole network on all data, from pieces of vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import auxfast
from auxfast import solvers
from auxfast.solvers.space import NotSharded

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

PARTS = {"inner": [(0, 14), (14, 20)], "outer": [(0, 13), (13, 13)]}  # the second rank has no outer data
SOLVERS = [
    solvers.MINRES(20),
    solvers.MINRES(20, preconditioner=solvers.Jacobi()),
    solvers.ConjugateGradient(20, damping=1.0),
    solvers.ConjugateGradient(40, preconditioner=solvers.Jacobi(), tol=1e-12),
    solvers.Neumann(20, 0.05),
    solvers.Neumann(20, 0.05, certify=False),
    solvers.Neumann(20),
    solvers.Chebyshev(20),
    solvers.GMRES(20),
    solvers.NormalEquations(20),
    solvers.GradientFlow(time=2.0),
    solvers.Identity(0.1),
    solvers.OneStep(0.1),
    solvers.OneStep(0.1, lookahead=True),
    solvers.SingleLoop(0.1),
    solvers.DEFAULT_SOLVER,
]


class Problem:
    """A network with an uneven layer, one of fewer rows than ranks, and a frozen one."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1)).double()
        self.net[3].bias.requires_grad_(False)
        self.phi = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        self.data = {
            name: [torch.randn(count, columns, dtype=torch.float64) for columns in (5, 1)]
            for name, count in {"inner": 20, "outer": 13}.items()
        }

    def shard(self, **settings: Any) -> Problem:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net[2], **settings)
        fully_shard(self.net, **settings)
        return self

    def inner(self, start: int = 0, end: int = 20) -> Callable[[], Any]:
        x, y = (t[start:end] for t in self.data["inner"])

        def loss() -> Tensor:
            errors = (self.net(x) - y).square()
            return (errors * self.phi.exp()).mean() + 0.5 * self.decay()

        return loss

    def decay(self) -> Tensor:
        terms = [(p * p).sum() for p in self.net.parameters()]
        return torch.stack(terms).sum()

    def outer(self, start: int = 0, end: int = 13) -> Callable[[], Tensor]:
        x, y = (t[start:end] for t in self.data["outer"])
        return lambda: (self.net(x) - y).square().mean() + 0.1 * self.phi.sum()

    def losses_of_rank(self, rank: int) -> list[Any]:
        return [
            [(end - start, getattr(self, name)(start, end))] if end > start else []
            for name, (start, end) in ((name, PARTS[name][rank]) for name in ("outer", "inner"))
        ]

    def hypergradient(self, outer: Any, inner: Any, solver: solvers.Solver, **settings: Any) -> Any:
        given = self.net.parameters()
        return auxfast.hypergradient(outer, inner, given, [self.phi], solver=solver, warn=False, **settings)


def of_rank(rank: int, methods: list[solvers.Solver], curvature: str) -> list[Any]:
    problem = Problem().shard()
    losses, results = problem.losses_of_rank(rank), []
    for solver in methods:
        state = solvers.SolverState()
        for _ in range(2):
            result = problem.hypergradient(*losses, solver, process_group=distributed.group.WORLD, state=state)
            results.append((result.grads[0], result.stats))
    return results


def test_every_solver_finds_the_hypergradient_of_one_process():
    results = on_ranks(of_rank, SOLVERS, "hessian")
    problem = Problem()
    for i, solver in enumerate(SOLVERS):
        state = solvers.SolverState()
        for call in range(2):
            whole = problem.hypergradient(problem.outer(), problem.inner(), solver, state=state)
            for result in results:
                grad, stats = result[2 * i + call]
                torch.testing.assert_close(grad, whole.grads[0], rtol=1e-10, atol=1e-12, msg=lambda m: f"{solver}: {m}")
                if getattr(solver, "preconditioner", None) is None:
                    assert (stats.matvecs, stats.stop_reason) == (whole.stats.matvecs, whole.stats.stop_reason), solver
