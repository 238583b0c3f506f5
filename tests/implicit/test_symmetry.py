"""Backward passes that are not the derivative of their forward pass: seen where the loss can be computed again."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from auxfast.implicit import HyperOptimizer, hypergradient
from auxfast.solvers import MINRES, ConjugateGradient, Dense, Neumann, SolverState

from .problems import Reverse


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4 + 0.1 * x**2

    @staticmethod
    def backward(ctx, grad):
        return grad


class SavedIntermediate(torch.autograd.Function):
    """sin, whose derivative is saved as a number: its own derivative is lost, where other paths keep theirs."""

    @staticmethod
    def forward(ctx, x):
        ctx.cosine = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.cosine


class Wider(torch.autograd.Function):
    """A backward pass with the wrong factor."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * grad * x


class Square(torch.autograd.Function):
    """A right one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * x


class Known(Square):
    twice_differentiable = True


class Problem:
    """inner = 1/2 |w - phi|^2 + 1/2 f(w) . c + 1/2 |c|^2 + 1/2 |f(w)|^2"""

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(1)
        start = torch.rand(3, 4, generator=generator, dtype=torch.float64) + 0.5
        self.w, self.c, self.phi = (row.to(dtype).requires_grad_() for row in start)
        self.function = function

    def inner_loss(self) -> Tensor:
        f = self.function(self.w)
        return 0.5 * ((self.w - self.phi) ** 2 + f * self.c + self.c**2 + f**2).sum()

    def outer_loss(self) -> Tensor:
        return self.w.sum()

    def hypergradient(self, **options):
        losses = self.outer_loss, [self.inner_loss, self.inner_loss] if options.pop("parts", False) else self.inner_loss
        return hypergradient(*losses, [self.w, self.c], [self.phi], **options)


@pytest.mark.parametrize("function", [Reverse, StraightThrough, SavedIntermediate, Wider])
@pytest.mark.parametrize("solver", [MINRES(), ConjugateGradient(), Dense(), Neumann(50, tol=1e-3)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_backward_pass_is_told(function, solver, dtype):
    problem = Problem(function.apply, dtype)
    with pytest.warns(RuntimeWarning, match="some backward pass is not the derivative of its forward pass"):
        stats = problem.hypergradient(solver=solver).stats
    assert stats.stop_reason == "not symmetric"
    assert not stats.converged
    assert stats.symmetry_error > 0.01


def test_a_wrong_backward_pass_is_told_of_micro_batches():
    with pytest.warns(RuntimeWarning, match="some backward pass"):
        assert Problem(Reverse.apply).hypergradient(parts=True).stats.symmetry_error > 0.1


@pytest.mark.parametrize("function", [Square.apply, Known.apply, torch.square, torch.sin])
@pytest.mark.parametrize("parts", [False, True])
def test_right_backward_passes_raise_no_alarm(function, parts):
    stats = Problem(function).hypergradient(parts=parts, state=SolverState()).stats  # warnings are errors here
    assert stats.converged
    assert stats.symmetry_error is not None
    assert stats.symmetry_error < 1e-6


def test_what_cannot_be_checked_is_told_once_and_can_be_vouched_for():
    problem = Problem(Reverse.apply)
    with pytest.warns(RuntimeWarning, match=r"Function of yours.*Pass inner_loss as a function.*twice_differentiable"):
        hypergradient(problem.outer_loss(), problem.inner_loss(), [problem.w, problem.c], [problem.phi])
    problem = Problem(Known.apply)
    hypergradient(problem.outer_loss(), problem.inner_loss(), [problem.w, problem.c], [problem.phi])


def straight_through(x: Tensor) -> Tensor:
    return x + ((4 * x).round() / 4 - x).detach() * x


def test_without_functions_of_the_user_it_is_checked_once_for_a_state():
    problem = Problem(straight_through)
    calls = []

    def inner_loss() -> Tensor:
        calls.append(1)
        return problem.inner_loss()

    optimizer = HyperOptimizer(torch.optim.SGD([problem.phi], lr=1e-3))
    counts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            stats = optimizer.step(problem.outer_loss, inner_loss, [problem.w, problem.c])
            assert stats.stop_reason == "not symmetric"
            counts.append(len(calls))
            calls.clear()
    assert len(caught) == 1
    assert "detach() within the loss" in str(caught[0].message)
    assert counts[0] > 1
    assert counts[1:] == [1, 1]


def test_a_trivial_solve_does_not_count_as_the_check():
    problem, state = Problem(Reverse.apply), SolverState()
    hypergradient(lambda: 0 * problem.w.sum(), problem.inner_loss, [problem.w, problem.c], [problem.phi], state=state)
    with pytest.warns(RuntimeWarning, match="some backward pass"):
        problem.hypergradient(state=state)
