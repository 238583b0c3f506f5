"""How many products MINRES and conjugate gradients need, against Neumann with a step that knows the eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from auxfast.solvers import MINRES, ConjugateGradient, Neumann

from .systems import Operator, gaussian, with_eigenvalues


def neumann_products(values: Tensor, coordinates: Tensor, step_size: float, residual: float) -> float:
    """The fewest products after which `Neumann(steps, step_size)` has this relative residual or a smaller one; `inf`
    if it never has. In the basis of the eigenvectors, its residual after j products is `(1 - a lambda)^(j + 1) b`."""

    def reached(products: int) -> bool:
        left = (1 - step_size * values).abs().pow(products + 1) * coordinates
        return bool(left.norm() <= residual * coordinates.norm())

    if step_size * float(values[-1]) >= 2:
        return math.inf
    most = 1
    while not reached(most):
        most *= 2
        if most > 10**8:
            return math.inf
    fewest = most // 2
    while most - fewest > 1:
        middle = (most + fewest) // 2
        fewest, most = (fewest, middle) if reached(middle) else (middle, most)
    return most


def best_of_grid(values: Tensor, coordinates: Tensor, residual: float) -> float:
    """The fewest products over 20 step sizes up to the largest that converges, and the one of the best rate."""
    largest, smallest = float(values[-1]), float(values[0])
    grid = [*torch.logspace(-2, math.log10(1.999), 20).div(largest).tolist(), 2 / (largest + smallest)]
    return min(neumann_products(values, coordinates, step_size, residual) for step_size in grid)


def random_problem(seed: int) -> tuple[Operator, Tensor, Tensor, Tensor]:
    """A positive definite matrix of condition 10 to 1e5 (of 30 to 120 rows, eigenvalues spread evenly in the
    logarithm or not), b, the eigenvalues and the coordinates of b in the eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(30, 120, (1,), generator=generator))
    condition = 10 ** (1 + 4 * seed / 19)
    places = torch.rand(size, generator=generator, dtype=torch.float64).sort().values ** (1 + seed % 3)
    places = (places - places[0]) / (places[-1] - places[0])
    scale = 10 ** (4 * torch.rand((), generator=generator) - 2)
    matrix = with_eigenvalues(scale * condition ** (places - 1), seed=seed)
    b = gaussian(size, seed=seed + 100)
    values, vectors = torch.linalg.eigh(matrix)
    return Operator(matrix), b, values, vectors.T @ b


@pytest.mark.parametrize("seed", range(20))
def test_minres_without_arguments_needs_no_more_products_than_neumann_with_the_best_step(seed):
    operator, b, values, coordinates = random_problem(seed)
    (x,), stats = MINRES().solve(operator, [b])
    residual = float((b - operator.matrix @ x).norm() / b.norm())
    assert stats.matvecs == operator.products
    assert stats.matvecs <= best_of_grid(values, coordinates, residual)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("solver", [MINRES(), ConjugateGradient()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_indefinite_problems_have_finite_answers(solver, seed, dtype):
    operator, b, values, _ = random_problem(seed)
    values[:: 2 + seed % 5] *= -1
    operator = Operator(with_eigenvalues(values, dtype, seed=seed))
    (x,), stats = solver.solve(operator, [b.to(dtype)])
    assert x.isfinite().all()
    assert stats.residual <= 1
    assert stats.negative_curvature


def test_the_count_is_that_of_the_solver():
    operator, b, values, coordinates = random_problem(3)
    step_size = 1 / float(values[-1])
    products = neumann_products(values, coordinates, step_size, 0.05)
    for steps, reached in ((products - 1, False), (products, True)):
        (x,), _ = Neumann(steps=int(steps), step_size=step_size).solve(operator, [b])
        assert (float((b - operator.matrix @ x).norm() / b.norm()) <= 0.05) == reached


@pytest.mark.parametrize("solver", [MINRES, ConjugateGradient])
@pytest.mark.parametrize("condition", [1e3, 1e4])
def test_ten_times_fewer_products_to_a_hypergradient_of_1e_3(solver, condition):
    """A quadratic inner loss with a learned log weight decay per feature: with `A = X^T X + diag(e^d)` and `A q = b`,
    the hypergradient is `-q e^d w`."""
    size = 100
    weights = gaussian(size, seed=5).exp() * gaussian(size, seed=6)  # e^d w
    operator = Operator(with_eigenvalues(torch.logspace(-math.log10(condition), 0, size, dtype=torch.float64)))
    b = gaussian(size)
    values, vectors = torch.linalg.eigh(operator.matrix)
    exact = -torch.linalg.solve(operator.matrix, b) * weights

    def error(q: Tensor) -> float:
        return float((-q * weights - exact).norm() / exact.norm())

    tol = 0.1
    (x,), stats = solver(steps=2000, tol=tol).solve(operator, [b])
    while error(x) > 1e-3:
        tol /= 2
        (x,), stats = solver(steps=2000, tol=tol).solve(operator, [b])

    step_size = 2 / float(values[-1] + values[0])
    missing = (1 - step_size * values).pow(10 * stats.matvecs + 1) * (vectors.T @ b) / values  # Neumann's error
    assert float((vectors @ missing * weights).norm() / exact.norm()) > 1e-3
