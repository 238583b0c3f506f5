"""When `hypergradient` warns, what it says, and that it does not nag."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from auxfast.implicit import HyperOptimizer, hypergradient
from auxfast.solvers import MINRES, ConjugateGradient, Identity, Neumann, Solver, SolverState

CASES = {
    "diverged": (Neumann(30, 3.0), r"diverged.*step_size must be below 2 / \(largest eigenvalue.*take a smaller one"),
    "unconverged": (MINRES(steps=2, tol=1e-6), "not solved to the solver's tol.*Allow more steps"),
    "identity": (Neumann(3, 1e-4), r"little more than the identity.*take a larger step_size.*solver=Neumann\(steps=3"),
}


def problem(lowest: float = 0.05) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """inner = 1/2 w . diag(d) w + phi . w, with eigenvalues d from `lowest` to 2"""
    w = torch.linspace(-1, 2, 12).double().requires_grad_()
    phi = torch.ones(12, dtype=torch.float64, requires_grad=True)
    d = torch.linspace(lowest, 2, 12).double()
    return w.sin().sum(), 0.5 * (d * w.square()).sum() + (phi * w).sum(), [w], [phi]


def warnings_of(solver: Solver, lowest: float = 0.05, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hypergradient(*problem(lowest), solver=solver, **options)
    assert all(warning.category is RuntimeWarning for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", CASES)
def test_warnings(name):
    solver, text = CASES[name]
    with pytest.warns(RuntimeWarning, match=text):
        hypergradient(*problem(), solver=solver)
    assert warnings_of(solver, warn=False) == []


@pytest.mark.parametrize("solver", [MINRES(), ConjugateGradient()])
def test_negative_curvature(solver):
    (text,) = warnings_of(solver, lowest=-0.7)
    assert "curves downwards" in text
    assert "add damping" in text
    assert "gauss-newton" in text


@pytest.mark.parametrize(
    "solver",
    [
        MINRES(),
        Neumann(3, 0.5),
        Neumann(1, 0.9),
        Identity(),
        Identity(1e-3),
        MINRES(steps=3, tol=None),
        Neumann(400, 0.5),
    ],
    ids=repr,
)
def test_what_is_meant_or_well_is_not_warned_of(solver):
    assert warnings_of(solver) == []


@pytest.mark.parametrize("name", CASES)
def test_once_for_a_state(name):
    state = SolverState()
    assert len(warnings_of(CASES[name][0], state=state)) == 1
    assert warnings_of(CASES[name][0], state=state) == []
    assert len(warnings_of(CASES[name][0], state=SolverState())) == 1
    other = next(case for case in CASES if case != name)
    assert len(warnings_of(CASES[other][0], state=state)) == 1


@pytest.mark.parametrize("name", CASES)
def test_once_for_a_call_site_by_pythons_own_filter(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for scale in range(1, 4):
            outer, inner, w, phi = problem()
            hypergradient(outer * scale, inner, w, phi, solver=CASES[name][0])
    assert len(caught) == 1


def test_an_optimizer_may_be_silenced():
    outer, inner, w, phi = problem()
    optimizer = HyperOptimizer(torch.optim.SGD(phi, lr=0.1), solver=CASES["identity"][0], warn=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(outer, inner, w)


def test_little_more_than_the_identity_is_not_told_by_the_residual_alone():
    """A right-hand side of one small eigenvalue: a large residual means that much is left to do, and yet some
    directions of several are solved."""
    w, phi = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    d = torch.tensor([1.0, 1.0, 1e-3, 1e-3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = hypergradient(
            w.sum(), 0.5 * (d * w.square()).sum() + (phi * w).sum(), [w], [phi], solver=Neumann(40, 0.9)
        )
    assert result.stats.residual > 0.5


class Reads(TorchDispatchMode):
    """How many numbers Python reads one by one, for each of which it would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:The hypergradient is little more")
def test_the_comparison_with_the_identity_waits_for_a_gpu_once_at_most():
    counts = []
    for warn in (False, True):
        with Reads() as reads:
            hypergradient(*problem(), solver=Neumann(3, 1e-4), warn=warn)
        counts.append(reads.count)
    assert counts[1] - counts[0] <= 1


def many_eigenvalues(size: int, lowest: float) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    w = torch.linspace(-1, 2, size).double().requires_grad_()
    phi = torch.ones(size, dtype=torch.float64, requires_grad=True)
    d = torch.logspace(math.log10(lowest), 0, size).double()
    return w.sin().sum(), 0.5 * (d * w.square()).sum() + (phi * w).sum(), [w], [phi]


def test_the_default_solver_takes_ten_steps_and_says_what_they_bought():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a residual of some tenths is what it is for
        stats = hypergradient(*many_eigenvalues(200, 1e-2)).stats
    assert stats.iterations == 10
    assert stats.matvecs <= 11
    assert 1e-3 < stats.residual < 0.5
    assert not stats.converged


def test_the_default_solver_warns_of_half_a_residual():
    with pytest.warns(RuntimeWarning, match=r"not solved to the solver's tol.*MINRES\(\) takes up to 100"):
        result = hypergradient(*many_eigenvalues(2000, 1e-8))
    assert result.stats.residual >= 0.5


def test_the_default_solver_goes_on_from_the_last_call():
    state = SolverState()
    residuals = [hypergradient(*many_eigenvalues(200, 1e-2), state=state).stats.residual for _ in range(4)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < residuals[0] / 5


def test_the_exact_solver_is_a_word_away():
    assert hypergradient(*many_eigenvalues(200, 1e-2), solver=MINRES()).stats.converged
