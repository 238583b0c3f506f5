"""Random problems, of any dtype, scale and spectrum, for random settings of every solver: what is said of a solution is
true of it, by dense algebra in float64."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from auxfast.solvers import (
    MINRES,
    Chebyshev,
    ConjugateGradient,
    Dense,
    Identity,
    Jacobi,
    Neumann,
    Nystrom,
    Solver,
    SolverState,
    SolveStats,
)

from .systems import Operator

PROBLEMS_A_TEST = 50
TESTS = 38
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def symmetric_matrix(draw: random.Random, dtype: torch.dtype) -> Tensor:
    """(n, n), symmetric to the last bit; definite or not, singular or not, of a condition up to 1e12."""
    size = draw.choice([1, 2, 3, 4, 6, 9, 17])
    generator = torch.Generator().manual_seed(draw.randrange(2**60))
    values = 10 ** (-draw.uniform(0, 12) * torch.rand(size, generator=generator, dtype=torch.float64))
    kind = draw.choice(["definite", "indefinite", "singular", "clustered", "negative"])
    if kind == "indefinite":
        values *= torch.randn(size, generator=generator, dtype=torch.float64).sign()
    elif kind == "singular":
        values[: (size + 1) // 2] = 0
    elif kind == "clustered":
        values = torch.where(torch.rand(size, generator=generator) < 0.5, 1.0, float(values[0])).double()
    elif kind == "negative":
        values = -values
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    if draw.random() < 0.2:
        basis = torch.eye(size, dtype=torch.float64)
    matrix = (basis @ torch.diag(values) @ basis.T).to(dtype)
    return matrix.triu() + matrix.triu(1).T


def right_hand_sides(draw: random.Random, matrix: Tensor, rows: int) -> Tensor:
    """(rows, n): random, sparse, in the range of the matrix, an eigenvector, or zero."""
    generator = torch.Generator().manual_seed(draw.randrange(2**60))
    b = torch.randn(rows, len(matrix), generator=generator, dtype=torch.float64)
    for row in b:
        kind = draw.choice(["random", "random", "sparse", "in the range", "eigenvector", "zero"])
        if kind == "sparse":
            row *= torch.rand(len(row), generator=generator) < 0.3
        elif kind == "in the range":
            row.copy_(matrix.double() @ row)
        elif kind == "eigenvector":
            row.copy_(torch.linalg.eigh(matrix.double())[1][:, draw.randrange(len(row))])
        elif kind == "zero" and rows > 1:
            row.zero_()
    return b.to(matrix.dtype)


def solver_of(draw: random.Random, largest: float) -> Solver:
    """Random settings, for a matrix whose largest eigenvalue is about `largest`."""
    steps, tol = draw.choice([1, 2, 5, 20, 60]), draw.choice([None, 0.3, 1e-2, 1e-3, 1e-6, 1e-10])
    damping = draw.choice([0.0, 0.0, 0.0, 1e-3, 0.1, 10.0]) * largest
    common = {"damping": damping, "warm_start": draw.random() < 0.3}
    preconditioner = draw.choice([None, None, None, Jacobi(probes=4), Nystrom(3)])
    step_size = draw.choice([0.1, 0.9, 1.9, 2.1, 5.0, 1e3, 1e-6]) / (largest + damping)
    kind = draw.choice(
        ["minres", "minres", "cg", "neumann", "auto", "plain", "chebyshev", "bounds", *("nystrom", "dense")]
    )
    if kind in ("minres", "cg"):
        return (MINRES if kind == "minres" else ConjugateGradient)(steps, tol, preconditioner=preconditioner, **common)
    if kind in ("neumann", "auto"):
        return Neumann(steps, step_size if kind == "neumann" else "auto", tol, **common)
    if kind == "plain":
        return Neumann(steps, step_size, damping=damping, certify=False)
    if kind in ("chebyshev", "bounds"):
        lower, upper = draw.choice([(1e-3, 1.1), (0.1, 2.0), (0.01, 0.5)])
        bounds = "auto" if kind == "chebyshev" else (lower * (largest + damping), upper * (largest + damping))
        return Chebyshev(steps, bounds, tol, preconditioner=preconditioner if kind == "chebyshev" else None, **common)
    if kind == "nystrom":
        return Nystrom(draw.choice([1, 3, 30]), damping, tol, seed=draw.randrange(9))
    return draw.choice([Dense(damping, tol), Identity(draw.choice([1e-3, 1.0]) / largest)])


@dataclasses.dataclass
class Problem:
    """`scale` is the power of two by which the right-hand sides were made as large as they are."""

    matrix: Tensor  # (n, n)
    b: Tensor  # (n,) or (k, n)
    scale: float
    batched: bool
    solver: Solver

    @staticmethod
    def of(seed: int) -> Problem:
        draw = random.Random(seed)
        dtype = draw.choice(DTYPES)
        powers = {
            torch.float64: (300, 1000),
            torch.float32: (60, 120),
            torch.bfloat16: (60, 120),
            torch.float16: (8, 14),
        }[dtype]
        matrix = symmetric_matrix(draw, dtype)
        batched = draw.random() < 0.3
        b = right_hand_sides(draw, matrix, draw.choice([1, 2, 5]) if batched else 1)
        power, scale = (2.0 ** draw.choice([0, 0, 0, -most, most, draw.randint(-most, most)]) for most in powers)
        solver = solver_of(draw, power * max(float(matrix.double().abs().amax()), 1e-3))
        return Problem(power * matrix, scale * (b if batched else b[0]), scale, batched, solver)


def residuals_of(problem: Problem, x: Tensor) -> tuple[list[float], list[float]]:
    """The relative residual of each row, and what rounding the products may make of it."""
    damping = getattr(problem.solver, "damping", 0.0)
    matrix = problem.matrix.double() + damping * torch.eye(len(problem.matrix), dtype=torch.float64)
    sizes = problem.matrix.double().abs() + damping * torch.eye(len(matrix), dtype=torch.float64)
    epsilon = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps if x.dtype != torch.float64 else 0.0)
    smallest = torch.finfo(x.dtype).smallest_normal * len(matrix)
    found, rounding = [], []
    for row, b in zip(x.double().reshape(-1, len(matrix)), problem.b.double().reshape(-1, len(matrix)), strict=True):
        row, b = row / problem.scale, b / problem.scale
        norm = float(b.norm())
        found.append(float((b - matrix @ row).norm()) / norm if norm else 0.0)
        error = 4 * epsilon * float((sizes @ row.abs() + b.abs()).norm()) + smallest * (1 + float(row.abs().sum()))
        rounding.append(error / norm if norm else 0.0)
    return found, rounding


def assert_true(problem: Problem, x: Tensor, stats: SolveStats) -> None:
    solver: Any = problem.solver
    assert x.isfinite().all()
    assert (x.shape, x.dtype) == (problem.b.shape, problem.b.dtype)
    figures = [stats.largest_eigenvalue, stats.step_size, stats.symmetry_error]
    assert all(figure is None or math.isfinite(figure) for figure in figures)
    assert stats.stop_reason not in ("not symmetric", "not finite")
    found, rounding = residuals_of(problem, x)
    if getattr(solver, "certify", True):
        assert stats.residual == max(stats.residuals)
        assert len(stats.residuals) == len(found)
        for said, true, error in zip(stats.residuals, found, rounding, strict=True):
            assert said == pytest.approx(true, rel=1e-3, abs=error)
            assert said <= 1 or isinstance(solver, Identity)
    else:
        rows = problem.b.reshape(-1, len(problem.matrix))
        assert [math.isnan(said) for said in stats.residuals] == rows.any(dim=1).tolist()
    tol = getattr(solver, "tol", None) or 0.0
    assert stats.converged == (stats.residual <= tol)
    if stats.converged:
        assert stats.stop_reason in ("converged", "trivial")
        assert all(true <= tol + error for true, error in zip(found, rounding, strict=True))


@pytest.mark.parametrize("first", range(0, TESTS * PROBLEMS_A_TEST, PROBLEMS_A_TEST))
def test_what_is_said_of_a_solution_is_true_of_it(first):
    for seed in range(first, first + PROBLEMS_A_TEST):
        problem, state = Problem.of(seed), SolverState()
        for again in range(1 + (seed % 3 == 0)):  # what the state keeps does no harm
            operator = Operator((1 + again / 8) * problem.matrix)
            problem.matrix = operator.matrix
            (x,), stats = problem.solver.solve(operator, [problem.b], batched=problem.batched, state=state)
            try:
                assert_true(problem, x, stats)
                assert stats.matvecs == operator.products
            except AssertionError as error:
                raise AssertionError(f"problem {seed}, solve {again}: {problem.solver}, {stats}") from error
