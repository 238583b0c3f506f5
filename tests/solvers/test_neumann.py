"""The Neumann series: what it sums to, what its residual is the residual of, and how it fails."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from auxfast.solvers import Neumann, SolverState

from .systems import Operator, cut, flat, gaussian, symmetric, with_eigenvalues


def series(matrix: Tensor, b: Tensor, step_size: float, terms: int) -> Tensor:
    """`step_size * sum of (I - step_size * matrix)^j b` over `terms` terms, term by term."""
    term, total = b, torch.zeros_like(b)
    for _ in range(terms):
        total = total + term
        term = term - step_size * (matrix @ term)
    return step_size * total


@pytest.mark.parametrize("certify", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_is_the_truncated_series_in_true_scale(steps, certify):
    system = symmetric()
    x, stats = Neumann(steps, step_size=0.7, certify=certify).solve(system.matvec, system.rhs)
    wanted = series(system.matrix, flat(system.rhs), 0.7, steps + 1)
    torch.testing.assert_close(flat(x), wanted, rtol=1e-12, atol=1e-13)
    assert [t.shape for t in x] == [b.shape for b in system.rhs]
    assert (stats.iterations, stats.matvecs) == (steps, steps + certify)
    assert system.products == stats.matvecs
    assert (stats.step_size, stats.stop_reason, stats.converged) == (0.7, "steps", False)
    if certify:
        assert stats.residual == pytest.approx(system.residual(x), rel=1e-12)
    else:
        assert math.isnan(stats.residual)
        assert all(map(math.isnan, stats.residuals))


LATE_GROWTH = [
    (1, [1.0, 1000.0], [1.0, 1e-4], 0.1),
    (3, [0.9, 1000.0], [1.0, 1e-13], 1.01e-3),
    (1, [1.0, -20.0], [1.0, 1e-3], 0.022),
    (5, [0.5, 2.5], [1.0, 5e-3], 0.05),
]


@pytest.mark.parametrize(("steps", "eigenvalues", "b", "reached"), LATE_GROWTH)
@pytest.mark.parametrize("tol", [None, 1e-9])
@pytest.mark.parametrize("batched", [False, True])
def test_a_last_term_that_only_the_closing_product_shows_to_grow_is_left_out(
    steps, eigenvalues, b, reached, tol, batched, check_every
):
    """The residual fell to the last step, which made a larger one."""
    operator, rhs = Operator(torch.diag(torch.tensor(eigenvalues).double())), torch.tensor(b).double()
    rhs = torch.stack([torch.zeros(2).double(), rhs]) if batched else rhs
    (x,), stats = Neumann(steps, 1.0, tol).solve(operator, [rhs], batched=batched)
    x, rhs = (x[1], rhs[1]) if batched else (x, rhs)
    assert stats.residual == pytest.approx(float((rhs - operator.matrix @ x).norm() / rhs.norm()), rel=1e-9)
    assert stats.residual <= reached
    assert (stats.stop_reason, stats.converged) == ("diverged", False)
    assert stats.matvecs == operator.products == steps + 2


@pytest.mark.parametrize("batched", [False, True])
def test_without_a_certificate_it_is_algorithm_2_as_it_stands(batched, check_every):
    """Growth is told, and changes neither the sum nor the number of products."""
    operator, b = Operator(with_eigenvalues(torch.linspace(0.1, 1, 12, dtype=torch.float64))), gaussian(2, 12)
    rhs = torch.cat([b, torch.zeros(1, 12)]) if batched else b[0]
    for step_size, reason in ((1.0, "steps"), (2.5, "diverged"), (1e4, "diverged")):
        operator.products = 0
        (x,), stats = Neumann(9, step_size, certify=False).solve(operator, [rhs], batched=batched)
        for row, solution in zip(rhs, x, strict=True) if batched else [(rhs, x)]:
            torch.testing.assert_close(solution, series(operator.matrix, row, step_size, 10))
        assert (stats.stop_reason, stats.converged) == (reason, False)
        assert stats.matvecs == operator.products == (27 if batched else 9)
        assert [math.isnan(residual) for residual in stats.residuals] == ([True, True, False] if batched else [True])
        assert math.isnan(stats.residual)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_without_a_certificate_nothing_is_returned_that_is_not_finite(dtype, damping):
    for factor, step_size, reason in (
        (3, 1e35, "diverged"),
        (math.nan, 1.0, "not finite"),
        (math.inf, 1, "not finite"),
    ):
        matvec = lambda v, factor=factor: [t * factor for t in v]  # noqa: E731
        x, stats = Neumann(40, step_size, damping=damping, certify=False).solve(matvec, [torch.ones(9, dtype=dtype)])
        assert not x[0].any()
        assert (stats.stop_reason, stats.converged, stats.iterations) == (reason, False, 40)
        assert math.isnan(stats.residual)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_a_certificate_a_tiny_right_hand_side_hides_no_overflow(dtype):
    """Its rows are scaled up, and what is infinite there would be infinite in any scale."""
    products = 0

    def matvec(v: Sequence[Tensor]) -> list[Tensor]:
        nonlocal products
        products += 1
        return [torch.full_like(t, torch.finfo(dtype).max) if products == 2 else t for t in v]

    rhs = torch.full((3,), torch.finfo(dtype).tiny, dtype=dtype)
    (x,), stats = Neumann(30, 0.1, damping=0.1, certify=False).solve(matvec, [rhs])
    assert not x.any()
    assert stats.stop_reason == "diverged"


def test_eigenvalues_at_the_end_of_the_range_of_float64_give_a_step():
    largest = torch.finfo(torch.float64).max
    (x,), _ = Neumann(3).solve(lambda v: [t * largest for t in v], [torch.ones(3, dtype=torch.float64)])
    assert x.isfinite().all()


@pytest.mark.parametrize("solver", [Neumann(3, 0.1), Neumann(3, 0.1, certify=False)])
def test_zeros_and_what_is_not_finite_on_the_right_are_told_apart(solver):
    x, stats = solver.solve(lambda v: [t * math.nan for t in v], [torch.zeros(3), torch.zeros(())])
    assert (stats.residual, stats.converged, stats.stop_reason) == (0.0, True, "trivial")
    assert not flat(x).any()
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="rhs is not finite"):
            solver.solve(lambda v: v, [torch.tensor([1.0, value])])
    for value in (1e-300, 1e-200, 1e200, 1e300):
        x, stats = solver.solve(lambda v: v, [torch.tensor([0.0, value], dtype=torch.float64)])
        assert flat(x).isfinite().all()
        assert stats.stop_reason != "trivial"


@pytest.mark.parametrize("settings", [{"tol": 1e-3}, {"warm_start": True}, {"step_size": "auto"}])
def test_what_needs_the_residual_is_certified(settings):
    with pytest.raises(ValueError, match=r"certify=False goes with a fixed step_size, tol=None and warm_start=False"):
        Neumann(**{"steps": 3, "step_size": 0.1, "certify": False, **settings})


@pytest.mark.parametrize("step_size", [0.5, 1.0, 1.5])
def test_converges_to_the_inverse_whatever_the_step_size(step_size):
    system = symmetric()
    x, stats = Neumann(2000, step_size, tol=1e-12).solve(system.matvec, system.rhs)
    torch.testing.assert_close(flat(x), system.solution(), rtol=1e-9, atol=1e-10)
    assert stats.converged
    assert stats.stop_reason == "converged"
    assert stats.residual <= 1e-12
    assert stats.residual == pytest.approx(system.residual(x), rel=1e-3)
    assert stats.iterations + 1 == stats.matvecs == system.products < 2000  # one to certify it


def test_tolerance_stops_at_the_first_step_that_meets_it():
    system = symmetric()
    x, stats = Neumann(1000, 1.0, tol=0.01).solve(system.matvec, system.rhs)
    _, one_less = Neumann(stats.iterations - 1, 1.0).solve(system.matvec, system.rhs)
    _, two_less = Neumann(stats.iterations - 2, 1.0).solve(system.matvec, system.rhs)
    assert one_less.residual <= 0.01 < two_less.residual  # it knows the residual of the sum without its last term
    assert stats.residual == pytest.approx(system.residual(x), rel=1e-12)
    assert stats.residual < one_less.residual


def test_tolerance_out_of_reach_is_not_called_convergence():
    system = symmetric()
    _, stats = Neumann(3, 1.0, tol=1e-6).solve(system.matvec, system.rhs)
    assert (stats.converged, stats.stop_reason, stats.iterations) == (False, "steps", 3)


def test_exact_after_one_step_on_a_multiple_of_the_identity():
    b = [torch.rand(5), torch.rand(2, 3)]
    x, stats = Neumann(4, 0.5).solve(lambda v: [2 * t for t in v], b)
    assert torch.equal(flat(x), flat(b) / 2)
    assert (stats.residual, stats.converged, stats.stop_reason) == (0.0, True, "converged")


@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("step_size", [2.05, 2.5, 30.0, 1e6])
def test_growth_returns_the_best_sum(tol, step_size, check_every):
    system = symmetric()
    wanted = min(
        (series(system.matrix, flat(system.rhs), step_size, terms) for terms in range(60)),
        key=lambda x: system.residual(cut(x)),
    )
    x, stats = Neumann(60, step_size, tol).solve(system.matvec, system.rhs)
    torch.testing.assert_close(flat(x), wanted, rtol=1e-9, atol=1e-12)
    assert (stats.converged, stats.stop_reason) == (False, "diverged")
    assert stats.residual == pytest.approx(system.residual(x), rel=1e-9)
    assert stats.residual <= 1
    assert stats.iterations < 60
    assert stats.matvecs == system.products


def test_growth_tells_about_the_largest_eigenvalue():
    system = symmetric()
    _, stats = Neumann(60, 2.5).solve(system.matvec, system.rhs)
    assert 0.7 < stats.largest_eigenvalue <= 1
    assert not stats.negative_curvature


@pytest.mark.parametrize(("smallest", "step_size"), [(-0.3, 0.5), (-0.3, "auto"), (-3.0, 0.5), (-3.0, "auto")])
def test_negative_curvature_ends_it_at_the_best_sum(smallest, step_size):
    operator = Operator(with_eigenvalues(torch.linspace(smallest, 1, 40, dtype=torch.float64)))
    b = gaussian(40)
    (x,), stats = Neumann(200, step_size).solve(operator, [b])
    assert stats.stop_reason == "diverged"
    assert stats.residual == pytest.approx(float((b - operator.matrix @ x).norm() / b.norm()), rel=1e-9)
    assert stats.residual <= 1
    assert stats.matvecs == operator.products
    assert stats.negative_curvature == (step_size == "auto" or smallest == -3)  # the first growth shows it, or not yet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tol", [None, 1e-3])
def test_overflow_returns_zeros(dtype, tol, check_every):
    x, stats = Neumann(400, 1e35, tol).solve(lambda v: [t * 3 for t in v], [torch.ones(9, dtype=dtype)])
    assert not x[0].any()
    assert (stats.residual, stats.stop_reason) == (1.0, "diverged")


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_a_step_size_beyond_all_bounds(tol):
    x, stats = Neumann(400, 1e300, tol).solve(lambda v: [t * 3 for t in v], [torch.ones(9, dtype=torch.float64)])
    assert not x[0].any()
    assert (stats.residual, stats.stop_reason, stats.negative_curvature) == (1.0, "diverged", False)


def test_a_sum_that_may_overflow_is_not_returned():
    x, stats = Neumann(3, 3e38).solve(lambda v: [0 * t for t in v], [torch.full((9,), 2.0)])
    assert not x[0].any()
    assert (stats.residual, stats.stop_reason) == (1.0, "diverged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_flat_operator_is_not_divergence(dtype):
    _, stats = Neumann(3, 1.0).solve(lambda v: [torch.zeros_like(t) for t in v], [torch.rand(999).to(dtype)])
    assert stats.residual == pytest.approx(1)
    assert stats.stop_reason == "steps"
    _, stats = Neumann(3, 1.0, certify=False).solve(lambda v: [0 * t for t in v], [torch.rand(999).to(dtype)])
    assert stats.stop_reason == "steps"


def test_matvec_may_record_graphs():
    weight = torch.full((3,), 0.5, requires_grad=True)
    x, stats = Neumann(60, 1.0).solve(lambda v: [weight * v[0]], [torch.ones(3)])
    torch.testing.assert_close(x[0], torch.full((3,), 2.0))
    assert not x[0].requires_grad
    assert stats.residual < 1e-15


def test_keeps_dense_layouts_and_accepts_others():
    b = [torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.ones(1).expand(6)]
    x, _ = Neumann(30, 1.0, certify=False).solve(lambda v: [0.5 * t.contiguous() for t in v], b)
    torch.testing.assert_close(x, [2 * t for t in b])
    assert x[0].is_contiguous(memory_format=torch.channels_last)


def test_matvec_of_the_wrong_shape_is_named():
    solver = Neumann(2, 1.0, certify=False)
    with pytest.raises(RuntimeError, match=r"hv\[0\].*shape"):
        solver.solve(lambda v: [v[0][:2]], [torch.ones(3)])
    with pytest.raises(RuntimeError, match="one length"):
        solver.solve(lambda v: v[:1], [torch.ones(3), torch.ones(3)])


def test_defaults_work():
    system = symmetric()
    x, stats = Neumann().solve(system.matvec, system.rhs)
    assert stats.residual == pytest.approx(system.residual(x), rel=1e-6)
    assert stats.residual < 0.05
    assert stats.matvecs == system.products == 8 + 1 + 20 + 1  # Lanczos and its solution, the series and its sum


@pytest.mark.parametrize("damping", [0.3, 5.0])
@pytest.mark.parametrize("batched", [False, True])
def test_damping(damping, batched):
    operator = Operator(with_eigenvalues(torch.linspace(-0.1, 1, 12, dtype=torch.float64)))
    damped = operator.matrix + damping * torch.eye(12, dtype=torch.float64)
    b, step_size = gaussian(3, 12), 1 / (1 + damping)
    (x,), stats = Neumann(5, step_size, damping=damping).solve(operator, [b if batched else b[0]], batched=batched)
    wanted = torch.stack([series(damped, row, step_size, 6) for row in b])
    torch.testing.assert_close(x, wanted if batched else wanted[0])
    assert stats.matvecs == operator.products
    (x,), stats = Neumann(500, "auto", 1e-10, damping).solve(operator, [b[0]])
    torch.testing.assert_close(x, torch.linalg.solve(damped, b[0]), rtol=1e-8, atol=1e-8)
    assert stats.largest_eigenvalue == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("arguments", [(7, 1.0), (500, 1.0, 1e-6), (500, 2.1, 1e-6), (40, "auto"), (500, "auto", 1e-6)])
@pytest.mark.parametrize("together", [True, False])
def test_several_right_hand_sides_are_as_one_at_a_time(arguments, together):
    matrix = with_eigenvalues(torch.linspace(0.1, 1, 30, dtype=torch.float64))
    operator = Operator(matrix)
    b = torch.stack([gaussian(30), torch.zeros(30, dtype=torch.float64), 1e3 * gaussian(30, seed=5), matrix[0]])
    solver = Neumann(*arguments)
    matvec = operator if together else lambda v: operator(v)
    (x,), stats = solver.solve(matvec, [b], batched=True)
    assert stats.matvecs == operator.products
    assert x.shape == b.shape
    for row, solution, residual in zip(b, x, stats.residuals, strict=True):
        (alone,), one = solver.solve(operator, [row])
        if arguments[1] == "auto":  # the eigenvalues are estimated from all right-hand sides together
            assert residual <= max(3 * one.residual, 1e-6)
        else:
            torch.testing.assert_close(solution, alone, rtol=1e-9, atol=1e-9)
            assert residual == pytest.approx(one.residual, rel=1e-6, abs=1e-12)
    assert stats.residual == max(stats.residuals)
    assert stats.residuals[1] == 0


def test_state_keeps_the_eigenvalues_and_the_solution():
    operator = Operator(with_eigenvalues(torch.linspace(0.1, 1, 30, dtype=torch.float64)))
    b, state = gaussian(30), SolverState()
    solver = Neumann(300, "auto", 1e-6, warm_start=True)
    _, first = solver.solve(operator, [b], state=state)
    assert 0.9 <= state.largest_eigenvalue <= 1 + 1e-12
    assert first.largest_eigenvalue == state.largest_eigenvalue
    _, again = solver.solve(operator, [b], state=state)
    assert (again.matvecs, again.iterations, again.stop_reason) == (1, 0, "converged")
    _, near = solver.solve(operator, [b + 1e-3 * gaussian(30, seed=9)], state=state)
    assert near.converged
    assert near.matvecs < first.matvecs
    _, other = solver.solve(operator, [torch.cat([b, b])[:30].reshape(5, 6).reshape(30)], state=SolverState())
    assert other.matvecs == first.matvecs


def test_eigenvalues_that_no_longer_hold_are_estimated_anew():
    operator, b = Operator(with_eigenvalues(torch.linspace(0.1, 1, 30, dtype=torch.float64))), gaussian(30)
    solver, state = Neumann(300, "auto", 1e-6), SolverState()
    solver.solve(operator, [b], state=state)
    operator.matrix *= 100
    (x,), stats = solver.solve(operator, [b], state=state)
    assert stats.converged
    torch.testing.assert_close(operator.matrix @ x, b, rtol=0, atol=1e-5)
    assert state.largest_eigenvalue > 90
    operator.matrix /= 1e4  # far too small a step is noticed by the tolerance only
    _, slow = solver.solve(operator, [b], state=state)
    assert not slow.converged
    assert solver.solve(operator, [b], state=state)[1].converged


def test_eigenvalues_far_too_large_for_the_system_are_forgotten_without_a_tolerance_too():
    operator, b = Operator(with_eigenvalues(torch.linspace(0.1, 1, 30, dtype=torch.float64))), gaussian(30)
    solver, state = Neumann(20, "auto"), SolverState()
    _, fresh = solver.solve(operator, [b], state=state)
    operator.matrix *= 1e6  # one bad batch
    solver.solve(operator, [b], state=state)
    operator.matrix /= 1e6
    solver.solve(operator, [b], state=state)
    assert solver.solve(operator, [b], state=state)[1].residual == pytest.approx(fresh.residual)
