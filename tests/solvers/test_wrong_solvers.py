"""One clear error for what is no solver or preconditioner, and for what a solver of one's own may not return."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import auxfast
from auxfast.solvers import (
    MINRES,
    Chebyshev,
    ConjugateGradient,
    FromOptimizer,
    Jacobi,
    Nystrom,
    OneStep,
    SolveStats,
)
from auxfast.train import Component, TrainConfig

SGD = Component("SGD", {"lr": 0.1})


def problem() -> tuple[Any, ...]:
    """Inner parameters of two shapes; the outer and the inner loss, inner and outer parameters."""
    w, v, phi = (torch.ones(shape, requires_grad=True) for shape in ((3,), (2, 2), (3,)))
    return w.sum() + v.sum(), 0.5 * (w - phi).square().sum() + v.square().sum() * phi.sum(), [w, v], [phi]


def usefulness(solver: Any) -> Any:
    outer, inner, inner_params, _ = problem()
    return auxfast.auxiliary_usefulness(outer, inner, [inner], inner_params, solver=solver)


def verify(solver: Any) -> Any:
    w, phi = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = lambda: 0.5 * (w - phi).square().sum()  # noqa: E731
    return auxfast.verify_hypergradient(lambda: w.sum(), loss, [w], [phi], solver=solver)


DOORS = {
    "hypergradient": lambda solver: auxfast.hypergradient(*problem(), solver=solver),
    "HyperOptimizer": lambda solver: auxfast.HyperOptimizer(torch.optim.SGD(problem()[3], lr=0.1), solver=solver),
    "auxiliary_usefulness": usefulness,
    "verify_hypergradient": verify,
    "TrainConfig": lambda solver: TrainConfig(3, 3, SGD, SGD, solver),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("solver", ["cg", None, 3, Jacobi(), MINRES, lambda matvec, rhs: rhs])
def test_what_is_no_solver_is_refused_by_name(door, solver):
    if solver is None and door == "verify_hypergradient":
        return  # None is the default there
    written = "write MINRES()" if solver is MINRES else r"such as auxfast.solvers.MINRES\(\), not "
    with pytest.raises(ValueError if door == "TrainConfig" else TypeError, match=r"^(train\.)?solver must be a solver"):
        DOORS[door](solver)
    with pytest.raises((TypeError, ValueError), match=written.replace("()", r"\(\)") if solver is MINRES else written):
        DOORS[door](solver)


def test_a_class_in_the_place_of_a_solver_is_told_with_its_arguments():
    with pytest.raises(TypeError, match=r"solver must be a solver and not its class: write OneStep\(\.\.\.\)"):
        auxfast.HyperOptimizer(torch.optim.SGD([torch.zeros(1)]), solver=OneStep)


@pytest.mark.parametrize("kind", [MINRES, ConjugateGradient, Chebyshev])
def test_what_is_no_preconditioner_is_refused(kind):
    for given, text in (
        ("jacobi", "such as Jacobi"),
        (Jacobi, "write Jacobi"),
        (Nystrom, "write Nystrom"),
        (FromOptimizer, r"write FromOptimizer\(\.\.\.\)"),
        (torch.optim.Adam([torch.zeros(1)]), r"not the optimizer itself: take FromOptimizer\(optimizer\)"),
        (lambda vectors: vectors, r"not <function.*: take InverseOperator\(function\)"),
        (1, "not 1"),
    ):
        with pytest.raises(TypeError, match=rf"^preconditioner must be .*{text}"):
            kind(preconditioner=given)
    for given in (None, Jacobi(), Nystrom(3)):
        assert kind(preconditioner=given).preconditioner is given


STATS = SolveStats(1, 1, 0.5, False, "steps")
WRONG = {
    "None": (None, "gave None"),
    "a solution without stats": ([torch.ones(3), torch.ones(2, 2), torch.ones(1)], r"gave \[tensor"),
    "stats of another type": (
        ([torch.ones(3), torch.ones(2, 2)], {"residual": 0.1}),
        r"\{'residual': 0.1\} for the stats",
    ),
    "a tensor too few": (([torch.ones(3)], STATS), "1 tensors for the solution, of 2 tensors"),
    "a single tensor": ((torch.ones(2), STATS), "a Tensor for the solution"),
    "no solution": ((None, STATS), "a NoneType for the solution"),
    "another shape": (
        ([torch.ones(3), torch.ones(4)], STATS),
        r"float32 \(4,\) on cpu for tensor 1 .* \(2, 2\) on cpu",
    ),
    "another dtype": (([torch.ones(3).double(), torch.ones(2, 2)], STATS), "float64 .* for tensor 0 .* torch.float32"),
    "numbers": (([[1.0] * 3, torch.ones(2, 2)], STATS), r"\[1.0, 1.0, 1.0\] for tensor 0"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("door", ["hypergradient", "auxiliary_usefulness"])
def test_what_a_solver_of_ones_own_returns_is_checked(name, door):
    class Own:
        def solve(self, matvec, rhs, *, batched=False, state=None):
            return WRONG[name][0]

    with pytest.raises(TypeError, match=r"^Own\.solve must return \(solution, SolveStats\).*" + WRONG[name][1]):
        DOORS[door](Own())


def test_a_solver_of_ones_own_may_return_a_tuple():
    class Own:
        def solve(self, matvec, rhs, *, batched=False, state=None):
            return [tuple(rhs), STATS]

    assert auxfast.hypergradient(*problem(), solver=Own(), warn=False).stats is STATS
