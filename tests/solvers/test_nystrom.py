"""Nystrom: exact where it should be, bounded where it is not, and what it saves conjugate gradients."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from auxfast.solvers import ConjugateGradient, Nystrom, SolverState
from auxfast.solvers.linear_system import LinearSystem

from .systems import Operator, flat, gaussian, symmetric, with_eigenvalues

N = 60
CASES = {
    "few large": torch.cat([1e4 * 0.7 ** torch.arange(15), torch.linspace(1, 5, N - 15)]),
    "power law": 1e6 * torch.arange(1.0, N + 1) ** -2.5,
    "exponential, condition 1e6": torch.logspace(0, -6, N),
    "low rank": torch.cat([100 * 0.8 ** torch.arange(15), torch.zeros(N - 15)]),
    "multiple of the identity": torch.full((N,), 2.0),
    "zero": torch.zeros(N),
    "small negative": torch.cat([1e4 * 0.7 ** torch.arange(15), torch.linspace(-1, 5, N - 15)]),
    "large negative": torch.cat([1e4 * 0.7 ** torch.arange(8), -1e4 * 0.7 ** torch.arange(8), torch.ones(N - 16)]),
    "negative definite": torch.linspace(-9, -1, N),
}


def operator_of(case: str, dtype: torch.dtype = torch.float64) -> Operator:
    return Operator(with_eigenvalues(CASES[case].double(), dtype))


def linear_system(operator: Operator, damping: float = 0.0) -> LinearSystem:
    return LinearSystem(operator, [gaussian(len(operator.matrix), dtype=operator.matrix.dtype)], damping, batched=False)


def relative_residuals(operator: Operator, damping: float, x: torch.Tensor, b: torch.Tensor) -> list[float]:
    """The relative residual of each row of `x` and `b`, (k, n)."""
    return ((b - x @ operator.matrix - damping * x).norm(dim=-1) / b.norm(dim=-1)).tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("rank", [19, 50])
def test_exact_at_full_rank(dtype, tolerance, damping, rank):
    system = symmetric(dtype)
    x, stats = Nystrom(rank, damping).solve(system.matvec, system.rhs)
    wanted = torch.linalg.solve(system.matrix + damping * torch.eye(19, dtype=dtype), flat(system.rhs))
    torch.testing.assert_close(flat(x), wanted, rtol=tolerance, atol=tolerance)
    assert [t.shape for t in x] == [b.shape for b in system.rhs]
    assert stats.matvecs == system.products == 19 + 1
    assert stats.residual < tolerance
    assert not stats.negative_curvature
    assert stats.largest_eigenvalue == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    "case", ["small negative", "large negative", "negative definite", "exponential, condition 1e6"]
)
def test_exact_at_full_rank_for_any_spectrum(case):
    operator, b = operator_of(case), gaussian(N)
    x, stats = Nystrom(N, tol=1e-6).solve(operator, [b])
    torch.testing.assert_close(x[0], torch.linalg.solve(operator.matrix, b), rtol=1e-6, atol=1e-8)
    assert (stats.converged, stats.stop_reason) == (True, "converged")
    assert stats.negative_curvature == bool((CASES[case] < 0).any())
    assert stats.largest_eigenvalue == pytest.approx(float(CASES[case].max()), rel=1e-9)
    assert stats.matvecs == operator.products == N + 1


@pytest.mark.parametrize("rank", [20, N])
def test_a_singular_system_has_its_shortest_least_squares_solution(rank):
    operator, b = operator_of("low rank"), gaussian(N)
    x, stats = Nystrom(rank).solve(operator, [b])
    wanted = torch.linalg.pinv(operator.matrix, rtol=1e-10) @ b
    torch.testing.assert_close(x[0], wanted, rtol=1e-7, atol=1e-9)
    assert stats.residual == pytest.approx(relative_residuals(operator, 0, x[0][None], b[None])[0], rel=1e-6)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_exact_for_a_damped_operator_of_low_rank(damping):
    operator, b = operator_of("low rank"), gaussian(N)
    x, stats = Nystrom(20, damping, tol=1e-6).solve(operator, [b])
    wanted = torch.linalg.solve(operator.matrix + damping * torch.eye(N, dtype=torch.float64), b)
    torch.testing.assert_close(x[0], wanted, rtol=1e-6, atol=1e-8)
    assert stats.converged
    assert stats.matvecs == operator.products == 20 + 1


def test_scalar_and_identity_are_exact_at_rank_one():
    x, stats = Nystrom(1).solve(lambda v: [4 * v[0]], [torch.tensor(2.0)])
    assert (x[0].item(), stats.matvecs, stats.stop_reason) == (0.5, 2, "converged")
    operator, b = operator_of("multiple of the identity"), gaussian(N)
    x, _ = Nystrom(1).solve(operator, [b])
    torch.testing.assert_close(x[0], b / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("case", CASES)
def test_the_residual_is_true_and_never_above_that_of_zero(case, damping, dtype):
    operator, b = operator_of(case, dtype), gaussian(N, dtype=dtype)
    x, stats = Nystrom(20, damping).solve(operator, [b])
    assert bool(x[0].isfinite().all())
    assert stats.residual == pytest.approx(relative_residuals(operator, damping, x[0][None], b[None])[0], abs=1e-4)
    assert stats.residual <= 1
    assert stats.matvecs == operator.products


def test_ahead_of_the_woodbury_formula_where_the_sketch_does_not_hold_all():
    operator, b, damping = operator_of("few large"), gaussian(N), 1e-2
    wanted = torch.linalg.solve(operator.matrix + damping * torch.eye(N, dtype=torch.float64), b)
    sketch = Nystrom(20).build(linear_system(operator))
    low_rank = sketch.basis * sketch.values @ sketch.basis.T
    woodbury = torch.linalg.solve(low_rank + damping * torch.eye(N, dtype=torch.float64), b)
    x, _ = Nystrom(20, damping).solve(operator, [b])
    assert (x[0] - wanted).norm() < (woodbury - wanted).norm() / 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("rank", [1, 20, N])
@pytest.mark.parametrize("case", CASES)
def test_the_preconditioner_is_symmetric_positive_definite(case, rank, damping, dtype):
    apply = Nystrom(rank).build(linear_system(operator_of(case, dtype), damping))
    dense = apply(torch.eye(N, dtype=dtype)).double()
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-6 * float(dense.abs().max()))
    assert float(torch.linalg.eigvalsh((dense + dense.T) / 2)[0]) > 0


@pytest.mark.parametrize("case", ["few large", "large negative"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_preconditioned_operator_is_well_conditioned(case, dtype):
    operator = operator_of(case, dtype)
    dense = Nystrom(30).build(linear_system(operator))(torch.eye(N, dtype=dtype)).double()
    moduli = torch.linalg.eigvals(dense @ operator.matrix.double()).abs()
    assert moduli.max() / moduli.min() < 40 < CASES[case].abs().max() / CASES[case].abs().min() / 100


@pytest.mark.parametrize(("damping", "negative"), [(0.0, True), (2e4, False)])
def test_negative_eigenvalues_in_the_sketch_are_reported(damping, negative):
    operator = operator_of("large negative")
    _, stats = Nystrom(20, damping).solve(operator, [gaussian(N)])
    assert stats.negative_curvature == negative
    assert stats.matvecs == operator.products == 20 + 20 + 1
    assert stats.largest_eigenvalue == pytest.approx(1e4, rel=1e-2)
    assert stats.largest_eigenvalue <= 1e4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["few large", "power law", "low rank", "multiple of the identity", "zero"])
def test_rounding_is_not_taken_for_negative_curvature(case, dtype):
    for rank in (20, N):
        operator = operator_of(case, dtype)
        _, stats = Nystrom(rank).solve(operator, [gaussian(N, dtype=dtype)])
        assert not stats.negative_curvature
        assert stats.matvecs == operator.products == rank + 1  # the sketch is not extended either
        assert stats.largest_eigenvalue <= float(CASES[case].max()) * (1 + 1e-5) + 1e-300


def test_the_noise_of_finite_differences_is_not_taken_for_curvature():
    operator = operator_of("low rank")
    generator = torch.Generator().manual_seed(7)

    def noisy(vectors):
        product = operator(vectors)[0]
        return [product + 1e-4 * torch.randn(N, generator=generator, dtype=torch.float64)]

    _, stats = Nystrom(40).solve(noisy, [gaussian(N)])
    assert not stats.negative_curvature
    assert stats.stop_reason == "steps"
    assert stats.matvecs == 40 + 1 + 2  # two tell that it is not asymmetry either
    sketch = Nystrom(40).build(LinearSystem(noisy, [gaussian(N)], 0.0, batched=False))
    assert float(sketch.values[-1]) > 1e-3


@pytest.mark.parametrize("batched_product", [True, False])
def test_several_right_hand_sides_share_a_sketch(batched_product):
    operator = operator_of("exponential, condition 1e6")
    matvec = operator if batched_product else lambda v: operator(v)
    b = torch.cat([gaussian(3, N), torch.zeros(1, N, dtype=torch.float64)])
    x, stats = Nystrom(20, 0.1).solve(matvec, [b], batched=True)
    assert stats.matvecs == operator.products == 20 + 3  # none for the one that is zero
    assert stats.residuals[:3] == pytest.approx(relative_residuals(operator, 0.1, x[0][:3], b[:3]))
    assert stats.residuals[3] == 0
    assert not x[0][3].any()
    assert stats.residual == max(stats.residuals)
    for row in range(3):
        alone, _ = Nystrom(20, 0.1).solve(matvec, [b[row]])
        torch.testing.assert_close(x[0][row], alone[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_operator_that_is_not_finite_is_said_to_be_so(value):
    state = SolverState()
    x, stats = Nystrom(2).solve(lambda v: [v[0] * value], [torch.ones(4)], state=state)
    assert not x[0].any()
    assert (stats.residual, stats.stop_reason, stats.converged, stats.matvecs) == (1, "not finite", False, 2 + 1)
    assert state.preconditioner is None


def test_a_closing_product_that_is_not_finite_leaves_zero():
    calls = []

    def fails_later(vectors):
        calls.append(1)
        return [vectors[0] * (2.0 if len(calls) <= 2 else math.nan)]

    x, stats = Nystrom(2).solve(fails_later, [torch.ones(4)])
    assert not x[0].any()
    assert (stats.residual, stats.stop_reason, stats.matvecs) == (1, "not finite", 3 + 1)


def test_reproducible_and_without_a_trace_in_the_global_random_state():
    operator, b = operator_of("exponential, condition 1e6"), gaussian(N)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, _ = Nystrom(10).solve(operator, [b])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(Nystrom(10).solve(operator, [b])[0][0], first[0])
    assert not torch.equal(Nystrom(10, seed=1).solve(operator, [b])[0][0], first[0])


def test_the_solver_reuses_its_sketch():
    operator, state = operator_of("exponential, condition 1e6"), SolverState()
    solver = Nystrom(20, 0.1, refresh=3)
    spent = [solver.solve(operator, [gaussian(N, seed=i)], state=state)[1].matvecs for i in range(7)]
    assert spent == [21, 1, 1, 21, 1, 1, 21]
    saved = pickle.loads(pickle.dumps(state))
    assert solver.solve(operator, [gaussian(N)], state=saved)[1].matvecs == 1
    assert Nystrom(20, 0.2, refresh=3).solve(operator, [gaussian(N)], state=state)[1].matvecs == 21


def test_a_sketch_gone_stale_is_no_worse_than_zero():
    state, solver, b = SolverState(), Nystrom(20), gaussian(N)
    solver.solve(operator_of("few large"), [b], state=state)
    grown, turned = Operator(100 * operator_of("few large").matrix), Operator(-operator_of("few large").matrix)
    for operator in (grown, turned):
        x, stats = solver.solve(operator, [b], state=state)
        assert operator.products == 1
        assert stats.residual == pytest.approx(relative_residuals(operator, 0, x[0][None], b[None])[0], rel=1e-9)
        assert stats.residual <= 1


@pytest.mark.parametrize("large", [20, 18])
def test_cuts_the_products_of_conjugate_gradients(large):
    """H, of condition 1e5, and b change a little over 10 outer steps. The one sketch is included."""
    generator = torch.Generator().manual_seed(0)
    start = with_eigenvalues(torch.cat([torch.logspace(5, 2, large), torch.linspace(1, 3, 200 - large)]).double())
    change = torch.randn(200, 200, generator=generator, dtype=torch.float64)
    spent = {}
    for name, preconditioner in (("plain", None), ("nystrom", Nystrom(25))):
        solver = ConjugateGradient(steps=1000, tol=1e-6, preconditioner=preconditioner)
        operator, state = Operator(start), SolverState()
        for step in range(10):
            operator.matrix = start + 1e-3 * step * (change + change.T)
            b = gaussian(200, seed=step)
            x, stats = solver.solve(operator, [b], state=state)
            assert stats.converged
            assert relative_residuals(operator, 0, x[0][None], b[None])[0] <= 1.01e-6
        spent[name] = operator.products
    assert spent["nystrom"] < spent["plain"] / 4


def test_a_preconditioner_has_the_damping_of_its_solver():
    operator, b = operator_of("low rank"), gaussian(N)
    solver = ConjugateGradient(damping=0.1, tol=1e-8, preconditioner=Nystrom(20))
    _, stats = solver.solve(operator, [b])
    assert stats.converged
    assert stats.matvecs <= 20 + 4  # H + damping I is what it holds, exactly
    _, stats = ConjugateGradient(damping=0.1, tol=1e-8, preconditioner=Nystrom(20, damping=0.1)).solve(operator, [b])
    assert stats.converged
    with pytest.raises(ValueError, match=r"damping must be left to the solver \(0.1\)"):
        ConjugateGradient(damping=0.1, preconditioner=Nystrom(20, damping=0.2)).solve(operator, [b])


@pytest.mark.parametrize("rank", [2, 20])
def test_a_sketch_that_overflows_is_no_solution(rank):
    diagonal = torch.linspace(0.1, 1, 30, dtype=torch.float64) * torch.finfo(torch.float64).max
    (x,), stats = Nystrom(rank).solve(lambda v: [diagonal * v[0]], [torch.ones(30, dtype=torch.float64)])
    assert not x.any()
    assert (stats.residual, stats.converged, stats.stop_reason) == (1.0, False, "diverged")
