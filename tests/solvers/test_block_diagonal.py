"""Several problems at once: each is solved as it would be alone, with its own certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from auxfast.solvers import (
    GMRES,
    MINRES,
    BlockDiagonal,
    Chebyshev,
    ConjugateGradient,
    Dense,
    GradientFlow,
    Identity,
    Jacobi,
    Neumann,
    NormalEquations,
    Nystrom,
    SolverState,
)

from .systems import Operator, gaussian, with_eigenvalues

PROBLEMS, SIZE = 4, 12
BY_ROWS = {
    "MINRES": MINRES(tol=1e-6),
    "ConjugateGradient": ConjugateGradient(tol=1e-6),
    "GMRES": GMRES(tol=1e-6),
    "NormalEquations": NormalEquations(300, tol=1e-6),
    "Neumann": Neumann(200, 0.5, tol=1e-6),
    "Neumann, not certified": Neumann(20, 0.5, certify=False),
    "Chebyshev": Chebyshev(200, (0.05, 4.0), tol=1e-6),
    "Identity": Identity(0.3),
}
by_rows = pytest.mark.parametrize("solver", BY_ROWS.values(), ids=BY_ROWS.keys())


def matrices(dtype: torch.dtype = torch.float64) -> Tensor:
    """(PROBLEMS, SIZE, SIZE), symmetric, of condition numbers 1 to 40."""
    lowest = torch.tensor([3.0, 1.0, 0.3, 0.1]).double()
    spectra = [torch.linspace(float(low), 3, SIZE, dtype=torch.float64) for low in lowest]
    return torch.stack([with_eigenvalues(values, seed=i) for i, values in enumerate(spectra)]).to(dtype)


class Blocks:
    """A block diagonal matrix on two tensors, (PROBLEMS, 2, 4) and (PROBLEMS, 4)."""

    def __init__(self, matrices: Tensor, coupling: float = 0.0) -> None:
        self.matrices, self.coupling = matrices, coupling
        self.products = 0
        self.symmetric = bool(torch.equal(matrices, matrices.mT))

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._product(self.matrices, vectors)

    def transposed(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._product(self.matrices.mT, vectors)

    def _product(self, matrices: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
        self.products += 1
        v = joined(vectors)
        return cut((matrices @ v[..., None])[..., 0] + self.coupling * v.mean(dim=0))


class BatchedBlocks(Blocks):
    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack([*tensors]) for tensors in zip(*map(self, zip(*vectors, strict=True)), strict=True)]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """(.., PROBLEMS, SIZE)"""
    return torch.cat([tensors[0].flatten(-2), tensors[1]], dim=-1)


def cut(rows: Tensor) -> list[Tensor]:
    return [rows[..., :8].reshape(*rows.shape[:-1], 2, 4), rows[..., 8:]]


def right_hand_sides(*lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(.., PROBLEMS, SIZE), of very different sizes."""
    return (gaussian(*lead, PROBLEMS, SIZE) * torch.logspace(0, 3, PROBLEMS, dtype=torch.float64)[:, None]).to(dtype)


@by_rows
def test_each_problem_is_solved_as_it_is_alone(solver, check_every, device):
    blocks, b = Blocks(matrices().to(device)), right_hand_sides().to(device)
    x, stats = BlockDiagonal(solver).solve(blocks, cut(b))
    assert stats.matvecs == blocks.products
    for i, solution in enumerate(joined(x)):
        (alone,), one = solver.solve(Operator(blocks.matrices[i]), [b[i]])
        torch.testing.assert_close(solution, alone, rtol=1e-10, atol=1e-10 * float(alone.norm()))
        assert stats.residuals[i] == pytest.approx(one.residual, rel=1e-6, abs=1e-9, nan_ok=True)
    assert stats.residual == pytest.approx(max(stats.residuals), nan_ok=True)


@pytest.mark.parametrize("solver", [Neumann(200, tol=1e-6), Chebyshev(200, tol=1e-6)], ids=["Neumann", "Chebyshev"])
def test_estimated_eigenvalues_serve_all_problems(solver):
    blocks, b, state = Blocks(matrices()), right_hand_sides(), SolverState()
    for _ in range(2):
        x, stats = BlockDiagonal(solver).solve(blocks, cut(b), state=state)
        assert stats.converged
        torch.testing.assert_close(joined(x), torch.linalg.solve(blocks.matrices, b), rtol=1e-4, atol=1e-2)


