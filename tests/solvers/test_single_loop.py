"""One step of the linear system a call: the vector in the state, its residual, and what happens to a bad step."""

from __future__ import annotations

import pytest
import torch

from auxfast.solvers import SingleLoop, SolverState

from .systems import Operator, flat, gaussian, symmetric, with_eigenvalues


def test_calls_are_gradient_descent_on_the_system():
    """Call k returns the k-th iterate from `step_size * b`, with its true residual, for one product."""
    system, state = symmetric(), SolverState()
    x = 0.7 * flat(system.rhs)
    for call in range(1, 6):
        found, stats = SingleLoop(0.7).solve(system.matvec, system.rhs, state=state)
        torch.testing.assert_close(flat(found), x)
        assert stats.residual == pytest.approx(system.residual(found), rel=1e-12)
        assert (stats.iterations, stats.matvecs, system.products) == (1, 1, call)
        assert (stats.step_size, stats.converged, stats.stop_reason) == (0.7, False, "steps")
        x = x - 0.7 * (system.matrix @ x - flat(system.rhs))
        torch.testing.assert_close(flat(state.solution), x)


def test_calls_converge_to_the_solution():
    system, state = symmetric(), SolverState()
    for _ in range(400):
        found, stats = SingleLoop(1.0).solve(system.matvec, system.rhs, state=state)
    torch.testing.assert_close(flat(found), system.solution(), rtol=1e-10, atol=1e-10)
    assert stats.residual < 1e-10
    assert stats.largest_eigenvalue is None  # it is looked at where the residual is no better than that of x = 0


def test_without_a_state_every_call_is_the_first():
    system = symmetric()
    for _ in range(2):
        found, _ = SingleLoop(0.7).solve(system.matvec, system.rhs)
        torch.testing.assert_close(flat(found), 0.7 * flat(system.rhs))


def test_several_right_hand_sides_are_carried_each():
    operator = Operator(with_eigenvalues(torch.linspace(0.5, 2, 6, dtype=torch.float64)))
    b, state = torch.stack([gaussian(6), torch.zeros(6).double(), gaussian(6, seed=8)]), SolverState()
    for _ in range(3):
        (x,), stats = SingleLoop(0.4).solve(operator, [b], batched=True, state=state)
    for row, found, residual in zip(b, x, stats.residuals, strict=True):
        alone = SolverState()
        for _ in range(3):
            (expected,), one = SingleLoop(0.4).solve(operator, [row], state=alone)
        torch.testing.assert_close(found, expected)
        assert residual == pytest.approx(one.residual, rel=1e-12)


def test_a_step_that_is_proven_too_large_is_told_and_not_carried():
    system, state = symmetric(), SolverState()
    for _ in range(100):
        x, stats = SingleLoop(2.5).solve(system.matvec, system.rhs, state=state)
        if stats.stop_reason == "diverged":
            break
    assert (stats.stop_reason, stats.residual, state.solution) == ("diverged", 1.0, None)
    assert 2 / 2.5 < stats.largest_eigenvalue <= 1 + 1e-12
    assert not flat(x).any()
    x, _ = SingleLoop(0.7).solve(system.matvec, system.rhs, state=state)  # the next call starts anew
    torch.testing.assert_close(flat(x), 0.7 * flat(system.rhs))


def test_a_changed_right_hand_side_is_followed():
    """A residual above 1 of an x that was right before is no divergence."""
    system, state = symmetric(), SolverState()
    for _ in range(400):
        SingleLoop(1.0).solve(system.matvec, system.rhs, state=state)
    turned = [-b for b in system.rhs]
    _, stats = SingleLoop(1.0).solve(system.matvec, turned, state=state)
    assert (stats.residual, stats.stop_reason) == (pytest.approx(2.0), "steps")
    for _ in range(400):
        x, _ = SingleLoop(1.0).solve(system.matvec, turned, state=state)
    torch.testing.assert_close(flat(x), -system.solution(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("carried", [[torch.ones(3)], [torch.full((17,), torch.nan)]], ids=["other shapes", "NaN"])
def test_a_useless_state_does_no_harm(carried):
    b, state = [torch.ones(17)], SolverState(carried)
    for _ in range(2):
        (x,), stats = SingleLoop(0.5).solve(lambda v: [v[0].clone()], b, state=state)
    assert x.isfinite().all()
    assert stats.residual in (0.25, 0.5)


def test_negative_curvature_is_seen():
    operator = Operator(-with_eigenvalues(torch.linspace(0.5, 2, 6, dtype=torch.float64)))
    _, stats = SingleLoop(0.1).solve(operator, [gaussian(6)])
    assert stats.negative_curvature
