"""The Neumann series: what it sums to, what its residual is the residual of, and how it fails."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from auxfast.solvers import Neumann

from .systems import cut, flat, symmetric


def series(matrix: Tensor, b: Tensor, step_size: float, terms: int) -> Tensor:
    """`step_size * sum of (I - step_size * matrix)^j b` over `terms` terms, term by term."""
    term, total = b, torch.zeros_like(b)
    for _ in range(terms):
        total = total + term
        term = term - step_size * (matrix @ term)
    return step_size * total


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_is_the_truncated_series_in_true_scale(steps):
    system = symmetric()
    x, stats = Neumann(steps, step_size=0.7).solve(system.matvec, system.rhs)
    wanted = series(system.matrix, flat(system.rhs), 0.7, steps + 1)
    torch.testing.assert_close(flat(x), wanted, rtol=1e-12, atol=1e-13)
    assert [t.shape for t in x] == [b.shape for b in system.rhs]
    assert (stats.iterations, stats.matvecs, system.products) == (steps, steps, steps)
    assert (stats.step_size, stats.stop_reason, stats.converged) == (0.7, "steps", False)


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_residual_is_that_of_the_sum_one_term_before(steps):
    system = symmetric()
    x, stats = Neumann(steps, step_size=0.7).solve(system.matvec, system.rhs)
    before = cut(series(system.matrix, flat(system.rhs), 0.7, steps))
    assert stats.residual == pytest.approx(system.residual(before), rel=1e-12)
    assert system.residual(x) < stats.residual  # it contracts, so the figure is a bound for what is returned


@pytest.mark.parametrize("step_size", [0.5, 1.0, 1.5])
def test_converges_to_the_inverse_whatever_the_step_size(step_size):
    system = symmetric()
    x, stats = Neumann(2000, step_size, tol=1e-12).solve(system.matvec, system.rhs)
    torch.testing.assert_close(flat(x), system.solution(), rtol=1e-9, atol=1e-10)
    assert stats.converged
    assert stats.stop_reason == "converged"
    assert stats.residual <= 1e-12
    assert stats.iterations == stats.matvecs == system.products < 2000


def test_tolerance_stops_at_the_first_step_that_meets_it():
    system = symmetric()
    _, stats = Neumann(1000, 1.0, tol=0.01).solve(system.matvec, system.rhs)
    _, before = Neumann(stats.iterations - 1, 1.0).solve(system.matvec, system.rhs)
    assert stats.residual <= 0.01 < before.residual


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
def test_zero_right_hand_side_has_the_zero_solution(tol):
    system = symmetric()
    rhs = [torch.zeros_like(b) for b in system.rhs]
    x, stats = Neumann(3, 1.0, tol=tol).solve(system.matvec, rhs)
    assert not flat(x).any()
    assert (stats.residual, stats.converged, stats.stop_reason) == (0.0, True, "trivial")
    assert stats.matvecs == system.products


def test_zero_right_hand_side_is_solved_whatever_the_operator():
    x, stats = Neumann(3, 1.0).solve(lambda v: [t * torch.nan for t in v], [torch.zeros(3)])
    assert torch.equal(x[0], torch.zeros(3))
    assert stats.stop_reason == "trivial"


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_divergence_is_never_silent(tol):
    system = symmetric()
    with pytest.warns(RuntimeWarning, match="below 2 / "):
        _, stats = Neumann(50, 2.5, tol=tol).solve(system.matvec, system.rhs)
    assert (stats.converged, stats.stop_reason) == (False, "diverged")
    assert stats.residual > 1
    assert (stats.iterations < 50) == (tol is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overflow_has_an_infinite_residual(dtype):
    system = symmetric(dtype=dtype)
    with pytest.warns(RuntimeWarning, match="diverged"):
        _, stats = Neumann(400, 30.0).solve(system.matvec, system.rhs)
    assert stats.residual == float("inf")


def test_an_operator_that_returns_nan_diverges():
    with pytest.warns(RuntimeWarning, match="diverged"):
        _, stats = Neumann(3, 1.0).solve(lambda v: [t * torch.nan for t in v], [torch.ones(3)])
    assert (stats.residual, stats.stop_reason) == (float("inf"), "diverged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_flat_operator_is_not_divergence(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, stats = Neumann(3, 1.0).solve(lambda v: [torch.zeros_like(t) for t in v], [torch.rand(999).to(dtype)])
    assert stats.residual == pytest.approx(1)
    assert stats.stop_reason == "steps"


def test_right_hand_side_stays_and_solution_has_no_graph():
    system = symmetric()
    rhs = [b.clone().requires_grad_() for b in system.rhs]
    x, _ = Neumann(3, 1.0).solve(system.matvec, rhs)
    assert all(torch.equal(a, b) for a, b in zip(rhs, system.rhs, strict=True))
    assert not any(t.requires_grad for t in x)


def test_matvec_may_record_graphs():
    weight = torch.full((3,), 0.5, requires_grad=True)
    x, stats = Neumann(60, 1.0).solve(lambda v: [weight * v[0]], [torch.ones(3)])
    torch.testing.assert_close(x[0], torch.full((3,), 2.0))
    assert not x[0].requires_grad
    assert stats.residual < 1e-15


def test_keeps_dense_layouts_and_accepts_others():
    b = [torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.ones(1).expand(6)]
    x, _ = Neumann(30, 1.0).solve(lambda v: [0.5 * t.contiguous() for t in v], b)
    torch.testing.assert_close(x, [2 * t for t in b])
    assert x[0].is_contiguous(memory_format=torch.channels_last)


def test_reads_the_device_once_without_a_tolerance(monkeypatch):
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, _m=method, _n=name: (reads.append(_n), _m(self, *a))[1])
    system = symmetric()
    Neumann(10, 1.0).solve(system.matvec, system.rhs)
    assert reads == ["tolist"]


def test_low_precision():
    x, stats = Neumann(40, 1.0).solve(lambda v: [0.5 * t for t in v], [torch.ones(100, dtype=torch.bfloat16)])
    torch.testing.assert_close(x[0], torch.full((100,), 2.0, dtype=torch.bfloat16))
    assert x[0].dtype == torch.bfloat16
    assert stats.residual < 1e-2


def test_same_bits_for_any_number_of_threads():
    curvature = torch.linspace(0.1, 1, 200_003)
    b = [torch.randn(200_003, generator=torch.Generator().manual_seed(0))]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(Neumann(5, 1.0).solve(lambda v: [curvature * v[0]], b))
    finally:
        torch.set_num_threads(threads)
    for x, stats in results[1:]:
        assert torch.equal(x[0], results[0][0][0])
        assert stats == results[0][1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tol", [None, 0.1])
def test_right_hand_side_must_be_finite(value, tol):
    with pytest.raises(ValueError, match="rhs is not finite"):
        Neumann(2, 1.0, tol=tol).solve(lambda v: v, [torch.ones(3), torch.tensor(value)])


def test_right_hand_side_must_not_be_empty():
    with pytest.raises(ValueError, match="rhs is empty"):
        Neumann(2, 1.0).solve(lambda v: v, [])


def test_matvec_of_the_wrong_shape_is_named():
    with pytest.raises(RuntimeError, match=r"hv\[0\].*shape"):
        Neumann(2, 1.0).solve(lambda v: [v[0][:2]], [torch.ones(3)])
    with pytest.raises(RuntimeError, match="one length"):
        Neumann(2, 1.0).solve(lambda v: v[:1], [torch.ones(3), torch.ones(3)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0), "steps must be"),
        ((1.5, 1.0), "steps must be"),
        ((True, 1.0), "steps must be"),
        ((3, 0.0), "step_size must be"),
        ((3, -1.0), "step_size must be"),
        ((3, float("nan")), "step_size must be"),
        ((3, float("inf")), "step_size must be"),
        ((3, "auto"), "step_size must be"),
        ((3, 1.0, 0.0), "tol must be"),
        ((3, 1.0, 1.0), "tol must be"),
        ((3, 1.0, float("nan")), "tol must be"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Neumann(*arguments)


def test_is_a_value():
    assert Neumann(3, 0.1) == Neumann(steps=3, step_size=0.1, tol=None)
    with pytest.raises(AttributeError):
        Neumann(3, 0.1).steps = 4
