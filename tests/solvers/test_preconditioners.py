"""When solves share a preconditioner, and what Jacobi makes of a diagonal."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch

from auxfast.solvers import ConjugateGradient, Jacobi, SolverState
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.preconditioners import prepare

from .systems import Operator, flat, gaussian, symmetric, with_eigenvalues


@dataclass(frozen=True)
class Halves:
    """Counts its builds; builds nothing if it is `broken`."""

    refresh: int = 3
    broken: bool = False
    builds = 0

    def build(self, system):
        Halves.builds += 1
        return None if self.broken else lambda rows: rows / 2


@pytest.fixture(autouse=True)
def _no_builds_yet():
    Halves.builds = 0


def linear_system(rhs=None, damping=0.0):
    return LinearSystem(lambda v: v, [torch.ones(4) if rhs is None else rhs], damping, batched=False)


def diagonal_of(preconditioner, linear: LinearSystem) -> torch.Tensor:
    """(n,): what it divides by."""
    return 1 / preconditioner.build(linear)(torch.ones_like(linear.rhs[:1]))[0]


def test_nothing_to_prepare():
    state = SolverState()
    assert prepare(None, linear_system(), state) is None
    assert state == SolverState()


def test_without_a_state_each_solve_builds():
    for builds in (1, 2):
        assert prepare(Halves(), linear_system(), None) is not None
        assert Halves.builds == builds


@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_one_build_serves_so_many_solves(refresh):
    state = SolverState()
    builds = []
    for _ in range(7):
        prepare(Halves(refresh), linear_system(), state)
        builds.append(Halves.builds)
    assert builds == [1 + solve // refresh for solve in range(7)]


@pytest.mark.parametrize(
    "other",
    [
        lambda: (Halves(refresh=4), linear_system()),
        lambda: (Halves(), linear_system(damping=0.1)),
        lambda: (Halves(), linear_system(torch.ones(5))),
        lambda: (Halves(), linear_system(torch.ones(4, dtype=torch.float64))),
        lambda: (Jacobi(), linear_system()),
    ],
    ids=["settings", "damping", "size", "dtype", "kind"],
)
def test_what_does_not_fit_is_built_anew(other):
    state = SolverState()
    first = prepare(Halves(), linear_system(), state)
    built = prepare(*other(), state)
    assert built is not first
    assert prepare(*other(), state) is built  # it replaces what was held
    prepare(Halves(), linear_system(), state)
    assert Halves.builds >= 2


def test_another_device_does_not_fit():
    state = SolverState()
    prepare(Halves(), linear_system(), state)
    linear = linear_system()
    linear.rhs = linear.rhs.to("meta")
    prepare(Halves(), linear, state)
    assert Halves.builds == 2


def test_equal_settings_and_other_right_hand_sides_fit():
    state = SolverState()
    first = prepare(Jacobi(seed=1), linear_system(), state)
    several = LinearSystem(lambda v: v, [torch.rand(3, 4)], 0.0, batched=True)
    assert prepare(Jacobi(seed=1), several, state) is first
    assert several.matvecs == 0


def test_what_could_not_be_built_is_not_held():
    state = SolverState()
    assert prepare(Halves(broken=True), linear_system(), state) is None
    assert prepare(Halves(broken=True), linear_system(), state) is None
    assert Halves.builds == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 0.25])
def test_diagonal_is_exact_where_unit_vectors_are_as_cheap(dtype, damping):
    operator = Operator(with_eigenvalues(torch.linspace(1, 9, 8, dtype=torch.float64), dtype))
    linear = LinearSystem(operator, [gaussian(8, dtype=dtype)], damping, batched=False)
    torch.testing.assert_close(diagonal_of(Jacobi(probes=8), linear), operator.matrix.diagonal() + damping)
    assert linear.matvecs == operator.products == 8


def test_fewer_parameters_than_probes_cost_fewer_products():
    operator = Operator(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
    linear = LinearSystem(operator, [torch.ones(3)], 0.0, batched=False)
    assert diagonal_of(Jacobi(probes=8), linear).tolist() == [1, 2, 4]
    assert operator.products == 3


def test_one_probe_is_exact_for_a_diagonal_operator():
    wanted = torch.logspace(-3, 3, 50, dtype=torch.float64)
    operator = Operator(torch.diag(wanted))
    linear = LinearSystem(operator, [gaussian(50)], 0.0, batched=False)
    torch.testing.assert_close(diagonal_of(Jacobi(probes=1), linear), wanted, rtol=1e-14, atol=0)
    assert operator.products == 1


def test_estimate_comes_closer_with_probes():
    operator = Operator(with_eigenvalues(torch.linspace(1, 9, 60, dtype=torch.float64)))
    linear = LinearSystem(operator, [gaussian(60)], 0.5, batched=False)
    wanted = operator.matrix.diagonal() + 0.5
    errors = [float((diagonal_of(Jacobi(probes=k), linear) / wanted - 1).norm()) for k in (2, 12, 59)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(12, 12),
        torch.diag(torch.tensor([-4.0, 0.0, 1e-30] + [2.0] * 9)),
        with_eigenvalues(torch.linspace(-1, 1, 12, dtype=torch.float64), torch.float32),
        torch.ones(12, 12) - torch.eye(12),
    ],
    ids=["zero", "negative and zero entries", "indefinite", "no diagonal"],
)
@pytest.mark.parametrize("probes", [1, 4, 12])
def test_positive_and_bounded_whatever_the_operator(matrix, probes):
    linear = LinearSystem(Operator(matrix), [torch.ones(12)], 0.0, batched=False)
    diagonal = diagonal_of(Jacobi(probes=probes), linear)
    assert bool(diagonal.isfinite().all())
    assert float(diagonal.min()) > 1e-7 * float(diagonal.max()) > 0


def test_entries_of_nothing_but_rounding_are_set_to_the_least_of_the_others():
    linear = LinearSystem(
        Operator(torch.diag(torch.tensor([-4.0, 0.0, 1e-30, 2.0]))), [torch.ones(4)], 0.0, batched=False
    )
    assert diagonal_of(Jacobi(), linear).tolist() == [4, 2, 2, 2]


def test_the_users_diagonal_costs_no_products():
    system = symmetric()
    given = [torch.rand_like(b) + 1 for b in system.rhs]
    linear = LinearSystem(system.matvec, system.rhs, 0.5, batched=False)
    torch.testing.assert_close(diagonal_of(Jacobi(given), linear), flat(given) + 0.5)
    assert system.products == 0


def test_the_users_diagonal_may_be_of_another_dtype_and_is_of_the_parameters_when_batched():
    given = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(4)]
    linear = LinearSystem(lambda v: v, [torch.ones(3, 2), torch.ones(3)], 0.0, batched=True)
    inverse = Jacobi(given).build(linear)(torch.ones(5, 3))
    assert torch.equal(inverse, torch.tensor([1, 0.5, 0.25]).expand(5, 3))


def test_the_users_diagonal_is_read_anew_for_each_solve():
    state, given = SolverState(), [torch.full((4,), 2.0)]
    preconditioner = Jacobi(given)
    assert prepare(preconditioner, linear_system(), state)(torch.ones(1, 4)).tolist() == [[0.5] * 4]
    given[0].fill_(4)
    assert prepare(preconditioner, linear_system(), state)(torch.ones(1, 4)).tolist() == [[0.25] * 4]
    assert prepare(Jacobi([torch.ones(4)]), linear_system(), state)(torch.ones(1, 4)).tolist() == [[1] * 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.ones(3)], r"\[\(4,\)\], got \[\(3,\)\]"),
        ([torch.ones(4), torch.ones(1)], r"got \[\(4,\), \(1,\)\]"),
        ([torch.ones(1, 4)], r"got \[\(1, 4\)\]"),
        ([torch.tensor([1, 1, 1, float("nan")])], "diagonal is not finite"),
    ],
)
def test_the_users_diagonal_is_checked(given, message):
    with pytest.raises(ValueError, match=message):
        Jacobi(given).build(linear_system())


@pytest.mark.parametrize("probes", [2, 8])
def test_an_operator_of_nan_has_no_preconditioner(probes):
    linear = LinearSystem(lambda v: [v[0] * torch.nan], [torch.ones(4)], 0.0, batched=False)
    assert Jacobi(probes=probes).build(linear) is None
    x, stats = ConjugateGradient(preconditioner=Jacobi(probes=probes)).solve(
        lambda v: [v[0] * torch.nan], [torch.ones(4)]
    )
    assert not x[0].any()
    assert (stats.residual, stats.stop_reason) == (1, "not finite")


def test_reproducible_and_without_a_trace_in_the_global_random_state():
    operator = Operator(with_eigenvalues(torch.linspace(1, 9, 30, dtype=torch.float64)))
    linear = LinearSystem(operator, [gaussian(30)], 0.0, batched=False)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = diagonal_of(Jacobi(), linear)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(diagonal_of(Jacobi(), linear), first)
    assert not torch.equal(diagonal_of(Jacobi(seed=1), linear), first)


def test_low_precision():
    linear = LinearSystem(lambda v: [2 * v[0]], [torch.ones(20, dtype=torch.bfloat16)], 0.0, batched=False)
    rows = Jacobi().build(linear)(torch.ones(3, 20, dtype=torch.bfloat16))
    assert torch.equal(rows, torch.full((3, 20), 0.5, dtype=torch.bfloat16))


def test_a_state_that_holds_one_can_be_copied_and_saved():
    state = SolverState()
    rows = gaussian(2, 4, dtype=torch.float32)
    wanted = prepare(Jacobi(), linear_system(), state)(rows)
    for again in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        linear = linear_system()
        assert torch.equal(prepare(Jacobi(), linear, again)(rows), wanted)
        assert linear.matvecs == 0


@pytest.mark.parametrize("diagonal", ["given", "estimated"])
def test_cuts_the_steps_where_curvatures_differ(diagonal):
    scale = torch.logspace(-1, 1, 200, dtype=torch.float64)
    matrix = scale[:, None] * with_eigenvalues(torch.linspace(1, 3, 200, dtype=torch.float64)) * scale  # condition 2e4
    given = [matrix.diagonal().clone()] if diagonal == "given" else None
    rhs = [gaussian(200)]
    plain, jacobi = Operator(matrix), Operator(matrix)
    ConjugateGradient(steps=1000, tol=1e-8).solve(plain, rhs)
    x, stats = ConjugateGradient(steps=1000, tol=1e-8, preconditioner=Jacobi(given)).solve(jacobi, rhs)
    torch.testing.assert_close(x[0], torch.linalg.solve(matrix, rhs[0]), rtol=1e-5, atol=1e-8)
    assert stats.converged
    assert stats.matvecs == jacobi.products < plain.products / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "probes must be"),
        ({"refresh": 0}, "refresh must be"),
        ({"refresh": 2.0}, "refresh must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"seed": True}, "seed must be"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Jacobi(**arguments)
