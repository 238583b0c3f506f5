"""NaN, inf and overflow: `hypergradient` says where they are, and an outer step with them changes nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import auxfast
from auxfast.implicit import HyperOptimizer, NotFiniteError, hypergradient
from auxfast.solvers import (
    MINRES,
    Chebyshev,
    ConjugateGradient,
    Dense,
    Identity,
    Jacobi,
    Neumann,
    Nystrom,
    Solver,
)

SOLVERS = [
    MINRES(),
    MINRES(warm_start=True),
    MINRES(steps=3, tol=None),
    MINRES(damping=0.1, preconditioner=Nystrom(rank=2)),
    ConjugateGradient(),
    ConjugateGradient(preconditioner=Jacobi(probes=2)),
    Neumann(),
    Neumann(3, 0.1),
    Neumann(tol=1e-3, warm_start=True),
    Chebyshev(),
    Nystrom(rank=2),
    Dense(),
    Identity(),
]


class Problem:
    """A small network under a combiner. `batch` holds what is wrong, if anything is."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.combiner = nn.Linear(2, 1), auxfast.nn.LinearCombiner(2, main=0)
        self.x = torch.randn(8, 2)
        self.adam = torch.optim.Adam(self.combiner.parameters(), lr=0.1, amsgrad=True, weight_decay=0.1)

    def with_value(self, value: float) -> Tensor:
        x = self.x.clone()
        x[0, 0] = value
        return x

    def inner_loss(self, value: float = 0.0) -> Tensor:
        y = self.net(self.with_value(value))
        loss: Tensor = self.combiner(torch.cat([(y - 1) ** 2, (y + 1) ** 2], dim=1))
        return loss

    def outer_loss(self, value: float = 0.0) -> Tensor:
        loss: Tensor = ((self.net(self.with_value(value)) - 1) ** 2).mean()
        return loss


BAD = [float("nan"), float("inf"), -float("inf"), 1e30]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("which", ["outer", "inner"])
def test_a_bad_batch_leaves_no_trace(solver: Solver, value: float, which: str):
    """Run with a bad batch between good ones: everything is as in a run without it."""
    results = []
    for batches in ([0.0, 0.0, 0.0], [0.0, 0.0, value, value, 0.0]):
        problem = Problem()
        outer = HyperOptimizer(problem.adam, solver=solver, project=[problem.combiner], max_grad_norm=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for bad in batches:
                losses = (problem.outer_loss(bad), problem.inner_loss())
                if which == "inner":
                    losses = (problem.outer_loss(), problem.inner_loss(bad))
                stats = outer.step(*losses, problem.net.parameters())
                assert (stats.stop_reason == "not finite") == (bad != 0)
        assert outer.skipped_steps == len(batches) - 3
        results.append((problem.combiner.phi, outer.state_dict()["state"], stats))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1][0].values(), results[1][1][0].values(), strict=True))
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_bad_batch_leaves_no_trace_by_finite_differences(value: float, micro_batches: int):
    problem = Problem()
    before = problem.combiner.phi.detach().clone()
    outer = HyperOptimizer(problem.adam, curvature="finite-difference", project=[problem.combiner], warn=False)
    losses = [problem.inner_loss] * (micro_batches - 1) + [lambda: problem.inner_loss(value)]
    stats = outer.step(problem.outer_loss, losses, problem.net.parameters())
    assert stats.stop_reason == "not finite"
    assert outer.skipped_steps == 1
    assert torch.equal(problem.combiner.phi, before)
    assert not problem.adam.state
    with pytest.raises(NotFiniteError, match=r"The gradients of inner_loss in inner_params hold (NaN|inf)"):
        hypergradient(
            problem.outer_loss,
            losses,
            problem.net.parameters(),
            [problem.combiner.phi],
            curvature="finite-difference",
        )


def test_second_derivatives_are_not_compared_with_a_gradient_that_is_not_finite():
    w, phi = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    outer = HyperOptimizer(torch.optim.SGD([phi], lr=1.0))
    outer.step(lambda: w.sum(), lambda: (phi * w.square()).sum() + torch.inf * w.sum(), [w])
    assert phi.isfinite().all()


