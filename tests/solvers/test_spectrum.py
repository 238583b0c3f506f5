"""Lanczos: the extreme eigenvalues, the solution found on the way, and what is kept of both."""

from __future__ import annotations

import pytest
import torch

from auxfast.solvers import SolverState
from auxfast.solvers.best_iterate import BestIterate
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.spectrum import SpectrumBounds, lanczos

from .systems import Operator, gaussian, with_eigenvalues

UNIFORM = torch.linspace(0.1, 1, 50, dtype=torch.float64)


def linear_system(values=UNIFORM, rows=1, damping=0.0, dtype=torch.float64) -> tuple[Operator, LinearSystem]:
    operator = Operator(with_eigenvalues(values, dtype))
    return operator, LinearSystem(operator, [gaussian(rows, len(values), dtype=dtype)], damping, True)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rows", [1, 3])
def test_eigenvalues_and_solutions(dtype, rel, rows):
    operator, system = linear_system(rows=rows, dtype=dtype)
    space = lanczos(system, system.rhs, 8)
    assert 0.1 * (1 - rel) <= space.smallest < 0.2
    assert 0.95 < space.largest <= 1 * (1 + rel)
    assert system.matvecs == operator.products == 8 * rows
    residual = system.rhs - space.correction @ operator.matrix
    torch.testing.assert_close(space.residual, residual, rtol=0, atol=rel)
    for b, x in zip(system.rhs, space.correction, strict=True):
        powers = [b.double()]
        for _ in range(7):
            powers.append(operator.matrix.double() @ powers[-1])
        basis = torch.linalg.qr(torch.stack(powers, 1).double())[0]
        images = operator.matrix.double() @ basis
        best = basis @ torch.linalg.lstsq(images, b.double()[:, None]).solution[:, 0]
        left, least = (b - operator.matrix.double() @ y.double() for y in (x, best))
        assert float(left.norm()) == pytest.approx(float(least.norm()), rel=1e-3)


def test_preconditioned_eigenvalues():
    values = torch.logspace(-3, 0, 20, dtype=torch.float64)
    operator, system = linear_system(values)
    scale = 1 / operator.matrix.diagonal()
    space = lanczos(system, system.rhs, 20, lambda rows: rows * scale)
    wanted = torch.linalg.eigvals(scale[:, None] * operator.matrix).real
    assert space.smallest == pytest.approx(float(wanted.min()), rel=1e-6)
    assert space.largest == pytest.approx(float(wanted.max()), rel=1e-6)
    torch.testing.assert_close(operator.matrix @ space.correction[0], system.rhs[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("values", "products"), [([2.0] * 9, 1), ([1.0] * 5 + [-3.0] * 4, 2), ([0.0] * 5 + [1.0] * 4, 2), ([0.0] * 9, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stops_at_an_invariant_subspace(values, products, dtype):
    values = torch.tensor(values, dtype=torch.float64)
    operator, system = linear_system(values, dtype=dtype)
    space = lanczos(system, system.rhs, 8)
    assert operator.products == products
    assert (space.smallest, space.largest) == pytest.approx((float(values.min()), float(values.max())), abs=1e-6)
    kernel = torch.linalg.lstsq(operator.matrix.double(), system.rhs[0].double()[:, None], driver="gelsd", rcond=1e-5)
    torch.testing.assert_close(space.correction[0].double(), kernel.solution[:, 0], rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_are_left_alone():
    _, system = linear_system(rows=3)
    system.rhs[1] = 0
    space = lanczos(system, system.rhs, 8)
    assert not space.correction[1].any()
    assert space.smallest >= 0.1
    assert space.correction[[0, 2]].any(dim=1).all()


@pytest.mark.parametrize("fails", [1, 2, 5])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_products_that_are_not_finite_end_it(fails, broken):
    operator = Operator(with_eigenvalues(UNIFORM))

    def matvec(vectors):
        return [t * broken if operator.products >= fails else t for t in operator(vectors)]

    b = gaussian(50)
    space = lanczos(LinearSystem(matvec, [b], 0.0, False), b[None], 8)
    assert space.correction.isfinite().all()
    assert (space.largest != space.largest) == (fails == 1)
    torch.testing.assert_close(b - operator.matrix @ space.correction[0], space.residual[0])


def test_estimate_is_offered_kept_and_reused():
    operator, system = linear_system(damping=0.5)
    best, state = BestIterate(system, 1e-9), SolverState()
    estimate = SpectrumBounds(best, state)
    assert list(estimate.estimate(best.unsolved())) == [0]
    assert operator.products == 9
    assert best.norms[0] < 0.05 * best.rhs_norms[0]
    estimate.save(good=True)
    assert 0.95 < state.largest_eigenvalue <= 1
    again = SpectrumBounds(best, state)
    assert list(again.estimate(best.unsolved())) == [0]
    assert operator.products == 9
    assert again.largest == pytest.approx(estimate.largest)
    assert again.largest_of_h == pytest.approx(state.largest_eigenvalue)
    assert again.should_retry()
    again.estimate(best.unsolved())
    assert again.should_retry()
    again.estimate(best.unsolved())
    assert not again.should_retry()
    again.save(good=False)
    assert state.largest_eigenvalue is state.smallest_eigenvalue is None


def test_negative_curvature_is_no_reason_for_another_estimate():
    _, system = linear_system(torch.linspace(-1, 1, 50, dtype=torch.float64))
    best = BestIterate(system, 1e-9)
    estimate = SpectrumBounds(best, None)
    estimate.estimate(best.unsolved())
    assert estimate.indefinite
    assert not estimate.should_retry()


def test_damping_is_no_part_of_a_preconditioned_estimate():
    operator, system = linear_system(damping=0.5)
    state, scale = SolverState(), torch.full((50,), 10.0, dtype=torch.float64)
    for products in (9, 0):
        best, operator.products = BestIterate(system, 1e-9), 0
        estimate = SpectrumBounds(best, state, lambda rows: rows * scale)
        estimate.estimate(best.unsolved())
        estimate.save(good=True)
        assert operator.products == products
        assert state.largest_eigenvalue == estimate.largest == pytest.approx(15, rel=0.05)
        assert estimate.largest_of_h is None
