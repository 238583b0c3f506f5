"""What conjugate gradients alone do: stop at negative curvature, and keep the best iterate."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from auxfast.solvers import ConjugateGradient, SolverState

from .systems import Operator, gaussian, with_eigenvalues


def system(values, dtype=torch.float64, seed=4):
    values = torch.as_tensor(values).double()
    return Operator(with_eigenvalues(values, dtype)), gaussian(len(values), dtype=dtype, seed=seed)


def test_negative_curvature_in_the_first_step_gives_zero():
    operator, b = system([-1.0, -2.0, -3.0])
    x, stats = ConjugateGradient().solve(operator, [b])
    assert (stats.stop_reason, stats.negative_curvature, stats.converged) == ("negative curvature", True, False)
    assert (stats.residual, stats.iterations, stats.largest_eigenvalue) == (1.0, 1, None)
    assert x[0].tolist() == [0.0] * 3


def test_negative_curvature_keeps_a_good_warm_start():
    operator, b = system([-1.0, -2.0, -3.0])
    near = torch.linalg.solve(operator.matrix, b) * 0.99
    x, stats = ConjugateGradient(warm_start=True).solve(operator, [b], state=SolverState([near]))
    assert stats.stop_reason == "negative curvature"
    torch.testing.assert_close(x[0], near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_curvature_later_keeps_the_best_iterate(dtype):
    operator, b = system(torch.cat([torch.tensor([-0.01]), torch.linspace(0.5, 2, 30)]), dtype)
    x, stats = ConjugateGradient(tol=1e-8).solve(operator, [b])
    assert (stats.stop_reason, stats.negative_curvature) == ("negative curvature", True)
    assert stats.iterations > 2
    assert stats.residual < 0.5
    assert stats.residual == pytest.approx(float((b - operator.matrix @ x[0]).norm() / b.norm()), rel=1e-4)


def test_damping_removes_negative_curvature():
    operator, b = system(torch.linspace(-0.5, 2, 20))
    _, stats = ConjugateGradient(damping=0.6).solve(operator, [b])
    assert (stats.converged, stats.negative_curvature) == (True, False)


def test_the_best_iterate_is_kept(check_every):
    operator, b = system(torch.logspace(-3, 0, 40))
    residuals = [ConjugateGradient(steps=steps, tol=None).solve(operator, [b])[1].residual for steps in range(1, 40)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(residuals))
    assert residuals[-1] < 1
    assert len(set(residuals)) < len(residuals)  # some last iterates were worse than one before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_systems(dtype):
    operator, b = system(torch.cat([torch.zeros(5), torch.linspace(0.1, 2, 20)]), dtype)
    x, stats = ConjugateGradient(tol=1e-5).solve(operator, [operator.matrix @ b])
    shortest = torch.linalg.pinv(operator.matrix, rtol=1e-4) @ (operator.matrix @ b)
    assert (stats.converged, stats.negative_curvature) == (True, False)
    torch.testing.assert_close(x[0], shortest, rtol=1e-3, atol=1e-3)

    x, stats = ConjugateGradient(tol=1e-5, steps=1000).solve(operator, [b])  # not in the range
    assert stats.stop_reason in ("stagnated", "negative curvature")
    assert stats.residual < 1
    assert x[0].norm() < 1e4


def test_a_flat_direction():
    x, stats = ConjugateGradient().solve(lambda v: [torch.zeros_like(v[0])], [torch.ones(4)])
    assert (stats.stop_reason, stats.residual, stats.negative_curvature) == ("stagnated", 1.0, False)
    assert x[0].tolist() == [0.0] * 4
