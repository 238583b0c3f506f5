"""What MINRES alone does: indefinite and singular systems, and the smallest residual."""

from __future__ import annotations

import pytest
import torch

from auxfast.solvers import MINRES, ConjugateGradient

from .systems import Operator, gaussian, with_eigenvalues

INDEFINITE = torch.cat([torch.linspace(-1, -0.1, 8), torch.linspace(0.1, 2, 20)]).double()


def system(values, dtype=torch.float64):
    return Operator(with_eigenvalues(values.double(), dtype)), gaussian(len(values), dtype=dtype)


@pytest.mark.parametrize("values", [INDEFINITE, torch.logspace(-3, 0, 28)])
def test_the_residual_is_the_smallest_over_the_krylov_space(values):
    operator, b = system(values)
    images, vector = [], b
    for steps in range(1, 9):
        vector = operator.matrix @ vector / vector.norm()
        images.append(vector)
        space = torch.linalg.qr(torch.stack(images, dim=1))[0]
        smallest = (b - space @ (space.T @ b)).norm() / b.norm()
        _, stats = MINRES(steps=steps, tol=None).solve(operator, [b])
        assert stats.residual == pytest.approx(float(smallest), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_indefinite(dtype):
    operator, b = system(INDEFINITE, dtype)
    x, stats = MINRES(tol=1e-4).solve(operator, [b])
    assert stats.converged
    assert stats.negative_curvature
    torch.testing.assert_close(x[0], torch.linalg.solve(operator.matrix, b), rtol=1e-2, atol=1e-2)


def test_negative_definite():
    operator, b = system(-torch.linspace(1, 2, 10))
    x, stats = MINRES(tol=1e-10).solve(operator, [b])
    torch.testing.assert_close(x[0], torch.linalg.solve(operator.matrix, b))
    assert stats.negative_curvature
    assert stats.largest_eigenvalue == pytest.approx(-1, rel=1e-6)


def test_a_single_small_negative_eigenvalue_is_noticed():
    operator, b = system(torch.cat([torch.tensor([-0.05]), torch.linspace(0.5, 2, 20)]))
    assert MINRES(tol=1e-8).solve(operator, [b])[1].negative_curvature
    assert not MINRES(tol=1e-8, damping=0.06).solve(operator, [b])[1].negative_curvature


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_rounding_is_not_negative_curvature(condition, dtype):
    operator, b = system(torch.logspace(0, float(torch.tensor(condition).log10()), 30), dtype)
    assert not MINRES(steps=300, tol=None).solve(operator, [b])[1].negative_curvature


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_and_consistent_gives_the_shortest_solution(dtype):
    operator, b = system(torch.cat([torch.zeros(5), torch.linspace(0.1, 2, 20)]), dtype)
    x, stats = MINRES(tol=1e-5).solve(operator, [operator.matrix @ b])
    shortest = torch.linalg.pinv(operator.matrix, rtol=1e-4) @ (operator.matrix @ b)
    assert (stats.converged, stats.negative_curvature) == (True, False)
    torch.testing.assert_close(x[0], shortest, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lowest", [0.1, -1.0])
def test_singular_and_inconsistent_stagnates_at_the_least_squares_residual(lowest, dtype):
    operator, b = system(torch.cat([torch.zeros(5), torch.linspace(lowest, 2, 20)]), dtype)
    x, stats = MINRES(steps=1000, tol=1e-6).solve(operator, [b])
    values, vectors = torch.linalg.eigh(operator.matrix.double())
    null = vectors[:, values.abs() < 1e-5]
    smallest = (null.T @ b.double()).norm() / b.norm()
    assert null.shape[1] == 5
    assert stats.stop_reason == "stagnated"
    assert stats.residual == pytest.approx(float(smallest), rel=1e-3)
    assert stats.iterations < 60
    assert stats.negative_curvature == (lowest < 0)
    assert x[0].norm() < b.norm() / torch.finfo(dtype).eps ** 0.5


def test_a_null_vector_and_a_zero_hessian():
    for matrix in (torch.zeros(6, 6), torch.diag(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]))):
        b = torch.eye(6)[0]
        x, stats = MINRES().solve(Operator(matrix), [b])
        assert (stats.stop_reason, stats.residual, stats.negative_curvature) == ("stagnated", 1.0, False)
        assert x[0].tolist() == [0.0] * 6


def test_float32_survives_a_few_large_eigenvalues_over_many_small_ones():
    """Rounding of `condition^2 eps`, which the recurrence for w in float32 would have, leaves a tenth here."""
    bulk = 1e-5 + 1e-4 * torch.rand(190, generator=torch.Generator().manual_seed(0))
    operator, b = system(torch.cat([bulk, torch.linspace(0.1, 1, 10)]), torch.float32)
    assert MINRES(steps=50).solve(operator, [b])[1].residual < 0.03


def test_not_behind_conjugate_gradients():
    operator, b = system(torch.logspace(-4, 0, 40))
    for steps in (5, 20, 40):  # more than there are eigenvalues would compare rounding
        minres, cg = (s(steps=steps, tol=None).solve(operator, [b])[1] for s in (MINRES, ConjugateGradient))
        assert minres.residual <= cg.residual * (1 + 1e-6)


def test_half_of_the_symmetric_spectrum():
    """b . H b = 0: the first step of conjugate gradients would divide by it."""
    x, stats = MINRES().solve(lambda v: [v[0].flip(0)], [torch.tensor([1.0, 0.0])])
    torch.testing.assert_close(x[0], torch.tensor([0.0, 1.0]))
    assert (stats.converged, stats.iterations) == (True, 2)
