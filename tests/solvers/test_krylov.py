"""What holds for conjugate gradients and MINRES alike."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from auxfast.solvers import MINRES, ConjugateGradient, Jacobi

from .systems import Operator, flat, gaussian, symmetric, with_eigenvalues

pytestmark = pytest.mark.parametrize("solver", [ConjugateGradient, MINRES])
SPREAD = torch.logspace(-2, 0, 30, dtype=torch.float64)


def system(values, dtype=torch.float64):
    return Operator(with_eigenvalues(torch.as_tensor(values, dtype=torch.float64), dtype)), gaussian(
        len(values), dtype=dtype
    )


@dataclass(frozen=True)
class Inverse:
    """A preconditioner that is the inverse of the matrix to the power `power`, or any given matrix."""

    power: float = 1.0
    matrix: torch.Tensor | None = None
    refresh: int = 1

    def build(self, system):
        matrix = self.matrix
        if matrix is None:
            units = torch.eye(system.rhs.shape[1], dtype=system.rhs.dtype)
            values, vectors = torch.linalg.eigh(system.product(units))
            matrix = vectors * values.abs() ** -self.power @ vectors.T
        return lambda rows: rows @ matrix


def test_closed_form(solver):
    problem = symmetric()
    x, stats = solver(tol=1e-9).solve(problem.matvec, problem.rhs)
    torch.testing.assert_close(flat(x), problem.solution(), rtol=1e-6, atol=1e-8)
    assert [t.shape for t in x] == [t.shape for t in problem.rhs]
    assert (stats.converged, stats.stop_reason, stats.negative_curvature) == (True, "converged", False)
    assert stats.residual == pytest.approx(problem.residual(x), rel=1e-6)
    assert stats.matvecs == problem.products == stats.iterations + 1
    assert 0.9 < stats.largest_eigenvalue <= 1 + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[3.0] * 20, [1.0, 5.0] * 10, [0.1, 1.0, 2.0, 7.0] * 5, [2.0]])
def test_as_many_steps_as_distinct_eigenvalues(solver, values, dtype):
    operator, b = system(values, dtype)
    x, stats = solver(tol=1e-4).solve(operator, [b])
    assert stats.iterations == len(set(values))
    assert stats.matvecs == operator.products == stats.iterations + 1
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(x[0], torch.linalg.solve(operator.matrix, b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalar_systems(solver, shape):
    x, stats = solver().solve(lambda v: [4 * v[0]], [torch.full(shape, 2.0)])
    torch.testing.assert_close(x[0], torch.full(shape, 0.5))
    assert (stats.iterations, stats.largest_eigenvalue) == (1, 4.0)


def test_ill_conditioned(solver):
    operator, b = system(torch.logspace(-6, 0, 25, dtype=torch.float64))
    x, stats = solver(steps=400, tol=1e-10).solve(operator, [b])
    exact = torch.linalg.solve(operator.matrix, b)
    assert stats.converged
    assert (x[0] - exact).norm() < 1e-6 * exact.norm()


def test_several_right_hand_sides_stop_on_their_own(solver, check_every):
    operator, b = system([0.1, 1.0, 2.0, 7.0] * 5)
    vectors = torch.linalg.eigh(operator.matrix)[1]
    rhs = torch.stack([b, torch.zeros_like(b), vectors[:, 0] + vectors[:, -1], vectors[:, 3], b + 1])
    x, stats = solver(tol=1e-8).solve(operator, [rhs], batched=True)
    assert stats.matvecs == operator.products
    assert stats.iterations == (4 if check_every == 1 else 8)
    if check_every == 1:
        assert stats.matvecs == 4 + 0 + 2 + 1 + 4 + 4  # the last 4 are closing products
    singles = [solver(tol=1e-8).solve(operator, [row]) for row in rhs]
    for row, (single, one) in enumerate(singles):
        torch.testing.assert_close(x[0][row], single[0], rtol=1e-9, atol=1e-12)
        assert stats.residuals[row] == pytest.approx(one.residual, abs=1e-12)
    assert stats.residual == max(stats.residuals)


def test_the_same_with_scalars_on_the_device(solver, set_check_every):
    operator, b = system(SPREAD)
    x, stats = solver(steps=32, tol=1e-5).solve(operator, [b])
    set_check_every(8)
    y, others = solver(steps=32, tol=1e-5).solve(operator, [b])
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert stats.converged
    assert others.converged
    assert others.largest_eigenvalue == pytest.approx(stats.largest_eigenvalue)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_preconditioner(solver, power):
    operator, b = system(torch.logspace(-4, 0, 30, dtype=torch.float64))
    plain = solver(tol=1e-6).solve(operator, [b])[1]
    operator.products = 0
    x, stats = solver(tol=1e-6, preconditioner=Inverse(power)).solve(operator, [b])
    assert stats.converged
    assert stats.residual == pytest.approx(float((b - operator.matrix @ x[0]).norm() / b.norm()), rel=1e-3)
    assert stats.matvecs == operator.products == 30 + stats.iterations + 1
    assert stats.iterations < plain.iterations
    assert stats.largest_eigenvalue is None  # those of the preconditioned matrix tell nothing of it
    if power == 1:
        assert stats.iterations == 1


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_the_scale_does_not_matter_to_a_preconditioned_system(solver, scale):
    operator, b = system(SPREAD)
    _, stats = solver(tol=1e-6, preconditioner=Inverse(0.5)).solve(lambda v: [scale * t for t in operator(v)], [b])
    assert stats.converged


def test_jacobi_makes_a_diagonal_system_the_identity(solver):
    diagonal = torch.logspace(-5, 1, 40, dtype=torch.float64)
    _, stats = solver(tol=1e-8, preconditioner=Jacobi(diagonal=[diagonal])).solve(
        lambda v: [diagonal * v[0]], [gaussian(40)]
    )
    assert (stats.converged, stats.iterations) == (True, 1)


def test_a_preconditioner_must_be_positive_definite(solver):
    operator, b = system(SPREAD)
    x, stats = solver(preconditioner=Inverse(matrix=-torch.eye(30, dtype=torch.float64))).solve(operator, [b])
    assert stats.stop_reason == "diverged"
    assert stats.residual <= 1
    assert x[0].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_products_that_are_not_finite(solver, bad, at, check_every):
    operator, b = system(SPREAD)

    def matvec(v):
        product = operator(v)
        return [product[0] * bad] if operator.products == at else product

    x, stats = solver(tol=1e-10).solve(matvec, [b])
    assert stats.stop_reason == "diverged"
    assert x[0].isfinite().all()
    assert stats.residual == pytest.approx(float((b - operator.matrix @ x[0]).norm() / b.norm()), rel=1e-6)
    assert stats.residual < 1 or at == 1


def test_a_closing_product_that_is_not_finite(solver):
    def matvec(v):
        calls.append(1)
        return [v[0] if len(calls) == 1 else v[0] * torch.nan]

    calls: list[int] = []
    x, stats = solver().solve(matvec, [torch.ones(3)])
    assert (stats.stop_reason, stats.residual, x[0].tolist()) == ("not finite", 1.0, [0.0] * 3)


def test_overflow_ends_with_what_is_finite(solver):
    operator, b = system(SPREAD, torch.float32)
    x, stats = solver().solve(lambda v: [1e-38 * t for t in operator(v)], [1e10 * b])
    assert x[0].isfinite().all()
    assert stats.residual <= 1
    assert not stats.converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stagnates_at_working_precision(solver, dtype):
    operator, b = system(SPREAD, dtype)
    _, stats = solver(steps=1000, tol=None).solve(operator, [b])
    assert stats.stop_reason in ("stagnated", "converged")
    assert stats.residual < 100 * torch.finfo(dtype).eps
    assert stats.iterations < 300
    assert not stats.negative_curvature


@pytest.mark.parametrize(
    ("wrong", "reason", "iterations"),
    [(1.1, "converged", 3), (3.0, "stagnated", 1)],  # x = b / wrong leaves 1 - 1 / wrong of the residual
)
def test_the_true_residual_decides_and_restarts(solver, wrong, reason, iterations):
    """The products of the recurrence are off by a factor, as the closing product shows."""
    calls: list[int] = []

    def matvec(v):
        calls.append(1)
        return [v[0] * (wrong if len(calls) % 2 else 1)]

    _, stats = solver(tol=1e-2 / 5).solve(matvec, [torch.ones(3)])
    assert (stats.stop_reason, stats.iterations, stats.matvecs) == (reason, iterations, 2 * iterations)
    assert stats.residual == pytest.approx((1 - 1 / wrong) ** iterations, rel=1e-4)


def test_half_precision_is_solved_in_float32(solver):
    operator, b = system(torch.linspace(0.5, 1, 40, dtype=torch.float64), torch.bfloat16)
    x, stats = solver(tol=2e-2).solve(operator, [b])
    assert x[0].dtype == torch.bfloat16
    true = float((b.double() - operator.matrix.double() @ x[0].double()).norm() / b.double().norm())
    assert stats.converged
    assert true < 3e-2


def test_steps_bounds_the_steps(solver):
    operator, b = system(SPREAD)
    _, stats = solver(steps=3, tol=1e-8).solve(operator, [b])
    assert (stats.iterations, stats.matvecs, stats.stop_reason, stats.converged) == (3, 4, "steps", False)
