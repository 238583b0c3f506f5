"""Ranks with parts of the data get the hypergradient of all of it, whatever solves the system."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import auxfast
from auxfast import solvers

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

PARTS = {"inner": [(0, 14), (14, 20)], "outer": [(0, 13), (13, 13)]}  # the second rank has no outer data


class Problem:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.phi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self.data = {
            name: [torch.randn(count, columns, generator=generator, dtype=torch.float64) for columns in (5, 3)]
            for name, count in {"inner": 20, "outer": 13}.items()
        }

    def inner(self, start: int = 0, end: int = 20) -> Callable[[], Any]:
        x, y = (t[start:end] for t in self.data["inner"])

        def loss() -> tuple[Tensor, Tensor]:
            outputs = self.net(x)
            decay = sum(p.square().sum() for p in self.net.parameters())
            return ((outputs - y).square() * self.phi.exp()).mean() + 0.02 * decay, outputs

        return loss

    def outer(self, start: int = 0, end: int = 13) -> Callable[[], Tensor]:
        x, y = (t[start:end] for t in self.data["outer"])
        return lambda: (self.net(x) - y).square().mean() + 0.1 * self.phi.sum()

    def hypergradient(self, outer: Any, inner: Any, solver: solvers.Solver, **settings: Any) -> Any:
        return auxfast.hypergradient(
            outer, inner, self.net.parameters(), [self.phi], solver=solver, curvature="gauss-newton", **settings
        )


def of_rank(rank: int, solver: solvers.Solver) -> tuple[Tensor, solvers.SolveStats]:
    problem = Problem()
    inner, outer = (
        [(end - start, getattr(problem, name)(start, end))] if end > start else []
        for name, (start, end) in ((name, PARTS[name][rank]) for name in ("inner", "outer"))
    )
    result = problem.hypergradient(outer, inner, solver, process_group=distributed.group.WORLD, warn=False)
    return result.grads[0], result.stats


@pytest.mark.parametrize("solver", [solvers.Dense(), solvers.Neumann(20, 0.05), solvers.MINRES(20)], ids=repr)
def test_ranks_get_the_hypergradient_of_all_data(solver):
    problem = Problem()
    whole = problem.hypergradient(problem.outer(), problem.inner(), solver, warn=False)
    results = on_ranks(of_rank, solver)
    for grad, stats in results:
        torch.testing.assert_close(grad, whole.grads[0], rtol=1e-9, atol=1e-12)
        assert (stats.matvecs, stats.stop_reason) == (whole.stats.matvecs, whole.stats.stop_reason)
    assert torch.equal(results[0][0], results[1][0])