@by_rows
@pytest.mark.parametrize("kind", [Blocks, BatchedBlocks])
def test_several_right_hand_sides_of_each_problem(solver, kind):
    blocks, b = kind(matrices()), right_hand_sides(3)
    x, stats = BlockDiagonal(solver).solve(blocks, cut(b), batched=True)
    assert stats.matvecs == blocks.products
    assert len(stats.residuals) == 3 * PROBLEMS
    for i, each in enumerate(b):
        alone, one = BlockDiagonal(solver).solve(Blocks(matrices()), cut(each))
        torch.testing.assert_close(joined(x)[i], joined(alone), rtol=1e-10, atol=1e-8)
        here = stats.residuals[i * PROBLEMS : (i + 1) * PROBLEMS]
        assert here == pytest.approx(one.residuals, rel=1e-6, abs=1e-10, nan_ok=True)


def test_problems_need_fewer_products_than_one_system_of_all():
    blocks, b = Blocks(matrices()), cut(right_hand_sides() / torch.logspace(0, 3, PROBLEMS).double()[:, None])
    together, apart = (s.solve(blocks, b)[1] for s in (MINRES(tol=1e-8), BlockDiagonal(MINRES(tol=1e-8))))
    assert together.converged
    assert apart.converged
    assert apart.matvecs <= SIZE + 1 + 2
    assert together.matvecs > 1.5 * apart.matvecs


@pytest.mark.parametrize("solver", [GMRES(tol=1e-9), NormalEquations(tol=1e-9)], ids=["GMRES", "NormalEquations"])
def test_problems_need_not_be_symmetric(solver):
    given = matrices() + 0.3 * gaussian(PROBLEMS, SIZE, SIZE)
    blocks, b = Blocks(given), right_hand_sides()
    x, stats = BlockDiagonal(solver).solve(blocks, cut(b))
    assert stats.converged
    assert stats.matvecs == blocks.products
    torch.testing.assert_close(joined(x), torch.linalg.solve(given, b), rtol=1e-6, atol=1e-5)
    with pytest.raises(ValueError, match="MINRES solves symmetric systems alone"):
        BlockDiagonal().solve(blocks, cut(b))


@pytest.mark.parametrize("solver", [MINRES(), ConjugateGradient(), Neumann(), Chebyshev()], ids=repr)
def test_a_block_that_is_not_symmetric_is_told(solver):
    given = matrices()
    given[2] += 2 * (gaussian(SIZE, SIZE).triu() - gaussian(SIZE, SIZE).triu().T)
    blocks, b = Blocks(given), right_hand_sides() / torch.logspace(0, 3, PROBLEMS).double()[:, None]
    b[2] *= 10  # the products that confirm it are of the longest
    blocks.symmetric = True
    _, stats = BlockDiagonal(solver).solve(blocks, cut(b))
    assert stats.stop_reason == "not symmetric"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_are_solved_to_their_precision(dtype):
    b = cut(right_hand_sides(dtype=dtype))
    x, stats = BlockDiagonal(MINRES(tol=None)).solve(Blocks(matrices(dtype)), b)
    assert [(t.shape, t.dtype) for t in x] == [(t.shape, t.dtype) for t in b]
    assert max(stats.residuals) <= 100 * torch.finfo(dtype).eps


def test_a_problem_without_a_right_hand_side_has_the_zero_solution():
    b = right_hand_sides()
    b[1] = 0
    x, stats = BlockDiagonal().solve(Blocks(matrices()), cut(b))
    assert (stats.residuals[1], bool(joined(x)[1].any()), stats.converged) == (0, False, True)
    _, stats = BlockDiagonal().solve(Blocks(matrices()), cut(0 * b))
    assert (stats.stop_reason, stats.matvecs) == ("trivial", 0)


@pytest.mark.parametrize("first", [1, 2, 3, 5, 9])
def test_one_problem_that_is_not_finite_spoils_no_other(first):
    blocks, b = Blocks(matrices()), right_hand_sides()

    def matvec(vectors: Sequence[Tensor]) -> list[Tensor]:
        product = blocks(vectors)
        if blocks.products >= first:
            product[1][3] = torch.nan
        return product

    x, stats = BlockDiagonal(MINRES(tol=1e-6)).solve(matvec, cut(b))
    assert max(stats.residuals[:3]) <= 1e-6
    assert stats.stop_reason in ("diverged", "not finite")
    assert not stats.converged
    assert all(bool(t.isfinite().all()) for t in x)


