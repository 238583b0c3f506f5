"""MINRES in few bytes: the same solutions to the same tolerances, with a true residual, from narrow vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import auxfast
from auxfast.solvers import MINRES, CompactMINRES, StopReason
from benchmarks.memory import peak_bytes

SIZES = [300, 100]


def system(dtype: torch.dtype, negative: int = 0):
    """Eigenvalues from 0.01 to 1 in a random basis, the first few of them negative."""
    generator = torch.Generator().manual_seed(0)
    n = sum(SIZES)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.logspace(-2, 0, n, dtype=torch.float64)
    eigenvalues[:negative] *= -1
    matrix = (basis * eigenvalues @ basis.T).to(dtype)
    rhs = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    return (lambda v: (matrix @ torch.cat([*v])).split(SIZES)), [*rhs.split(SIZES)], matrix


def norm(tensors) -> float:
    return float(torch.cat([t.double() for t in tensors]).norm())


@pytest.mark.parametrize("tol", [0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("negative", [0, 20])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_it_reaches_the_tolerance_in_somewhat_more_products_and_certifies_what_it_returns(kept, negative, tol):
    matvec, rhs, _ = system(torch.float64, negative)
    x, stats = CompactMINRES(400, tol=tol, dtype=kept, device="cpu").solve(matvec, rhs)
    residual = norm([b - p for b, p in zip(rhs, matvec(x), strict=True)]) / norm(rhs)
    assert stats.converged
    assert stats.residual <= tol
    assert stats.residual == pytest.approx(residual, rel=1e-6)
    assert stats.negative_curvature == (negative > 0)
    assert stats.matvecs <= 1.6 * MINRES(400, tol=tol).solve(matvec, rhs)[1].matvecs + 1
    assert all(t.dtype == torch.float64 for t in x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_parameters_have_true_residuals_and_damping(dtype):
    matvec, rhs, matrix = system(dtype)
    x, stats = CompactMINRES(60, tol=None, damping=0.1).solve(matvec, rhs)
    flat = torch.cat(x).double()
    residual = torch.cat(rhs).double() - (matrix.double() @ flat + 0.1 * flat)
    assert stats.residual == pytest.approx(norm([residual]) / norm(rhs), rel=0.3)
    assert stats.residual < (0.05 if dtype == torch.bfloat16 else 1e-5)
    assert stats.stop_reason in (StopReason.STAGNATED, StopReason.STEPS)


def test_ends_that_are_no_convergence_are_told():
    matvec, rhs, _ = system(torch.float64)
    x, stats = CompactMINRES(3).solve(matvec, rhs)
    assert (stats.stop_reason, stats.iterations, stats.matvecs) == ("steps", 3, 4)
    assert 0 < stats.residual < 1
    x, stats = CompactMINRES().solve(lambda v: [math.nan * t for t in v], rhs)
    assert (stats.stop_reason, stats.residual) == ("not finite", 1.0)
    assert not any(t.any() for t in x)
    x, stats = CompactMINRES().solve(lambda v: [0 * t for t in v], rhs)
    assert (stats.stop_reason, stats.residual) == ("stagnated", 1.0)
    assert CompactMINRES().solve(matvec, [0 * b for b in rhs])[1].stop_reason == "trivial"
    x, stats = CompactMINRES().solve(lambda v: v, rhs)  # an operator that returns what it was given
    torch.testing.assert_close(x, rhs, rtol=2e-3, atol=0)


def test_what_it_does_not_do_is_refused():
    matvec, rhs, _ = system(torch.float64)
    with pytest.raises(ValueError, match=r"CompactMINRES solves for one right-hand side: take MINRES\(\)"):
        CompactMINRES().solve(matvec, [b[None] for b in rhs], batched=True)
    with pytest.raises(ValueError, match=r"dtype must be one of .*, not torch.float16"):
        CompactMINRES(dtype=torch.float16)
    with pytest.raises(ValueError, match="rhs"):
        CompactMINRES().solve(matvec, [math.inf * b for b in rhs])


def test_it_keeps_18_bytes_a_parameter_and_minres_64():
    rhs = [torch.randn(10_000) for _ in range(10)]
    scale = torch.logspace(-2, 0, 10_000)

    def bytes_of(solver) -> float:
        def matvec(vectors) -> list[Tensor]:
            return [scale * v for v in vectors]

        return peak_bytes(lambda: solver.solve(matvec, rhs)) / 100_000

    assert 17 < bytes_of(CompactMINRES(4, tol=None)) < 21  # what one parameter's arithmetic needs is on top
    assert 21 < bytes_of(CompactMINRES(50, tol=None)) < 25
    assert 60 < bytes_of(MINRES(4, tol=None)) < 66


def test_a_hypergradient_by_it_is_that_of_minres():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    phi, x, y = torch.zeros(3, requires_grad=True), torch.randn(20, 5), torch.randn(20, 3)
    exact, found = (
        auxfast.hypergradient(
            lambda: (net(x) - y).square().mean(),
            lambda: ((net(x) - y).square() * phi.exp()).mean(),
            net.parameters(),
            [phi],
            solver=solver(200, tol=1e-5, damping=1.0),
            warn=False,
        )
        for solver in (MINRES, CompactMINRES)
    )
    assert exact.stats.converged
    assert found.stats.converged
    torch.testing.assert_close(found.grads, exact.grads, rtol=1e-3, atol=1e-6)
