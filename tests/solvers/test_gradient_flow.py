"""Gradient flow of finite time: against differentiated training, dense eigendecompositions, and whole retrainings."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import auxfast
from auxfast.solvers import MINRES, GradientFlow, SolverState, SolveStats

from .systems import SIZE, Operator, flat, gaussian, symmetric, with_eigenvalues

SPECTRA = {
    "well conditioned": torch.linspace(0.1, 1, 40, dtype=torch.float64),
    "ill conditioned": torch.logspace(-6, 0, 40, dtype=torch.float64),
    "indefinite": torch.linspace(-0.5, 1, 40, dtype=torch.float64),
    "singular": torch.cat([torch.zeros(5), torch.linspace(0.1, 1, 35)]).double(),
    "negative definite": -torch.linspace(0.1, 1, 40, dtype=torch.float64),
    "zero": torch.zeros(40, dtype=torch.float64),
    "one": torch.full((1,), 0.3, dtype=torch.float64),
}
spectra = pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())
floored = pytest.mark.parametrize("floored", [False, True], ids=["flow", "floored"])


def dense(matrix: Tensor, b: Tensor, solver: GradientFlow) -> Tensor:
    """`f(matrix) b` by an eigendecomposition in float64, from the formulas of the docstring."""
    values, vectors = torch.linalg.eigh(matrix.double())
    if solver.floored:
        f = 1 / values.clamp(min=1 / solver.time)
    else:
        positive = values.clamp(min=1e-12)
        f = torch.where(values > 1e-12, -torch.expm1(-positive * solver.time) / positive, solver.time)
    return vectors @ (f * (vectors.T @ b.double()))


def relative_error(x: Tensor, wanted: Tensor) -> float:
    return float((x.double() - wanted).norm() / wanted.norm())


# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_it_is_what_differentiated_training_gives_on_a_quadratic(steps, rate):
    """Differences of the two are 0.3 / K for K steps, as `(1 - (1 - u)^K)` is off `1 - exp(-u K)` for u up to 1."""
    matrix, b = with_eigenvalues(torch.logspace(-3, 0, 30, dtype=torch.float64)), gaussian(30)
    phi = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    w = gaussian(30, seed=1)
    for _ in range(steps):
        w = w - rate * (matrix @ w - phi)  # the gradient of w . H w / 2 - w . phi
    (wanted,) = torch.autograd.grad(w @ b, phi)
    (x,), stats = GradientFlow(rate * steps, steps=30, tol=1e-10).solve(Operator(matrix), [b])
    assert stats.converged
    assert relative_error(x, wanted) < 0.35 / steps


@floored
@spectra
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time", [0.01, 10.0, 1e3])
def test_it_is_the_function_of_a_dense_matrix(values, floored, dtype, time, device, check_every):
    solver = GradientFlow(time, steps=50, floored=floored, tol=None)
    operator, b = Operator(with_eigenvalues(values, dtype).to(device)), gaussian(len(values), dtype=dtype).to(device)
    (x,), stats = solver.solve(operator, [b])
    rounding = 20 * torch.finfo(dtype).eps * max(1, time)
    assert relative_error(x, dense(operator.matrix, b, solver)) < rounding
    assert stats.residual < rounding
    assert stats.largest_eigenvalue == pytest.approx(float(values.max()), abs=1e-5)
    assert stats.negative_curvature == (float(values.min()) < 0)
    assert stats.matvecs == operator.products
    assert x.dtype == dtype


@floored
def test_a_list_of_tensors_of_several_shapes(floored, device):
    system, solver = symmetric(device=device), GradientFlow(30.0, steps=60, floored=floored, tol=1e-9)
    x, stats = solver.solve(system.matvec, system.rhs)
    assert [t.shape for t in x] == [t.shape for t in system.rhs]
    assert relative_error(flat(x), dense(system.matrix, flat(system.rhs), solver)) < 1e-8
    assert stats.matvecs == system.products <= SIZE


def test_a_short_time_keeps_the_right_hand_side_and_a_long_one_inverts():
    matrix, b = with_eigenvalues(torch.linspace(0.1, 1, 30, dtype=torch.float64)), gaussian(30)
    (short,), _ = GradientFlow(1e-6).solve(Operator(matrix), [b])
    torch.testing.assert_close(short, 1e-6 * b)
    (long,), _ = GradientFlow(1e4, steps=30, tol=1e-9).solve(Operator(matrix), [b])
    torch.testing.assert_close(long, torch.linalg.solve(matrix, b))


def test_no_curvature_is_time_times_the_right_hand_side():
    b = gaussian(5)
    (x,), stats = GradientFlow(7.0).solve(lambda v: [0 * v[0]], [b])
    torch.testing.assert_close(x, 7 * b)
    assert (stats.residual, stats.converged, stats.matvecs, stats.largest_eigenvalue) == (0, True, 1, 0)


def test_damping_is_a_shift_and_the_largest_eigenvalue_is_of_h():
    matrix, b = with_eigenvalues(SPECTRA["indefinite"]), gaussian(40)
    shifted = matrix + 0.3 * torch.eye(40, dtype=torch.float64)
    solver = GradientFlow(10.0, steps=40, tol=1e-9)
    (x,), stats = dataclasses.replace(solver, damping=0.3).solve(Operator(matrix), [b])
    assert relative_error(x, dense(shifted, b, solver)) < 1e-9
    assert stats.largest_eigenvalue == pytest.approx(1)
    assert stats.negative_curvature
    assert not dataclasses.replace(solver, damping=0.6).solve(Operator(matrix), [b])[1].negative_curvature


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_scales_of_loss_and_time_that_cancel_do_not_matter(scale):
    matrix, b = with_eigenvalues(SPECTRA["indefinite"]), gaussian(40)
    (x,), stats = GradientFlow(10.0).solve(Operator(matrix), [b])
    (scaled,), scaled_stats = GradientFlow(10.0 / scale).solve(Operator(scale * matrix), [scale * b])
    torch.testing.assert_close(scaled, x)
    assert scaled_stats.residual == pytest.approx(stats.residual)


def test_bfloat16_says_what_rounding_leaves():
    b = torch.ones(100, dtype=torch.bfloat16)
    for time in (2.0, 200.0):
        (x,), stats = GradientFlow(time, tol=0.05).solve(lambda v: [0.5 * v[0]], [b])
        torch.testing.assert_close(x, b * 2 * (1 - math.exp(-time / 2)), rtol=0.02, atol=0)
        assert (stats.stop_reason, x.dtype) == ("converged" if time == 2 else "stagnated", torch.bfloat16)
    (x,), stats = GradientFlow(1e30).solve(lambda v: [0 * v[0]], [1e20 * torch.ones(3)])
    assert (x.tolist(), stats.stop_reason, stats.residual) == ([0, 0, 0], "diverged", 1)  # 1e50 is no float32


# ------------------------------------------------------------------------------------------------------ the certificate


@floored
@pytest.mark.parametrize(
    "values", [torch.logspace(-6, 0, 200), torch.linspace(-0.3, 1, 200)], ids=["ill", "indefinite"]
)
@pytest.mark.parametrize("time", [10.0, 300.0])
@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_the_estimated_error_is_between_those_of_all_and_of_two_thirds_of_the_steps(values, time, steps, floored):
    operator, b = Operator(with_eigenvalues(values.double())), gaussian(200)
    solver = GradientFlow(time, steps, floored, tol=None)
    (x,), stats = solver.solve(operator, [b])
    wanted = dense(operator.matrix, b, solver)
    (before,), _ = dataclasses.replace(solver, steps=2 * steps // 3).solve(operator, [b])
    assert 0.5 * relative_error(x, wanted) < stats.residual < 3 * relative_error(before, wanted) + 1e-12
    assert (stats.stop_reason, stats.converged, stats.iterations) == ("steps", False, steps)


def test_it_stops_at_its_tolerance(check_every):
    operator, b = Operator(with_eigenvalues(torch.logspace(-4, 0, 200, dtype=torch.float64))), gaussian(200)
    iterations = []
    for tol in (0.3, 0.1, 1e-3):
        (x,), stats = GradientFlow(100.0, steps=100, tol=tol).solve(operator, [b])
        assert stats.residual <= tol
        assert (stats.converged, stats.stop_reason) == (True, "converged")
        assert relative_error(x, dense(operator.matrix, b, GradientFlow(100.0))) < tol
        assert stats.matvecs - stats.iterations < check_every
        iterations.append(stats.iterations)
    assert iterations == sorted(iterations)
    assert 5 < iterations[0] < iterations[-1] < 60


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("first", [1, 2, 3, 6])
def test_products_that_are_not_finite_do_no_harm(value, first, check_every):
    system = symmetric()

    def matvec(vectors: Sequence[Tensor]) -> list[Tensor]:
        products = system.matvec(vectors)
        return [t * value for t in products] if system.products >= first else products

    x, stats = GradientFlow(20.0, tol=1e-9).solve(matvec, system.rhs)
    assert not stats.converged
    if first == 1:
        assert (stats.stop_reason, stats.residual, stats.largest_eigenvalue) == ("not finite", 1, None)
        assert not flat(x).any()
        return
    whole = symmetric()
    wanted, known = GradientFlow(20.0, steps=first - 1, tol=None).solve(whole.matvec, whole.rhs)
    torch.testing.assert_close(flat(x), flat(wanted))
    assert (stats.stop_reason, stats.residual, stats.iterations) == ("diverged", known.residual, first - 1)


def test_each_of_several_right_hand_sides_has_its_own_error():
    operator = Operator(with_eigenvalues(SPECTRA["ill conditioned"]))
    eigenvector = torch.linalg.eigh(operator.matrix)[1][:, 20]
    b = torch.stack([gaussian(40), eigenvector, torch.zeros(40).double()])
    (x,), stats = GradientFlow(100.0, tol=0.02).solve(operator, [b], batched=True)
    assert stats.residual == stats.residuals[0] > 1e-3
    assert stats.residuals[1] < 1e-12
    assert stats.residuals[2] == 0
    assert stats.converged
    for row, b_row in zip(x[:2], b[:2], strict=True):
        assert relative_error(row, dense(operator.matrix, b_row, GradientFlow(100.0))) < 0.02


# --------------------------------------------------------------------------------------- the time of torch's optimizers


def trained(matrix: Tensor, b: Tensor, steps: int, **settings: float) -> tuple[Tensor, torch.optim.SGD]:
    """Where torch's SGD goes from 0 on `w . H w / 2 - w . b`."""
    w = torch.zeros_like(b, requires_grad=True)
    optimizer = torch.optim.SGD([w], **settings)
    for _ in range(steps):
        w.grad = (matrix @ w - b).detach()
        optimizer.step()
    return w.detach(), optimizer


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.1},
        {"lr": torch.tensor(0.1)},
        {"lr": 0.1, "momentum": 0.5},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01},
        {"lr": 0.1, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_it_is_where_sgd_goes(settings):
    matrix, b = with_eigenvalues(torch.logspace(-4, 0, 30, dtype=torch.float64)), gaussian(30)
    w, optimizer = trained(matrix, b, 300, **settings)
    solver = GradientFlow.of(optimizer, 300, steps=30, tol=1e-9)
    (x,), stats = solver.solve(Operator(matrix), [b])
    assert relative_error(x, w) < 0.015
    assert stats.converged


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)])
def test_along_a_flat_direction_the_time_is_exact_and_stability_ends_at_its_learning_rate(momentum, nesterov):
    zero, b = torch.zeros(1, 1).double(), torch.ones(1).double()
    for steps in (1, 7, 100):
        w, optimizer = trained(zero, b, steps, lr=0.3, momentum=momentum, nesterov=nesterov)
        solver = GradientFlow.of(optimizer, steps)
        assert solver.time == pytest.approx(float(w))
    limit = 2 / solver.learning_rate
    for factor, stable in ((0.99, True), (1.01, False)):
        w, _ = trained(
            torch.full((1, 1), factor * limit).double(), b, 5000, lr=0.3, momentum=momentum, nesterov=nesterov
        )
        assert (abs(float(w)) < 1e3) == stable


