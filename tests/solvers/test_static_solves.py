"""Static solves, in which nothing depends on a number that the host has read, are the eager ones up to rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from auxfast.solvers import DEFAULT_SOLVER, GMRES, MINRES, Chebyshev, ConjugateGradient, Jacobi, Neumann, SolverState
from auxfast.solvers.static_solve import StaticSolve
from auxfast.solvers.static_solvers import static_solve

SHAPES = [(3, 2), (5,), (0,), ()]
SIZE = 12


def cut(row: Tensor) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [piece.view(shape) for piece, shape in zip(row.split(sizes), SHAPES, strict=True)]


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    return q @ torch.diag(values) @ q.T


def products(h: Tensor):
    return lambda vectors: cut((h @ joined(vectors).to(h.dtype)).to(vectors[0].dtype))


def run(solve: StaticSolve, h: Tensor, b: Tensor):
    """The solution, and what is said of it."""
    solve.begin(products(h), cut(b))
    taken = 0
    for count in solve.chunks:
        solve.steps(count)
        taken += count
    x, numbers = solve.end()
    return joined(x), solve.stats(numbers.numpy(), taken)


def assert_equal(solver, h: Tensor, b: Tensor, rtol: float = 1e-10) -> None:
    x, stats = run(static_solve(solver), h, b)
    wanted, eager = solver.solve(products(h), cut(b))
    torch.testing.assert_close(x, joined(wanted), rtol=rtol, atol=rtol * float(joined(wanted).abs().max()))
    facts = [(s.iterations, s.stop_reason, s.converged, s.negative_curvature, s.step_size) for s in (stats, eager)]
    assert facts[0] == facts[1]
    assert stats.residual == pytest.approx(eager.residual, rel=rtol, abs=1e-14, nan_ok=True)
    largest, wanted_largest = (
        math.nan if s.largest_eigenvalue is None else s.largest_eigenvalue for s in (stats, eager)
    )
    assert largest == pytest.approx(wanted_largest, rel=1e-6, nan_ok=True)


def draw(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SPECTRA = {
    "positive": torch.linspace(0.1, 2, SIZE, dtype=torch.float64),
    "indefinite": torch.linspace(-0.5, 2, SIZE, dtype=torch.float64),
    "singular": torch.linspace(0.1, 2, SIZE, dtype=torch.float64).floor(),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(
    "solver",
    [
        Neumann(8, 0.3),
        Neumann(8, 1.3, damping=0.4),
        Neumann(8, 30.0),
        Neumann(5, 0.3, certify=False),
        Neumann(5, 3.0, certify=False),
        ConjugateGradient(6, tol=None),
        ConjugateGradient(40, tol=1e-3, damping=0.2),
        MINRES(6, tol=None),
        MINRES(40, tol=1e-2),
        DEFAULT_SOLVER,
    ],
    ids=repr,
)
def test_the_solution_and_what_is_said_of_it(solver, name):
    for seed in range(3):
        assert_equal(solver, matrix(SPECTRA[name], seed), 10.0 ** (3 * seed) * draw(seed), rtol=1e-8)


@pytest.mark.parametrize("grows_after", range(7))
def test_growth_cuts_a_series_where_the_eager_one_is_cut(grows_after):
    """A part of b along a direction that grows by 3 a step, as large as makes the norm of everything grow from that
    step on: within the steps, at the last, which the closing product shows alone, and after them."""
    values = torch.full((SIZE,), 0.5, dtype=torch.float64)
    values[0] = 4.0  # |1 - 4| = 3, where the others shrink by 2
    b = torch.ones(SIZE, dtype=torch.float64)
    b[0] = 1e-3 if grows_after == 6 else 2.0 * 6.0**-grows_after
    for h, start in ((torch.diag(values), b), (torch.diag(-values), b)):
        assert_equal(Neumann(4, 1.0), h, start)
        assert_equal(Neumann(4, 0.5, damping=0.5), 2 * h, start)


def test_zero_is_solved_at_once():
    h, b = matrix(SPECTRA["positive"]), torch.zeros(SIZE, dtype=torch.float64)
    for solver in (Neumann(3, 0.3), Neumann(3, 0.3, certify=False), ConjugateGradient(3), MINRES(3)):
        assert_equal(solver, h, b)


def test_what_is_not_finite_is_nan_and_never_zero():
    h, b = matrix(SPECTRA["positive"]), draw(0)
    broken = torch.full_like(h, math.nan)
    for solver in (Neumann(3, 0.3), Neumann(3, 0.3, certify=False), ConjugateGradient(3), MINRES(3), DEFAULT_SOLVER):
        x, stats = run(static_solve(solver), broken, b)
        assert x.isnan().all()
        assert stats.stop_reason == "not finite"
        x, _ = run(static_solve(solver), h, b.index_fill(0, torch.tensor([4]), math.inf))
        assert x.isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_right_hand_sides_keep_their_range(scale):
    h, b = matrix(SPECTRA["positive"]).float(), scale * draw(1).float()
    for solver in (Neumann(20, 0.5), MINRES(20), ConjugateGradient(20)):
        x, stats = run(static_solve(solver), h, b)
        left = (b / scale - h @ (x / scale)).norm() / (b / scale).norm()
        assert stats.residual == pytest.approx(float(left), rel=0.05)


def test_bfloat16_is_solved_in_float32_and_certified_as_rounded():
    h, b = matrix(SPECTRA["positive"]), draw(1).bfloat16()
    for solver in (Neumann(20, 0.5), MINRES(20)):
        x, stats = run(static_solve(solver), h, b)
        assert x.dtype == torch.bfloat16
        left = (b.double() - (h @ x.double()).bfloat16().double()).norm() / b.double().norm()
        assert stats.residual == pytest.approx(float(left), rel=0.01)


@pytest.mark.parametrize("solver", [DEFAULT_SOLVER, ConjugateGradient(4, tol=1e-9, warm_start=True)], ids=repr)
def test_warm_starts_go_from_solve_to_solve(solver):
    solve, state = static_solve(solver), SolverState()
    h = matrix(SPECTRA["positive"])
    for b in (draw(0), draw(0), 2 * draw(0), torch.zeros(SIZE, dtype=torch.float64), draw(1)):
        x, stats = run(solve, h, b)
        wanted, eager = solver.solve(products(h), cut(b), state=state)
        torch.testing.assert_close(x, joined(wanted), rtol=1e-8, atol=1e-10)
        assert (stats.iterations, stats.stop_reason) == (eager.iterations, eager.stop_reason)
    solve.reset()
    torch.testing.assert_close(run(solve, h, b)[0], joined(solver.solve(products(h), cut(b))[0]))


def test_a_chunk_may_run_again_from_the_memory_of_the_one_before():
    """As a graph of it would: what later chunks read is where the first has found it."""
    solve = static_solve(MINRES(24, tol=1e-12))
    assert solve.chunks == (8, 8, 8)
    solve.begin(products(matrix(SPECTRA["positive"])), cut(draw(0)))
    recurrence = solve._recurrence
    names = ("x", "w", "w_old", "u", "u_old", "r", "direction", "numbers")
    before = [getattr(recurrence, name).data_ptr() for name in names]
    solve.steps(8)
    assert [getattr(recurrence, name).data_ptr() for name in names] == before
    assert len(set(before)) == len(before)


@pytest.mark.parametrize(
    ("solver", "error"),
    [
        (Neumann(), ValueError),
        (Neumann(5, 0.1, tol=1e-3), ValueError),
        (Neumann(5, 0.1, warm_start=True), ValueError),
        (MINRES(preconditioner=Jacobi()), ValueError),
        (Chebyshev(), TypeError),
        (GMRES(), TypeError),
    ],
    ids=repr,
)
def test_other_solvers_are_refused_by_name(solver, error):
    with pytest.raises(error, match=type(solver).__name__):
        static_solve(solver)
