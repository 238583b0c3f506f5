"""The Chebyshev iteration: its polynomial, its bounds, and how it ends."""

from __future__ import annotations

import math

import pytest
import torch

from auxfast.solvers import Chebyshev, Jacobi, SolverState

from .systems import Operator, flat, gaussian, symmetric, with_eigenvalues


def residual(operator: Operator, x, b, damping=0.0) -> float:
    return float((b - operator.matrix @ x - damping * x).norm() / b.norm())


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_is_the_chebyshev_polynomial(steps):
    values, (lower, upper) = torch.linspace(0.1, 1, 12, dtype=torch.float64), (0.1, 1.1)
    operator, b = Operator(torch.diag(values)), gaussian(12)
    (x,), stats = Chebyshev(steps, (lower, upper), tol=None).solve(operator, [b])

    def polynomial(z):
        return torch.cosh(steps * torch.acosh(z.to(torch.complex128))).real

    center, half = (upper + lower) / 2, (upper - lower) / 2
    left = polynomial((center - values) / half) / polynomial(torch.tensor(center / half, dtype=torch.float64))
    torch.testing.assert_close(b - values * x, left * b, rtol=1e-9, atol=1e-12)
    assert stats.residual == pytest.approx(float((left * b).norm() / b.norm()), rel=1e-9)
    assert (stats.iterations, stats.matvecs, operator.products) == (steps, steps + 1, steps + 1)
    assert (stats.converged, stats.stop_reason) == (False, "steps")


@pytest.mark.parametrize("bounds", ["auto", (0.1, 1.0), (0.01, 2.0)])
def test_converges_on_lists_of_tensors(bounds, check_every):
    system = symmetric()
    x, stats = Chebyshev(1000, bounds, tol=1e-10).solve(system.matvec, system.rhs)
    torch.testing.assert_close(flat(x), system.solution(), rtol=1e-8, atol=1e-8)
    assert [t.shape for t in x] == [b.shape for b in system.rhs]
    assert (stats.converged, stats.stop_reason) == (True, "converged")
    assert stats.residual == pytest.approx(system.residual(x), rel=1e-3)
    assert stats.matvecs == system.products


@pytest.mark.parametrize("condition", [10, 1e3, 1e6])
def test_finds_the_lower_bound(condition):
    values = torch.logspace(-math.log10(condition), 0, 100, dtype=torch.float64)
    operator, b, state = Operator(with_eigenvalues(values)), gaussian(100), SolverState()
    solver = Chebyshev(20_000, tol=1e-8)
    (x,), stats = solver.solve(operator, [b], state=state)
    assert stats.converged
    assert residual(operator, x, b) <= 1e-8
    best = math.acosh(1e8) / math.acosh((condition + 1) / (condition - 1))
    assert stats.matvecs < 3 * best + 20
    assert 0.1 / condition < state.smallest_eigenvalue < 20 / condition
    _, again = solver.solve(operator, [gaussian(100, seed=6)], state=state)
    assert again.converged
    assert again.matvecs <= 2 * best + 20


def test_growth_above_wrong_bounds_returns_the_best_that_was_seen():
    operator = Operator(with_eigenvalues(torch.cat([torch.linspace(0.1, 0.8, 39), torch.ones(1)]).double()))
    b = torch.linalg.eigh(operator.matrix)[1] @ torch.cat([gaussian(39), torch.tensor([1e-4], dtype=torch.float64)])
    (x,), stats = Chebyshev(500, (0.1, 0.8), tol=1e-9).solve(operator, [b])
    assert (stats.converged, stats.stop_reason) == (False, "diverged")
    assert stats.residual == pytest.approx(residual(operator, x, b), rel=1e-9)
    assert stats.residual < 0.1
    assert stats.iterations < 100


def test_underestimated_bounds_are_estimated_anew(check_every):
    operator, b = Operator(with_eigenvalues(torch.linspace(0.1, 1, 40, dtype=torch.float64))), gaussian(40)
    state = SolverState(smallest_eigenvalue=0.05, largest_eigenvalue=0.3)
    (x,), stats = Chebyshev(500, tol=1e-6).solve(operator, [b], state=state)
    assert stats.converged
    assert residual(operator, x, b) <= 1e-6
    assert 0.9 < state.largest_eigenvalue <= 1
    assert stats.matvecs == operator.products