def test_settings_go_before_what_the_optimizer_says():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1, weight_decay=0.01)
    assert GradientFlow.of(optimizer, 50) == GradientFlow(5.0, damping=0.01, learning_rate=0.1)
    assert GradientFlow.of(optimizer, 50, damping=0.0, steps=9, time=2.0) == GradientFlow(2.0, 9, learning_rate=0.1)


def test_without_a_time_nothing_is_solved():
    w, phi = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"time must be given: GradientFlow\(time="):
        auxfast.hypergradient(w.sum(), (phi * w.square()).sum(), [w], [phi], solver=GradientFlow())


def test_optimizers_without_one_time_are_refused():
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}]
    for optimizer, error, text in (
        (torch.optim.Adam([a]), TypeError, r"SGD, not Adam.*GradientFlow\(time="),
        ("SGD", TypeError, "SGD, not str"),
        (torch.optim.SGD(groups), ValueError, r"one lr for all groups, not \[0.1, 0.2\]"),
        (torch.optim.SGD([a], lr=0.1, momentum=0.5, dampening=0.1), ValueError, "without dampening"),
        (torch.optim.SGD([a], lr=0.1, maximize=True), ValueError, "without maximize"),
        (torch.optim.SGD([a], lr=0.1, momentum=1.0), ValueError, "momentum below 1"),
    ):
        with pytest.raises(error, match=f"^optimizer must .*{text}"):
            GradientFlow.of(optimizer, 10)
    with pytest.raises(ValueError, match="inner_steps must be an integer of at least 1, not 0"):
        GradientFlow.of(torch.optim.SGD([a], lr=0.1), 0)
    with pytest.raises(TypeError, match="tme"):
        GradientFlow.of(torch.optim.SGD([a], lr=0.1), 10, tme=1.0)


