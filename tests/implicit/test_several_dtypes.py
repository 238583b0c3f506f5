"""Inner parameters of several floating dtypes, as adapters in float32 on a model in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxfast
from auxfast.solvers import MINRES, ConjugateGradient, Dense, Neumann, Nystrom

from .problems import flat

CURVATURES = ["hessian", "gauss-newton", "finite-difference"]


class Adapted:
    """A linear model and a low-rank adapter, with a weight decay for each of the tensors."""

    def __init__(self, base: torch.dtype, adapter: torch.dtype, phi: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.base, self.a, self.b = (
            nn.Linear(4, 2).bfloat16(),
            torch.randn(4, 1).bfloat16(),
            torch.randn(1, 2).bfloat16(),
        )
        self.x = torch.randn(8, 4).bfloat16()
        self.base, self.x = self.base.to(base), self.x.to(base)
        self.a, self.b = (t.to(adapter).requires_grad_() for t in (self.a, self.b))
        self.inner_params = [self.base.weight, self.a, self.base.bias, self.b]
        self.phi = torch.zeros(4, dtype=phi, requires_grad=True)

    def outputs(self) -> Tensor:
        return self.base(self.x).to(self.a.dtype) + self.x.to(self.a.dtype) @ self.a @ self.b

    def inner(self, with_outputs: bool = False) -> Any:
        z = self.outputs()
        decay = sum(p.exp().to(w.dtype) * w.square().sum() for p, w in zip(self.phi, self.inner_params, strict=True))
        loss = z.square().mean() + decay.to(z.dtype)
        return (loss, z) if with_outputs else loss

    def outer(self) -> Tensor:
        return (self.outputs() - 1).square().mean()

    def hypergradient(self, curvature: str, solver: Any, count: int = 1) -> auxfast.HypergradientResult:
        inner = (lambda: self.inner(True)) if curvature == "gauss-newton" else self.inner
        losses = [self.outer] * count, [inner] * count
        options = {"curvature": curvature, "solver": solver, "warn": False}
        return auxfast.hypergradient(*losses, self.inner_params, [self.phi], **options)


def wide() -> Adapted:
    """The problem in float64."""
    return Adapted(torch.float64, torch.float64)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("solver", [Dense(damping=1.0), MINRES(tol=1e-5, damping=1.0), Neumann(50, damping=1.0)])
def test_two_dtypes_give_what_one_gives(curvature, count, solver):
    expected = wide().hypergradient(curvature, solver, count)
    for dtypes in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        found = Adapted(*dtypes).hypergradient(curvature, solver, count)
        tolerance = 2e-2 if curvature == "finite-difference" else 1e-4
        torch.testing.assert_close(found.grads, expected.grads, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", [Dense(damping=1.0), ConjugateGradient(damping=1.0), Nystrom(damping=1.0)])
def test_adapters_in_float32_on_a_model_in_bfloat16(solver):
    expected = wide().hypergradient("hessian", solver).grads[0]
    case = Adapted(torch.bfloat16, torch.float32, phi=torch.float32)
    found = case.hypergradient("hessian", solver)
    assert found.grads[0].dtype == torch.float32
    assert (found.grads[0] - expected).norm() < 0.05 * expected.norm()


def test_the_certificate_is_that_of_vectors_in_the_widest_dtype():
    @dataclass(frozen=True)
    class Recomputing:
        recomputed: list[float] = field(default_factory=list)

        def solve(self, matvec, rhs, **options):
            assert {t.dtype for t in rhs} == {torch.float32}
            solution, stats = MINRES(steps=3, tol=None, damping=1.0).solve(matvec, rhs, **options)
            left = [b - p - x for b, p, x in zip(rhs, matvec(solution), solution, strict=True)]
            self.recomputed.append(float(flat(left).norm() / flat(rhs).norm()))
            return solution, stats

    solver = Recomputing()
    stats = Adapted(torch.bfloat16, torch.float32).hypergradient("hessian", solver).stats
    assert stats.residual == pytest.approx(solver.recomputed[0], rel=1e-3)


def test_frozen_parameters_may_have_any_dtype():
    case = Adapted(torch.bfloat16, torch.float32)
    case.base.requires_grad_(False)
    with_frozen = case.hypergradient("hessian", Dense(damping=1.0)).grads[0]
    inner_params, options = [case.a, case.b], {"solver": Dense(damping=1.0)}
    alone = auxfast.hypergradient(case.outer, case.inner, inner_params, [case.phi], **options).grads[0]
    assert torch.equal(alone, with_frozen)


def test_usefulness_and_verification():
    def scores(case: Adapted) -> Tensor:
        losses = case.outer(), case.inner(), [case.outputs().sum(), case.a.sum()]
        return auxfast.auxiliary_usefulness(*losses, case.inner_params, solver=Dense(damping=1.0)).scores

    mixed = Adapted(torch.float32, torch.float64)
    torch.testing.assert_close(scores(mixed), scores(wide()), rtol=1e-4, atol=1e-5)
    for case in (mixed, Adapted(torch.float64, torch.float32)):
        report = auxfast.verify_hypergradient(case.outer, case.inner, case.inner_params, [case.phi])
        assert report.solver.relative_error < 1e-2
        assert report.resolved_gradient_norm < 1e-3