@pytest.mark.parametrize("smallest", [-1e-3, -0.1, -1.0, -10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_indefinite_systems_end_at_the_best(smallest, dtype, check_every):
    operator = Operator(with_eigenvalues(torch.linspace(smallest, 1, 60, dtype=torch.float64), dtype))
    b = gaussian(60, dtype=dtype)
    (x,), stats = Chebyshev(2000, tol=1e-5).solve(operator, [b])
    assert x.isfinite().all()
    assert stats.residual == pytest.approx(residual(operator, x, b), rel=1e-3)
    assert stats.residual < 0.9
    assert stats.negative_curvature or smallest == -1e-3
    assert stats.converged or stats.stop_reason in ("diverged", "steps")


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_without_positive_eigenvalues_there_are_no_bounds(sign):
    b = gaussian(5)
    (x,), stats = Chebyshev().solve(lambda v: [sign * v[0]], [b])
    assert x.isfinite().all()
    if sign:  # Lanczos solves it
        assert (stats.converged, stats.negative_curvature) == (True, True)
    else:
        assert (stats.residual, stats.converged, stats.stop_reason) == (1.0, False, "stagnated")


@pytest.mark.parametrize("bounds", ["auto", (0.1, 1.0)])
@pytest.mark.parametrize("together", [True, False])
def test_several_right_hand_sides_stop_on_their_own(bounds, together, check_every):
    operator = Operator(with_eigenvalues(torch.linspace(0.1, 1, 30, dtype=torch.float64)))
    easy = torch.linalg.eigh(operator.matrix)[1][:, 15]
    b = torch.stack([gaussian(30), torch.zeros(30, dtype=torch.float64), 1e3 * gaussian(30, seed=5), easy])
    solver = Chebyshev(500, bounds, tol=1e-6)
    (x,), stats = solver.solve(operator if together else lambda v: operator(v), [b], batched=True)
    assert stats.converged
    assert max(stats.residuals) == stats.residual <= 1e-6
    assert stats.residuals[1] == 0
    torch.testing.assert_close(x @ operator.matrix, b, rtol=0, atol=1e-2)
    assert stats.matvecs == operator.products
    if bounds != "auto":
        for row, solution in zip(b, x, strict=True):
            torch.testing.assert_close(solver.solve(operator, [row])[0][0], solution, rtol=1e-9, atol=1e-9)
        assert stats.matvecs <= 3 * (stats.iterations + 1)


def test_preconditioner():
    scale = torch.logspace(0, 3, 60, dtype=torch.float64)
    well = with_eigenvalues(torch.linspace(0.3, 1, 60, dtype=torch.float64))
    operator, b = Operator(scale[:, None] * well * scale), gaussian(60)
    state = SolverState()
    solver = Chebyshev(300, tol=1e-8, preconditioner=Jacobi([scale**2]))
    (x,), stats = solver.solve(operator, [b], state=state)
    assert stats.converged
    assert residual(operator, x, b) <= 1e-8
    assert stats.largest_eigenvalue is None  # that of H was not estimated
    assert not Chebyshev(300, tol=1e-8).solve(operator, [b])[1].converged
    _, again = solver.solve(operator, [b], state=state)
    assert again.converged
    assert again.matvecs == again.iterations + 1  # the bounds are kept


def test_rounding_limits_are_told_from_convergence():
    operator = Operator(with_eigenvalues(torch.logspace(-6, 0, 30, dtype=torch.float64), torch.float32))
    b = gaussian(30, dtype=torch.float32)
    (x,), stats = Chebyshev(20_000, (5e-7, 1.1), tol=1e-6).solve(operator, [b])
    exact = float((b.double() - operator.matrix.double() @ x.double()).norm() / b.double().norm())
    assert stats.residual == pytest.approx(exact, rel=0.1)
    assert stats.converged == (stats.residual <= 1e-6)