# ------------------------------------------------------------------------------------------------------- hypergradients


def test_it_is_the_derivative_of_ridge_regression_that_was_trained_for_a_finite_time():
    """Whole retrainings with the centre of the ridge penalty moved. At the end of so short a training the theorem,
    which MINRES solves, is another matter."""
    x, y = gaussian(30, 8) @ torch.diag(torch.logspace(0, -1.5, 8, dtype=torch.float64)), gaussian(30, seed=5)
    x_val, y_val = gaussian(30, 8, seed=6), gaussian(30, seed=7)

    def inner_loss(w: Tensor, centre: Tensor) -> Tensor:
        return (x @ w - y).square().mean() / 2 + 0.01 * (w - centre).square().sum() / 2

    def outer_loss(w: Tensor) -> Tensor:
        return (x_val @ w - y_val).square().mean() / 2

    def train(centre: Tensor, steps: int = 200, rate: float = 0.1) -> tuple[Tensor, torch.optim.SGD]:
        w = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=rate, momentum=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            inner_loss(w, centre).backward()
            optimizer.step()
        return w, optimizer

    centre = gaussian(8, seed=8)
    moves = 1e-4 * torch.eye(8, dtype=torch.float64)
    with torch.no_grad():
        ends = [[outer_loss(w) for w in ends] for ends in _trainings(train, centre, moves)]
    wanted = torch.tensor([(up - down) / 2e-4 for up, down in ends])
    w, optimizer = train(centre)
    phi = centre.clone().requires_grad_()
    errors = []
    for solver in (GradientFlow.of(optimizer, 200), MINRES(tol=1e-9)):
        result = auxfast.hypergradient(outer_loss(w), inner_loss(w, phi), [w], [phi], solver=solver)
        errors.append(relative_error(result.grads[0], wanted))
    assert errors[0] < 0.02
    assert errors[1] > 0.4


