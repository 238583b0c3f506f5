from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from auxfast.solvers import MINRES, Chebyshev, ConjugateGradient, Dense, InverseOperator

from .systems import SIZE, System, cut, flat, gaussian, with_eigenvalues


def system(dtype: torch.dtype = torch.float64) -> System:
    values = torch.logspace(0, 3, SIZE, dtype=torch.float64)
    return System(with_eigenvalues(values, dtype), cut(gaussian(SIZE, dtype=dtype)))


def inverse_of(matrix: Tensor) -> InverseOperator:
    inverse = torch.linalg.inv(matrix.double()).to(matrix.dtype)
    return InverseOperator(lambda vectors: cut(inverse @ flat(vectors)))


@pytest.mark.parametrize("solver", [ConjugateGradient, MINRES, Chebyshev])
def test_an_exact_inverse_leaves_nothing_to_do(solver):
    problem = system()
    damped = problem.matrix + 0.5 * torch.eye(SIZE)
    x, stats = solver(tol=1e-8, damping=0.5, preconditioner=inverse_of(damped)).solve(problem.matvec, problem.rhs)
    assert stats.converged
    assert solver is Chebyshev or stats.iterations <= 2
    torch.testing.assert_close(flat(x), torch.linalg.solve(damped, flat(problem.rhs)), rtol=1e-6, atol=1e-9)


def test_a_rough_inverse_changes_the_products_and_not_the_solution():
    problem = system()
    rough = inverse_of(problem.matrix + torch.eye(SIZE) + 0.1 * torch.diag(torch.arange(SIZE)))
    exact, _ = Dense().solve(problem.matvec, problem.rhs)
    plain = ConjugateGradient(tol=1e-9).solve(problem.matvec, problem.rhs)[1]
    x, stats = ConjugateGradient(tol=1e-9, preconditioner=rough).solve(problem.matvec, problem.rhs)
    torch.testing.assert_close(x, exact, rtol=1e-5, atol=1e-8)
    assert stats.matvecs < plain.matvecs / 2


def test_several_right_hand_sides_go_in_one_call_where_there_is_one():
    problem, calls = system(), []
    inverse = torch.linalg.inv(problem.matrix)

    class Inverse:
        def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
            calls.append(1)
            return cut(inverse @ flat(vectors))

        def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
            calls.append(len(vectors[0]))
            rows = torch.cat([v.reshape(len(v), -1) for v in vectors], dim=1) @ inverse
            return [torch.stack(parts) for parts in zip(*map(cut, rows), strict=True)]

    rhs = [torch.stack([b, -2 * b, b.flip(-1) if b.dim() else b]) for b in problem.rhs]
    x, stats = MINRES(tol=1e-8, preconditioner=InverseOperator(Inverse())).solve(problem.matvec, rhs, batched=True)
    assert stats.converged
    assert calls[0] == 3
    torch.testing.assert_close(flat([t[0] for t in x]), torch.linalg.solve(problem.matrix, flat(problem.rhs)))


@pytest.mark.parametrize("solver", [ConjugateGradient, MINRES])
@pytest.mark.parametrize("sign", [-1, "indefinite"])
def test_one_that_is_not_positive_definite_is_noticed(solver, sign):
    problem = system()
    diagonal = -torch.ones(SIZE) if sign == -1 else torch.ones(SIZE) - 2 * (torch.arange(SIZE) % 2)
    operator = InverseOperator(lambda vectors: cut(diagonal.double() * flat(vectors)))
    _, stats = solver(tol=1e-9, preconditioner=operator).solve(problem.matvec, problem.rhs)
    assert not stats.converged
    assert stats.stop_reason == "diverged"
    assert stats.residual <= 1


def test_low_precision_stays_that_of_the_parameters():
    problem, dtypes = system(torch.bfloat16), set()

    def operator(vectors):
        dtypes.update(v.dtype for v in vectors)
        return vectors

    _, stats = MINRES(steps=5, tol=None, preconditioner=InverseOperator(operator)).solve(problem.matvec, problem.rhs)
    assert stats.residual < 1
    assert dtypes == {torch.bfloat16}


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"must be a function of a list of tensors, not a Tensor: auxfast\.compat"):
        InverseOperator(torch.eye(3))
    with pytest.raises(TypeError, match=r"write InverseOperator\(\.\.\.\)"):
        MINRES(preconditioner=InverseOperator)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda vectors: vectors[:2], "the InverseOperator returned 2 tensors for 5 parameters"),
        (lambda vectors: [v.float() for v in vectors], r"the InverseOperator returned torch\.float32 \(4, 3\)"),
    ],
)
def test_other_shapes_and_dtypes_are_named(operator, message):
    problem = system()
    with pytest.raises(RuntimeError, match=message):
        MINRES(preconditioner=InverseOperator(operator)).solve(problem.matvec, problem.rhs)
