"""What every solver must do. A test's decorator names the solvers that lack what it claims, each with the reason."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping

import pytest
import torch

import auxfast.solvers
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

from . import asserts
from .asserts import UNIFORM
from .systems import Operator, gaussian, with_eigenvalues

SOLVERS: dict[str, Solver] = {
    "Identity": Identity(0.7),
    "Neumann": Neumann(500, 1.0),
    "Neumann, certified": Neumann(500, 1.0, tol=1e-8),
    "Neumann, auto": Neumann(500, tol=1e-8),
    "Chebyshev": Chebyshev(500, (0.05, 1.5), tol=1e-8),
    "Chebyshev, auto": Chebyshev(500, tol=1e-8),
    "Chebyshev, Jacobi": Chebyshev(500, tol=1e-8, preconditioner=Jacobi()),
    "ConjugateGradient": ConjugateGradient(tol=1e-8),
    "ConjugateGradient, Nystrom": ConjugateGradient(tol=1e-8, preconditioner=Nystrom(5)),
    "MINRES": MINRES(tol=1e-8),
    "MINRES, Jacobi": MINRES(tol=1e-8, preconditioner=Jacobi()),
    "Nystrom": Nystrom(20, tol=1e-8),
    "Dense": Dense(tol=1e-8),
}
APPROXIMATES = {"Identity": "it approximates H by a multiple of the identity"}
FIXED_STEP = dict.fromkeys(("Neumann", "Neumann, certified", "Chebyshev"), "its step or bounds are for one scale")
NO_WARM_START = dict.fromkeys(("Identity", "Nystrom", "Dense"), "it has no such setting")
ONE_TERM_BEHIND = {"Neumann": "without a closing product its figure is that of the sum without its last term"}


def every_solver(*lacking: Mapping[str, str]) -> pytest.MarkDecorator:
    """Parametrises by `solver`: all but those that lack what is claimed, with the reasons."""
    left_out = {name for reasons in lacking for name in reasons}
    assert left_out <= set(SOLVERS)
    kept = {name: solver for name, solver in SOLVERS.items() if name not in left_out}
    return pytest.mark.parametrize("solver", kept.values(), ids=kept.keys())


SPECTRA = {
    "well conditioned": UNIFORM,
    "ill conditioned": torch.logspace(-6, 0, 40, dtype=torch.float64),
    "indefinite": torch.linspace(-0.5, 1, 40, dtype=torch.float64),
    "one negative": torch.cat([torch.tensor([-0.01]), torch.linspace(0.5, 1, 39)]).double(),
    "singular": torch.cat([torch.zeros(5), torch.linspace(0.1, 1, 35)]).double(),
    "negative definite": -torch.linspace(0.1, 1, 40, dtype=torch.float64),
    "zero": torch.zeros(40, dtype=torch.float64),
}
spectra = pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def test_every_solver_is_here():
    offered = {getattr(auxfast.solvers, name) for name in auxfast.solvers.__all__}
    classes = {cls for cls in offered if dataclasses.is_dataclass(cls) and hasattr(cls, "solve")}
    assert {cls for cls in classes if not inspect.isabstract(cls)} == {type(solver) for solver in SOLVERS.values()}


@every_solver(APPROXIMATES)
def test_solves(solver, device):
    asserts.assert_solves(solver, device)


@every_solver(APPROXIMATES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (2, 2)], ids=str)
def test_any_shape(solver, shape, device):
    asserts.assert_any_shape(solver, shape, device)


@every_solver(ONE_TERM_BEHIND)
@spectra
@dtypes
def test_residual_is_true(solver, values, dtype, device):
    asserts.assert_residual_is_true(solver, values, dtype, device)


@every_solver({"Identity": "a scale that is wrong makes it worse than x = 0"})
@spectra
@dtypes
def test_residual_is_a_bound(solver, values, dtype, device):
    asserts.assert_residual_is_a_bound(solver, values, dtype, device)


@every_solver()
@spectra
def test_stats_are_consistent(solver, values):
    asserts.assert_stats_are_consistent(solver, values)


@every_solver({"Identity": "damping would change its certificate and nothing else, so it has none"})
def test_damping_is_a_shift(solver, device):
    asserts.assert_damping_is_a_shift(solver, device)


@every_solver(APPROXIMATES, FIXED_STEP)
@dtypes
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40], ids=["small", "large"])
def test_scale_does_not_matter(solver, dtype, scale, device):
    asserts.assert_scale_invariant(solver, dtype, scale, device)


@every_solver(APPROXIMATES)
def test_low_precision(solver, device):
    asserts.assert_low_precision(solver, device)


@every_solver()
@pytest.mark.parametrize("plain", [False, True], ids=["batched", "plain"])
def test_batched_is_one_at_a_time(solver, plain, device):
    asserts.assert_batched_is_one_at_a_time(solver, plain, device)


@every_solver()
def test_zero_right_hand_side_has_the_zero_solution(solver, device):
    asserts.assert_zero_rhs(solver, device)


@every_solver(ONE_TERM_BEHIND, {"Identity": "the product of its certificate is all that it spends, and is spent"})
def test_zero_right_hand_side_costs_nothing(solver):
    asserts.assert_zero_rhs_costs_nothing(solver)


@every_solver()
def test_right_hand_side_stays_and_solution_has_no_graph(solver):
    asserts.assert_rhs_stays_and_solution_has_no_graph(solver)


@every_solver()
def test_right_hand_side_is_checked(solver):
    asserts.assert_rhs_is_checked(solver)


@every_solver()
def test_wrong_products_are_refused(solver):
    asserts.assert_wrong_products_are_refused(solver)


@every_solver()
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("for_good", [True, False], ids=["for good", "once"])
@pytest.mark.parametrize("first", [1, 2, 3, 5, 9, 10, 11, 13, 20, 21])
def test_products_that_are_not_finite_do_no_harm(solver, value, for_good, first, device):
    asserts.assert_broken_products_do_no_harm(solver, value, first, for_good, device)


@every_solver()
def test_state_is_reusable(solver, device):
    asserts.assert_state_reusable(solver, device)


@every_solver(APPROXIMATES)
def test_state_of_another_system_does_no_harm(solver):
    asserts.assert_state_of_another_system_does_no_harm(solver)


@every_solver(NO_WARM_START, {"Neumann": "without a tolerance it does not stop at a solution that is good enough"})
def test_warm_start(solver):
    asserts.assert_warm_start(solver)


@every_solver()
def test_same_bits_on_every_run(solver):
    asserts.assert_same_bits_on_every_run(solver)


MATRIX_PRODUCTS = dict.fromkeys(
    ("Neumann, auto", "Chebyshev, auto", "ConjugateGradient, Nystrom", "Nystrom", "Dense"),
    "torch's matrix products add in an order that depends on the number of threads",
)


@every_solver(MATRIX_PRODUCTS)
def test_same_bits_for_any_number_of_threads(solver):
    asserts.assert_same_bits_for_any_number_of_threads(solver)


ITERATIVE = {
    "Neumann": Neumann(1, 1.0),
    "Neumann, certified": Neumann(1, 1.0, 1e-12),
    "Neumann, auto": Neumann(1, tol=1e-12),
    "Chebyshev": Chebyshev(1, (1e-3, 1.0), 1e-12),
    "ConjugateGradient": ConjugateGradient(1, 1e-15),
    "MINRES": MINRES(1, 1e-15),
}


@pytest.mark.parametrize("solver", ITERATIVE.values(), ids=ITERATIVE.keys())
def test_waits_for_a_gpu_every_8_steps_only(solver, set_check_every, monkeypatch):
    set_check_every(8)
    operator, b = Operator(with_eigenvalues(torch.logspace(-5, 0, 100, dtype=torch.float64))), gaussian(100)

    def solve(steps):
        return dataclasses.replace(solver, steps=steps).solve(operator, [b])[1]

    asserts.assert_reads_every_eighth_step(solve, monkeypatch)


NOT_POSITIVE = [0, 0.0, -1.0, math.nan, math.inf, True, "1"]
NOT_AT_LEAST_ONE = [0, -1, 1.5, True, None]
COUNT = "must be an integer of at least 1"
WRONG = {
    **dict.fromkeys(("steps", "rank", "refresh", "max_size"), (COUNT, NOT_AT_LEAST_ONE)),
    "tol": ("must be", [0, 1, 1.5, -1e-3, math.nan, math.inf, True, "1e-3"]),
    "damping": ("must be a finite number of at least 0", [-1e-9, -1.0, math.nan, math.inf, False, "0"]),
    "seed": ("must be an integer from 0 to", [-1, 2**64, 1.5, True]),
    "scale": ("must be a finite number above 0", NOT_POSITIVE),
    "step_size": ("must be a finite number above 0", [*NOT_POSITIVE, "best"]),
    "bounds": ('must be "auto" or two numbers', [(1.0, 0.5), (0.0, 0.5), (0.1, math.inf), (0.1,), "wide", 3.0]),
}
FREE = {"warm_start", "preconditioner"}  # a flag, and what has settings of its own
SETTINGS = [
    (cls, setting.name, value, WRONG[setting.name][0])
    for cls in dict.fromkeys(map(type, SOLVERS.values()))
    for setting in dataclasses.fields(cls)
    if setting.name not in FREE
    for value in WRONG[setting.name][1]
]


@pytest.mark.parametrize(("cls", "name", "value", "message"), SETTINGS)
def test_settings_are_checked(cls, name, value, message):
    asserts.assert_setting_is_checked(cls, name, value, message)


def test_extreme_settings_are_allowed():
    assert Neumann(steps=1, step_size=1e-300, tol=1e-12, damping=0).damping == 0
    assert Neumann(tol=None).tol is None


@every_solver()
def test_is_a_value(solver):
    asserts.assert_is_a_value(solver)