def test_skipped_steps_warn_once_where_the_step_was_called_and_are_saved():
    problem = Problem()
    outer = HyperOptimizer(problem.adam, project=[problem.combiner])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for value in (torch.nan, 0.0, torch.nan):
            outer.step(problem.outer_loss(), problem.inner_loss(value), problem.net.parameters())
    assert [warning.filename for warning in caught] == [__file__]
    assert "The second derivatives of inner_loss in inner_params hold NaN" in str(caught[0].message)
    resumed = HyperOptimizer(problem.adam, project=[problem.combiner])
    resumed.load_state_dict(copy.deepcopy(outer.state_dict()))
    assert resumed.skipped_steps == 2
    old = outer.state_dict()
    del old["skipped_steps"]  # as it was saved before steps were counted
    resumed.load_state_dict(old)
    assert resumed.skipped_steps == 0


def test_a_bad_batch_gives_no_warning_where_none_is_wanted():
    problem = Problem()
    outer = HyperOptimizer(problem.adam, warn=False)
    outer.step(problem.outer_loss(), problem.inner_loss(torch.nan), problem.net.parameters())
    assert outer.skipped_steps == 1


def parts(which: str, value: float) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """A problem where one of the four derivatives is `value`, and the others are finite."""
    w, v = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.ones(2, dtype=torch.float64).requires_grad_()
    phi = torch.ones(2, dtype=torch.float64, requires_grad=True)
    inner, outer = (phi * (w + v).square()).sum() + v.square().sum(), v.sum() + w.sum()
    infinite = torch.full((2,), value, dtype=torch.float64)
    if which == "outer":
        outer = outer + (infinite * w).sum()
    elif which == "direct":
        outer = outer + (infinite * phi).sum()
    elif which == "curvature":
        inner = inner + (infinite * w.square()).sum()
    elif which == "mixed":
        inner = inner + WithBadMixed.apply(w, phi, infinite)
    return outer, inner, [w, v], [phi]


class WithBadMixed(torch.autograd.Function):
    """`0.5 |w|^2` whose gradient in w has a graph to phi with the derivative `value`."""

    twice_differentiable = True

    @staticmethod
    def forward(ctx, w, phi, value):
        ctx.save_for_backward(w, phi, value)
        return 0.5 * w.square().sum()

    @staticmethod
    def backward(ctx, grad):
        w, phi, value = ctx.saved_tensors
        return grad * (w + value * (phi - phi.detach())), torch.zeros_like(phi), None


NAMES = {
    "outer": "The gradients of outer_loss in inner_params",
    "direct": "The gradients of outer_loss in outer_params",
    "curvature": "The second derivatives of inner_loss in inner_params",
    "mixed": "The mixed second derivatives of inner_loss",
}


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("which", ["outer", "direct", "curvature"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_error_names_what_is_not_finite(solver: Solver, which: str, value: float):
    with pytest.raises(NotFiniteError, match=f"{NAMES[which]}.* hold (NaN|inf)"):
        hypergradient(*parts(which, value), solver=solver)


@pytest.mark.parametrize("as_functions", [False, True])
def test_second_derivatives_that_hold_nan_while_the_gradient_does_not(as_functions: bool):
    w, v = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    log = torch.zeros(1, requires_grad=True)

    def inner() -> Tensor:  # the norm has no second derivative at 0
        return (w + v - 3).square().sum() + log.exp() * (w.norm() + v.square().sum())

    losses: list[Tensor | Callable[[], Tensor]] = [lambda: v.sum(), inner] if as_functions else [v.sum(), inner()]
    with pytest.raises(NotFiniteError, match=r"second derivatives of inner_loss .* hold NaN.*GradScaler.*without it"):
        hypergradient(*losses, [w, v], [log])


def test_large_finite_gradients_are_clipped_and_not_lost():
    w, phi = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    outer = HyperOptimizer(torch.optim.SGD([phi], lr=1.0), max_grad_norm=1.0)
    outer.step(1e30 * w.sum(), (w.square() + phi * w).sum(), [w])  # the squares of the gradients overflow
    torch.testing.assert_close(phi.grad, torch.full((2,), -(0.5**0.5)))
