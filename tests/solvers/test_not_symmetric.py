"""Matrices that are not symmetric, and say so: which solvers solve them, and that the others refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from auxfast.solvers import (
    GMRES,
    MINRES,
    Chebyshev,
    ConjugateGradient,
    Dense,
    GradientFlow,
    Identity,
    LinearOperator,
    Neumann,
    NormalEquations,
    Nystrom,
    SolverState,
)

from .systems import Operator, gaussian, with_eigenvalues

SIZE = 40


@dataclass
class General(Operator):
    """`v -> matrix v` for any square matrix; `transposed_products` counts the vectors that its transpose multiplied."""

    symmetric: bool = False
    transposed_products: int = 0

    def transposed(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        self.transposed_products += 1
        return [self.matrix.T @ vectors[0]]


def skew(seed: int = 0) -> Tensor:
    part = gaussian(SIZE, SIZE, seed=seed)
    return (part - part.T) / (part - part.T).norm()


def rotation() -> Tensor:
    """Turns planes by angles from 0.1 to 3, in a random basis."""
    angles = torch.linspace(0.1, 3, SIZE // 2, dtype=torch.float64)
    blocks = [torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()]).reshape(2, 2) for a in angles]
    basis = torch.linalg.qr(gaussian(SIZE, SIZE))[0]
    return basis @ torch.block_diag(*blocks) @ basis.T


EYE = torch.eye(SIZE, dtype=torch.float64)
MATRICES = {
    "random": 2 * EYE + gaussian(SIZE, SIZE) / SIZE**0.5,
    "skew and more": EYE + 10 * skew(),
    "skew": 10 * skew(),
    "rotation": rotation(),
    "permutation": EYE.roll(1, 0),
    "triangular": (EYE + gaussian(SIZE, SIZE).triu() / SIZE).contiguous(),
    "defective": EYE + torch.diag(torch.ones(SIZE - 1).double(), 1),
    "negative": -2 * EYE + gaussian(SIZE, SIZE) / SIZE**0.5,
    "near singular": with_eigenvalues(torch.logspace(-4, 0, SIZE, dtype=torch.float64)) + 0.01 * EYE.roll(1, 0),
    "symmetric": with_eigenvalues(torch.linspace(-0.49, 1, SIZE, dtype=torch.float64)),
}
SOLVERS = {
    "GMRES": GMRES(tol=1e-9, restart=SIZE),
    "GMRES, restarted": GMRES(200, 10, tol=1e-9),
    "NormalEquations": NormalEquations(1000, tol=1e-9),
    "Dense": Dense(tol=1e-9),
}
matrices = pytest.mark.parametrize("name", MATRICES)
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
krylov = pytest.mark.parametrize("solver", [GMRES(), NormalEquations()], ids=["GMRES", "NormalEquations"])


def true_residual(matrix: Tensor, x: Tensor, b: Tensor) -> float:
    matrix, x, b = matrix.double(), x.double(), b.double()
    return float((b - matrix @ x).norm() / b.norm())


@solvers
@matrices
def test_any_matrix_is_solved(solver, name, check_every, device):
    """All but restarted GMRES, which may stagnate, solve all of them; and all residuals are true."""
    operator, b = General(MATRICES[name].to(device)), gaussian(SIZE).to(device)
    (x,), stats = solver.solve(operator, [b])
    assert stats.residual == pytest.approx(true_residual(operator.matrix, x, b), rel=1e-3, abs=1e-13)
    assert stats.matvecs == operator.products + operator.transposed_products
    assert stats.symmetry_error is None
    if solver.tol and not (isinstance(solver, GMRES) and solver.restart < SIZE):
        assert (stats.converged, stats.stop_reason) == (True, "converged")
        wanted = torch.linalg.solve(operator.matrix, b)
        torch.testing.assert_close(x, wanted, rtol=0, atol=1e-5 * float(wanted.norm()))
    else:
        assert stats.residual <= 1
        assert stats.stop_reason in ("converged", "steps", "stagnated")


@solvers
@matrices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_are_solved_to_their_precision(solver, name, dtype):
    operator, b = General(MATRICES[name].to(dtype)), gaussian(SIZE, dtype=dtype)
    (x,), stats = replace(solver, tol=None).solve(operator, [b])
    eps = torch.finfo(dtype).eps
    assert x.dtype == dtype
    size = operator.matrix.double().norm() * x.double().norm() / b.double().norm()
    assert stats.residual == pytest.approx(true_residual(operator.matrix, x, b), abs=float(eps * size), rel=0.01)
    assert stats.residual <= 1
    if name in ("random", "negative", "triangular"):
        assert stats.residual <= 5 * eps


@solvers
@matrices
def test_damping_is_a_shift_of_the_matrix(solver, name):
    b = gaussian(SIZE)
    (x,), stats = replace(solver, damping=3.5).solve(General(MATRICES[name]), [b])
    assert stats.residual == pytest.approx(true_residual(MATRICES[name] + 3.5 * EYE, x, b), rel=1e-3, abs=1e-13)
    assert stats.converged


@solvers
@pytest.mark.parametrize("plain", [False, True], ids=["batched", "plain"])
def test_batched_is_one_at_a_time(solver, plain, check_every):
    """Right-hand sides of very different difficulty, one of zeros, have the solutions that each has alone."""
    matrix = torch.block_diag(EYE[:10, :10].roll(1, 0), 2 * EYE[:10, :10], MATRICES["random"][:20, :20])
    operator = General(matrix)
    b = torch.zeros(4, SIZE, dtype=torch.float64)
    b[0, :10], b[1, 10:20], b[3] = gaussian(10), 1, 1e3 * gaussian(SIZE)
    (x,), stats = solver.solve(_Plain(operator) if plain else operator, [b], batched=True)
    assert stats.matvecs == operator.products + operator.transposed_products
    for row, solution, residual in zip(b, x, stats.residuals, strict=True):
        (alone,), one = solver.solve(operator, [row])
        torch.testing.assert_close(solution, alone, rtol=1e-7, atol=1e-7)
        assert residual == pytest.approx(one.residual, rel=1e-3, abs=1e-9)
    assert (stats.residuals[2], bool(x[2].any())) == (0, False)


class _Plain:
    """A matvec without batched products."""

    symmetric = False

    def __init__(self, operator: General) -> None:
        self._operator = operator

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._operator(vectors)

    def transposed(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._operator.transposed(vectors)


def test_rows_that_are_done_take_no_more_products():
    operator = General(torch.diag(torch.linspace(1, 2, SIZE, dtype=torch.float64)))
    b = torch.zeros(2, SIZE, dtype=torch.float64)
    b[0, 0], b[1] = 1, 1
    _, stats = GMRES(tol=1e-9).solve(operator, [b], batched=True)
    assert stats.matvecs == 1 + stats.iterations + 2  # the first has one step, and each its residual


@krylov
def test_a_solve_takes_its_steps_and_one_product(solver):
    operator = General(MATRICES["random"])
    _, stats = replace(solver, steps=6, tol=1e-12).solve(operator, [gaussian(SIZE)])
    each = 2 if isinstance(solver, NormalEquations) else 1
    assert (stats.iterations, stats.matvecs, stats.stop_reason) == (6, 6 * each + 1, "steps")
    if each == 1:
        _, stats = GMRES(20, 5, tol=1e-12).solve(operator, [gaussian(SIZE)])
        assert (stats.iterations, stats.matvecs) == (20, 21)  # restarts included


def test_gmres_is_minres_on_a_symmetric_matrix():
    operator, b = Operator(MATRICES["symmetric"]), gaussian(SIZE)
    for steps in (1, 5, 15):
        (x,), stats = GMRES(steps, tol=1e-12).solve(operator, [b])
        (wanted,), of_minres = MINRES(steps, tol=1e-12).solve(operator, [b])
        torch.testing.assert_close(x, wanted)
        assert stats.residual == pytest.approx(of_minres.residual)


def test_gmres_says_where_a_restart_comes_too_early():
    operator, b = General(MATRICES["permutation"]), EYE[0].clone()
    _, stats = GMRES(restart=10).solve(operator, [b])
    assert (stats.stop_reason, stats.residual, stats.iterations) == ("stagnated", 1, 10)
    _, stats = GMRES(restart=SIZE).solve(operator, [b])
    assert stats.converged


@solvers
def test_a_singular_system_has_the_solution_of_the_smallest_residual(solver):
    """It is a solution in the range of the matrix; outside it is no longer than the smallest residual asks for."""
    matrix = gaussian(SIZE, 30, seed=7) @ gaussian(30, SIZE, seed=8)
    inverse = torch.linalg.pinv(matrix, rtol=1e-10)
    _, stats = solver.solve(General(matrix), [matrix @ gaussian(SIZE)])
    if isinstance(solver, GMRES) and solver.restart < SIZE:
        assert stats.residual < 0.9
    else:
        assert stats.converged
    b = gaussian(SIZE)
    least = float((b - matrix @ (inverse @ b)).norm() / b.norm())
    (x,), stats = solver.solve(General(matrix), [b])
    assert not stats.converged
    assert x.norm() < 100 * (inverse @ b).norm()
    if isinstance(solver, (NormalEquations, Dense)):
        assert stats.stop_reason == "stagnated"
        assert stats.residual == pytest.approx(least, rel=1e-6)
        torch.testing.assert_close(x, inverse @ b)  # the shortest


@krylov
def test_a_matrix_of_zeros_leaves_everything(solver):
    (x,), stats = solver.solve(General(0 * EYE), [gaussian(SIZE)])
    assert (stats.residual, stats.stop_reason, bool(x.any())) == (1, "stagnated", False)


@krylov
def test_warm_start_begins_at_the_solution_in_the_state(solver):
    solver, state = replace(solver, warm_start=True, tol=1e-4), SolverState()
    operator, b = General(MATRICES["random"]), gaussian(SIZE)
    _, first = solver.solve(operator, [b], state=state)
    _, again = solver.solve(operator, [b], state=state)
    assert (again.iterations, again.matvecs, again.converged) == (0, 1, True)
    _, near = solver.solve(operator, [b + 1e-3 * gaussian(SIZE, seed=9)], state=state)
    assert near.converged
    assert near.matvecs < first.matvecs


SYMMETRIC_ALONE = [
    MINRES(),
    ConjugateGradient(),
    Chebyshev(),
    Neumann(3, 0.1),
    Neumann(3, 0.1, certify=False),
    Neumann(),
    Nystrom(5),
    GradientFlow(1.0),
]


@pytest.mark.parametrize("solver", SYMMETRIC_ALONE, ids=repr)
def test_solvers_of_symmetric_systems_refuse_others_by_name(solver):
    with pytest.raises(ValueError, match=rf"{type(solver).__name__} solves symmetric systems alone: take GMRES\(\)"):
        solver.solve(General(MATRICES["random"]), [gaussian(SIZE)])


def test_identity_takes_any_matrix():
    operator, b = General(MATRICES["random"]), gaussian(SIZE)
    (x,), stats = Identity(0.5).solve(operator, [b])
    assert torch.equal(x, b / 2)
    assert stats.residual == pytest.approx(true_residual(operator.matrix, x, b))


def test_normal_equations_need_the_transpose_where_it_is_another_matrix():
    operator = General(MATRICES["random"])

    class Without:
        symmetric = False

        def __call__(self, vectors):
            return operator(vectors)

    with pytest.raises(TypeError, match=r"matvec.transposed\(vectors\).*or take GMRES\(\)"):
        NormalEquations().solve(Without(), [gaussian(SIZE)])
    assert operator.products == 0
    _, stats = NormalEquations(500, tol=1e-9).solve(Operator(MATRICES["symmetric"]), [gaussian(SIZE)])
    assert stats.converged


def test_a_transpose_that_multiplies_several_vectors_is_asked_to():
    operator = General(MATRICES["random"])
    transpose = Operator(operator.matrix.T.contiguous())

    class Both(Operator):
        symmetric = False
        transposed = transpose

    assert isinstance(transpose, LinearOperator)
    batches = []
    original = transpose.batched
    transpose.batched = lambda v: (batches.append(len(v[0])), original(v))[1]
    _, stats = NormalEquations().solve(Both(operator.matrix), [gaussian(3, SIZE)], batched=True)
    assert stats.converged
    assert batches[0] == 3


@pytest.mark.parametrize("solver", [GMRES(), NormalEquations()], ids=["GMRES", "NormalEquations"])
def test_wrong_products_of_the_transpose_are_refused(solver):
    class Wrong(General):
        def transposed(self, vectors):
            return [vectors[0][:3]]

    if isinstance(solver, NormalEquations):
        with pytest.raises(RuntimeError, match="for tensor 0"):
            solver.solve(Wrong(MATRICES["random"]), [gaussian(SIZE)])
    else:
        assert solver.solve(Wrong(MATRICES["random"]), [gaussian(SIZE)])[1].converged


@krylov
@pytest.mark.parametrize("seed", range(3))
def test_random_matrices_of_any_size_are_solved(solver, seed):
    for size in (1, 2, 3, 17):
        matrix, b = gaussian(size, size, seed=seed) + 2 * torch.eye(size), gaussian(size, seed=seed + 5)
        (x,), stats = replace(solver, tol=1e-9, steps=300).solve(General(matrix), [b])
        assert stats.converged
        torch.testing.assert_close(matrix @ x, b, rtol=1e-7, atol=1e-7)
