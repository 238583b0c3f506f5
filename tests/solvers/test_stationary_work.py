"""How many products a solver needs for an accuracy, against the Neumann series at its best fixed step size.

What that series leaves of each eigendirection after j steps is known, `|1 - a eigenvalue|^j`, so its best is computed
and not run.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from auxfast.solvers import Chebyshev, Neumann

from .systems import Operator, gaussian, with_eigenvalues

GRID = torch.logspace(-2, math.log10(2), 20, dtype=torch.float64)  # step sizes, times 1 / (largest eigenvalue)
SEEDS = range(20)


def positive(seed: int) -> Tensor:
    """(60,), of condition 10 to 1e5, spread in four ways, of any scale."""
    generator = torch.Generator().manual_seed(seed)
    smallest = 10 ** -(1 + 4 * seed / 19)
    spread = torch.rand(60, generator=generator, dtype=torch.float64)
    spread[:2] = torch.tensor([0.0, 1.0])
    kinds = [
        smallest ** (1 - spread),
        smallest + (1 - smallest) * spread,
        smallest + (1 - smallest) * spread**4,
        smallest * (1 + spread),
    ]
    values = kinds[seed % 4]
    values[1] = 1
    return values * 100 ** float(2 * torch.rand(1, generator=generator) - 1)


def left(values: Tensor, parts: Tensor, step_size: Tensor | float, steps: int) -> float:
    """The norm after `steps` steps of the `parts` of a vector in the eigendirections, relative to that before."""
    return float((parts * (1 - step_size * values).abs() ** steps).norm() / parts.norm())


def fewest_steps(values: Tensor, parts: Tensor, step_size: Tensor | float, tol: float) -> int:
    """The number of steps until `left` is at most `tol`, at most 10 million. The series contracts."""
    below, enough = 0, 10_000_000
    if left(values, parts, step_size, enough) > tol:
        return enough
    while enough - below > 1:
        middle = (below + enough) // 2
        below, enough = (below, middle) if left(values, parts, step_size, middle) <= tol else (middle, enough)
    return enough


@pytest.mark.parametrize("seed", SEEDS)
def test_neumann_auto_is_near_the_best_of_20_step_sizes(seed):
    values = positive(seed)
    operator, b = Operator(with_eigenvalues(values)), gaussian(60, seed=seed)
    parts = torch.linalg.eigh(operator.matrix)[1].T @ b
    values, steps = torch.linalg.eigvalsh(operator.matrix), GRID / values.max()
    tol = max(1e-3, min(left(values, parts, step, 2000) for step in steps))  # 2000 steps reach it
    best = min(fewest_steps(values, parts, step, tol) for step in steps)
    _, stats = Neumann(10_000, "auto", tol).solve(operator, [b])
    assert stats.converged
    assert stats.matvecs == operator.products
    assert stats.matvecs <= 2.2 * best


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("solver", [Neumann(300), Neumann(300, tol=1e-3), Chebyshev(300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_indefinite_problems_have_finite_answers(solver, seed, dtype):
    values = positive(seed)
    values[:: 2 + seed % 5] *= -1
    operator, b = Operator(with_eigenvalues(values, dtype)), gaussian(60, seed=seed, dtype=dtype)
    (x,), stats = solver.solve(operator, [b])
    residual = (b.double() - operator.matrix.double() @ x.double()).norm() / b.double().norm()
    assert stats.residual == pytest.approx(float(residual), rel=1e-2, abs=1e-5)
    assert residual <= 1
    assert stats.negative_curvature
    assert stats.matvecs == operator.products


@pytest.mark.parametrize("condition", [1e3, 1e4, 1e5])
def test_chebyshev_needs_a_tenth_of_the_products_of_neumann(condition):
    values = torch.logspace(-math.log10(condition), 0, 100, dtype=torch.float64)
    operator, b = Operator(with_eigenvalues(values)), gaussian(100)
    exact = torch.linalg.solve(operator.matrix, b)
    parts = torch.linalg.eigh(operator.matrix)[1].T @ exact  # the error of x = 0, which shrinks as the residual does
    neumann = fewest_steps(values, parts, 2 / (values[0] + values[-1]), 1e-3)
    (x,), stats = Chebyshev(neumann, tol=1e-3 / math.sqrt(condition)).solve(operator, [b])
    assert (x - exact).norm() <= 1e-3 * exact.norm()
    assert 10 * stats.matvecs <= neumann
