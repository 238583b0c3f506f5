"""`verify_hypergradient`: it confirms what is right, and tells what is wrong and where."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import auxfast
from auxfast.implicit import Agreement, verify_hypergradient
from auxfast.solvers import MINRES, Identity

from .problems import Ridge

EXACT = MINRES(tol=1e-10)


def verify_ridge(problem: Ridge, **options):
    return verify_hypergradient(
        problem.outer_loss, problem.inner_loss, [problem.w], [problem.decay, problem.weights], **options
    )


def test_a_right_hypergradient_is_confirmed():
    problem = Ridge()
    report = verify_ridge(problem, solver=EXACT, max_directions=17)
    torch.testing.assert_close(report.finite_differences, torch.cat(problem.exact()).detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(report.directions, torch.eye(17, dtype=torch.float64))
    assert report.solver.relative_error < 1e-9
    assert report.total.relative_error < 1e-7
    assert report.total.cosine > 1 - 1e-12
    assert report.inner_gradient_norm < 1e-12
    assert report.resolved_gradient_norm < 1e-12


def test_many_outer_parameters_are_varied_along_random_directions():
    report = verify_ridge(Ridge(), solver=EXACT, max_directions=3)
    torch.testing.assert_close(report.directions @ report.directions.T, torch.eye(3, dtype=torch.float64))
    assert report.directions.shape == (3, 17)
    assert report.total.relative_error < 1e-7


def test_an_unsolved_system_is_told():
    report = verify_ridge(Ridge(), solver=Identity(1e-4))
    assert report.solver.relative_error > 0.5
    assert report.total.relative_error > 0.5
    assert "residual 9.9" in str(report)


def test_parameters_away_from_the_minimum_are_told():
    problem = Ridge()
    with torch.no_grad():
        problem.w.add_(1)
    report = verify_ridge(problem, solver=EXACT)
    assert report.solver.relative_error < 1e-8  # the linear system is right,
    assert report.total.relative_error > 0.1  # but not the place
    assert report.inner_gradient_norm > 1


def test_a_path_that_is_missing_is_told():
    problem = Ridge()
    inner = lambda: problem.inner_loss() + 0 * problem.decay.sum()  # noqa: E731
    outer = lambda: problem.outer_loss() - problem.decay.square().sum() + problem.decay.detach().square().sum()  # noqa: E731
    report = verify_hypergradient(outer, inner, [problem.w], [problem.decay], solver=EXACT)
    assert report.solver.relative_error < 1e-8
    assert report.total.relative_error > 1e-2


def test_a_network_in_float32_and_a_solver_of_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))
    x, y = torch.randn(30, 3), torch.randn(30, 1)
    decay = torch.tensor(-1.0, requires_grad=True)
    calls = []

    def inner_loss():
        penalty = sum(p.square().sum() for p in net.parameters())
        return (net(x) - y).square().mean() + decay.exp() * penalty

    def solve_inner():
        calls.append(1)
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, line_search_fn="strong_wolfe")
        random = torch.get_rng_state()

        def closure():
            torch.set_rng_state(random)
            optimizer.zero_grad()
            loss = inner_loss()
            loss.backward()
            return loss

        optimizer.step(closure)

    solve_inner()
    state = torch.get_rng_state()
    decay.grad = torch.tensor(3.0)
    values = [p.detach().clone() for p in (*net.parameters(), decay)]
    report = verify_hypergradient(
        lambda: (net(x[:10]) - 2 * y[:10]).square().mean(),
        inner_loss,
        net.parameters(),
        [decay],
        solve_inner=solve_inner,
    )
    assert len(calls) == 3
    assert report.dense.dtype == torch.float64
    assert math.isfinite(report.total.relative_error)
    assert all(torch.equal(p, v) for p, v in zip((*net.parameters(), decay), values, strict=True))
    assert decay.grad == 3
    assert all(p.grad is not None for p in net.parameters())  # solve_inner's own, from before
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_agrees_to_its_precision():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(30, 3), torch.randn(30, 1)
    decay = torch.tensor(-4.0, requires_grad=True)

    def inner_loss():
        return (net(x) - y).square().mean() + decay.exp() * sum(p.square().sum() for p in net.parameters())

    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = inner_loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    report = verify_hypergradient(lambda: (net(x) - 2 * y).square().mean(), inner_loss, net.parameters(), [decay])
    assert report.total.relative_error < 0.05


def test_values_come_back_after_an_error():
    problem = Ridge()
    before = problem.decay.detach().clone()

    def fails():
        raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError):
        verify_ridge(problem, solve_inner=fails)
    assert torch.equal(problem.decay, before)


def test_large_systems_are_not_solved_densely():
    report = verify_ridge(Ridge(), max_dense=4)
    assert report.dense is None
    assert report.solver is None
    assert "too large" in str(report)


def test_agreement():
    a = torch.tensor([3.0, 4.0])
    assert Agreement.of(a, a) == Agreement(cosine=1.0, relative_error=0.0)
    assert Agreement.of(-a, a) == Agreement(cosine=-1.0, relative_error=2.0)
    assert Agreement.of(0 * a, 0 * a).relative_error == 0
    assert Agreement.of(a, 0 * a).relative_error == math.inf
    assert math.isnan(Agreement.of(0 * a, a).cosine)


def test_what_is_refused():
    problem = Ridge()
    with pytest.raises(TypeError, match="inner_loss must be a function of no arguments"):
        verify_hypergradient(problem.outer_loss, problem.inner_loss(), [problem.w], [problem.decay])
    with pytest.raises(ValueError, match="must be leaves"):
        verify_hypergradient(problem.outer_loss, problem.inner_loss, [problem.w * 1], [problem.decay])
    with pytest.raises(ValueError, match="outer_params has no parameter with requires_grad=True"):
        verify_hypergradient(problem.outer_loss, problem.inner_loss, [problem.w], [torch.ones(1)])
    with pytest.raises(ValueError, match="step must be a finite number above 0, not -1"):
        verify_ridge(problem, step=-1)
    with pytest.raises(ValueError, match="max_directions must be an integer of at least 1, not 0"):
        verify_ridge(problem, max_directions=0)


def test_it_is_public():
    assert auxfast.verify_hypergradient is verify_hypergradient


@pytest.mark.parametrize("name", ["inner_params", "outer_params"])
def test_parameters_given_as_one_tensor(name):
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    params = {"inner_params": [w], "outer_params": [phi], name: torch.ones(3, requires_grad=True)}
    with pytest.raises(TypeError, match=f"{name} must be an iterable of tensors, not a Tensor: pass a list"):
        verify_hypergradient(lambda: w.sum(), lambda: (phi * w * w).sum(), **params)