def test_one_problem_alone_is_a_problem():
    x, stats = BlockDiagonal(MINRES(tol=1e-9)).solve(Blocks(matrices()[:1]), cut(right_hand_sides()[:1]))
    torch.testing.assert_close(joined(x)[0], torch.linalg.solve(matrices()[0], right_hand_sides()[0]))
    assert len(stats.residuals) == 1


def test_warm_start_begins_at_the_solutions_in_the_state():
    blocks, b, state = Blocks(matrices()), right_hand_sides(2), SolverState()
    solver = BlockDiagonal(MINRES(tol=1e-6, warm_start=True))
    for rhs, batched in ((b[0], False), (b, True)):
        solver.solve(blocks, cut(rhs), batched=batched, state=state)
        before = blocks.products
        _, again = solver.solve(blocks, cut(rhs), batched=batched, state=state)
        assert (again.iterations, again.converged) == (0, True)
        assert blocks.products - before == again.matvecs == 1 + batched


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("coupling", [1.0, 1e-4])
@pytest.mark.parametrize("batched", [False, True])
def test_problems_that_depend_on_each_other_are_refused(coupling, batched):
    b = right_hand_sides(2) if batched else right_hand_sides()
    with pytest.raises(ValueError, match="the 4 problems of BlockDiagonal depend on each other"):
        BlockDiagonal().solve(Blocks(matrices(), coupling), cut(b), batched=batched)


@pytest.mark.parametrize("pair", [(0, 1), (2, 0), (3, 1)])
def test_a_dependence_of_two_problems_alone_is_seen(pair):
    blocks, (i, j) = Blocks(matrices()), pair

    def matvec(vectors: Sequence[Tensor]) -> list[Tensor]:
        product = joined(blocks(vectors))
        v = joined(vectors)
        product[i] += 0.1 * v[j]
        product[j] += 0.1 * v[i]
        return cut(product)

    with pytest.raises(ValueError, match="depend on each other"):
        BlockDiagonal().solve(matvec, cut(right_hand_sides()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1, 8, 31, 32, 33, 64])
def test_a_dependence_is_seen_among_many_problems(distance, dtype):
    """Powers of two are fewer than 70, most of all in float16."""

    def matvec(vectors: Sequence[Tensor]) -> list[Tensor]:
        product = 2 * vectors[0]
        product[0] += vectors[0][distance]
        product[distance] += vectors[0][0]
        return [product]

    with pytest.raises(ValueError, match="the 70 problems of BlockDiagonal depend on each other"):
        BlockDiagonal().solve(matvec, [gaussian(70, 3, dtype=dtype)])


def test_dependence_is_looked_for_once_for_a_state():
    blocks, b, state = Blocks(matrices()), right_hand_sides(), SolverState()
    first, second, stateless = (BlockDiagonal().solve(blocks, cut(b), state=given)[1] for given in (state, state, None))
    assert first.matvecs == stateless.matvecs == second.matvecs + 2


def test_parameters_without_a_common_first_axis_are_refused():
    for b in ([torch.ones(4, 2), torch.ones(3)], [torch.ones(4), torch.ones(())], [torch.ones(0, 3)]):
        with pytest.raises(ValueError, match="the same number of problems as their first axis, got shapes"):
            BlockDiagonal().solve(list, b)
    with pytest.raises(ValueError, match=r"first axis, got shapes \(4,\), \(3,\)"):
        BlockDiagonal().solve(list, [torch.ones(2, 4), torch.ones(2, 3)], batched=True)


@pytest.mark.parametrize("solver", [Dense(), Nystrom(), GradientFlow(1.0), BlockDiagonal()], ids=repr)
def test_solvers_that_take_one_matrix_for_all_are_refused(solver):
    with pytest.raises(TypeError, match=r"solver must be one of MINRES, .*, which solve each problem by itself"):
        BlockDiagonal(solver)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="solver must have preconditioner=None"):
        BlockDiagonal(MINRES(preconditioner=Jacobi()))
    with pytest.raises(TypeError, match=r"write MINRES\(\)"):
        BlockDiagonal(MINRES)
    assert BlockDiagonal(MINRES(tol=1e-5)).tol == 1e-5
    assert BlockDiagonal(Identity()).tol is None
    assert replace(BlockDiagonal()) == BlockDiagonal(MINRES())
