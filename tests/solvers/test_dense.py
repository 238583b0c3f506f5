from __future__ import annotations

import pytest
import torch

from auxfast.solvers import Dense

from .systems import Operator, flat, gaussian, symmetric, with_eigenvalues


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact(dtype):
    problem = symmetric(dtype)
    x, stats = Dense().solve(problem.matvec, problem.rhs)
    torch.testing.assert_close(flat(x), problem.solution(), rtol=1e-5, atol=1e-5)
    assert [(t.shape, t.dtype) for t in x] == [(t.shape, t.dtype) for t in problem.rhs]
    assert stats.matvecs == problem.products == len(flat(problem.rhs)) + 1
    assert (stats.converged, stats.stop_reason, stats.iterations) == (True, "converged", 0)
    assert stats.largest_eigenvalue == pytest.approx(1, rel=1e-5)
    assert not stats.negative_curvature


def test_ill_conditioned():
    operator, b = Operator(with_eigenvalues(torch.logspace(-6, 0, 70, dtype=torch.float64))), gaussian(70)
    x, stats = Dense(tol=1e-9).solve(operator, [b])
    exact = torch.linalg.solve(operator.matrix, b)
    assert stats.converged
    assert (x[0] - exact).norm() < 1e-6 * exact.norm()


def test_several_right_hand_sides_by_batched_products():
    operator, rhs = Operator(with_eigenvalues(torch.linspace(-1, 2, 70, dtype=torch.float64))), gaussian(3, 70)
    operator.__class__ = type("Batched", (Operator,), {"__call__": lambda self, v: pytest.fail("not batched")})
    rhs[1] = 0
    x, stats = Dense(damping=0.1).solve(operator, [rhs], batched=True)
    shifted = operator.matrix + 0.1 * torch.eye(70, dtype=torch.float64)
    torch.testing.assert_close(x[0], torch.linalg.solve(shifted, rhs.T).T)
    assert stats.matvecs == operator.products == 70 + 2
    assert stats.residuals[1] == 0
    assert stats.negative_curvature
    assert stats.largest_eigenvalue == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular(dtype):
    operator = Operator(with_eigenvalues(torch.cat([torch.zeros(5), torch.linspace(-1, 2, 20)]).double(), dtype))
    b = gaussian(25, dtype=dtype)
    shortest = torch.linalg.pinv(operator.matrix.double(), rtol=1e-4) @ b.double()
    x, stats = Dense().solve(operator, [b])
    torch.testing.assert_close(x[0].double(), shortest, rtol=1e-4, atol=1e-4)
    assert stats.stop_reason == "stagnated"
    assert stats.residual == pytest.approx(float((b - operator.matrix @ x[0]).norm() / b.norm()), rel=1e-4)
    x, stats = Dense().solve(operator, [operator.matrix @ b])
    assert stats.converged


def test_a_semidefinite_matrix_has_no_negative_curvature():
    operator = Operator(
        with_eigenvalues(torch.cat([torch.zeros(5), torch.linspace(0.1, 2, 20)]).double(), torch.float32)
    )
    assert not Dense().solve(operator, [gaussian(25, dtype=torch.float32)])[1].negative_curvature


def test_scalars_zeros_and_empty_tensors():
    x, stats = Dense().solve(lambda v: [4 * t for t in v], [torch.tensor(2.0), torch.zeros(0)])
    assert (x[0].item(), x[1].shape, stats.matvecs) == (0.5, (0,), 2)
    for b in (torch.zeros(3), torch.zeros(0)):
        x, stats = Dense().solve(lambda v: pytest.fail("no product is needed"), [b])
        assert (stats.stop_reason, stats.matvecs, stats.converged) == ("trivial", 0, True)
    x, stats = Dense().solve(lambda v: [0 * t for t in v], [torch.ones(3)])
    assert (stats.stop_reason, stats.residual) == ("stagnated", 1.0)


def test_half_precision():
    matrix = with_eigenvalues(torch.linspace(0.5, 1, 20, dtype=torch.float64), torch.bfloat16)
    x, stats = Dense(tol=0.02).solve(Operator(matrix), [gaussian(20, dtype=torch.bfloat16)])
    assert x[0].dtype == torch.bfloat16
    assert stats.converged


def test_refuses_what_is_too_large():
    with pytest.raises(ValueError, match=r"5001 x 5001 numbers \(0.2 GB\).*max_size is 5000.*MINRES"):
        Dense().solve(lambda v: v, [torch.ones(5000), torch.ones(())])
    x, _ = Dense(max_size=2).solve(lambda v: v, [torch.ones(2)])
    assert x[0].tolist() == [1.0, 1.0]