def _trainings(train: Callable[[Tensor], tuple[Tensor, object]], centre: Tensor, moves: Tensor) -> list[list[Tensor]]:
    with torch.enable_grad():
        return [[train(centre + sign * move)[0].detach() for sign in (1, -1)] for move in moves]


def hypergradient(
    curvatures: Tensor, solver: GradientFlow, state: SolverState | None = None
) -> tuple[Tensor, SolveStats, list[str]]:
    """The hypergradient of `w . b` for an inner loss of these curvatures, how its solve went, and the warnings."""
    w, phi = torch.zeros_like(curvatures, requires_grad=True), torch.zeros_like(curvatures, requires_grad=True)
    b = gaussian(len(curvatures)).to(curvatures)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = auxfast.hypergradient(
            w @ b, (curvatures * w.square() / 2 - w * phi).sum(), [w], [phi], solver=solver, state=state
        )
    return result.grads[0], result.stats, [str(warning.message) for warning in caught]


def test_negative_curvature_is_what_it_is_for_and_no_reason_to_warn():
    grads, stats, messages = hypergradient(torch.linspace(-1, 1, 20).double(), GradientFlow(3.0))
    assert stats.negative_curvature
    assert messages == []
    assert (grads * gaussian(20) > 0).all()  # no sign is turned


def test_a_short_time_is_not_taken_for_a_solve_of_too_few_steps():
    for solver in (GradientFlow(1e-3), GradientFlow(1e-3, tol=None, steps=1)):
        assert hypergradient(torch.linspace(0, 1, 20).double(), solver)[2] == []


def test_the_edge_of_stability_is_said_once():
    curvatures, state = torch.linspace(0.1, 1, 20).double(), SolverState()
    for rate, expected in ((1.0, []), (2.0, ["edge of stability"]), (2.0, []), (None, [])):
        solver = GradientFlow(10.0, tol=None, learning_rate=rate)
        _, stats, messages = hypergradient(curvatures, solver, state)
        assert solver.is_at_edge_of_stability(stats) == (rate == 2)
        assert len(messages) == len(expected)
        assert all(text in message for text, message in zip(expected, messages, strict=True))
    decayed = GradientFlow(10.0, tol=None, damping=0.5, learning_rate=1.4)
    assert decayed.is_at_edge_of_stability(hypergradient(curvatures, decayed)[1])


def test_an_error_above_the_tolerance_is_said_and_no_tolerance_is_silence():
    curvatures = torch.logspace(-4, 0, 100).double()
    _, stats, messages = hypergradient(curvatures, GradientFlow(1e4, steps=5))
    assert (stats.stop_reason, stats.converged, len(messages)) == ("steps", False, 1)
    assert "estimate of its own relative error" in messages[0]
    assert hypergradient(curvatures, GradientFlow(1e4, steps=5, tol=None))[2] == []


def test_products_that_are_not_finite_raise_an_error_that_says_so():
    with pytest.raises(auxfast.NotFiniteError, match="second derivatives of inner_loss"):
        hypergradient(torch.full((4,), torch.nan).double(), GradientFlow(1.0))
