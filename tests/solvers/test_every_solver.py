"""What every solver must do. A test's decorator names the solvers that lack what it claims, each with the reason."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import math
import pickle
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

import auxfast.solvers
from auxfast.solvers import (
    GMRES,
    MINRES,
    SAMA,
    BlockDiagonal,
    Chebyshev,
    CompactMINRES,
    ConjugateGradient,
    Dense,
    GradientFlow,
    Identity,
    Jacobi,
    Neumann,
    NormalEquations,
    Nystrom,
    OneStep,
    SingleLoop,
    Solver,
    SolverState,
    SolveStats,
)

from .systems import SIZE, Operator, cut, flat, gaussian, symmetric, with_eigenvalues

UNIFORM = torch.linspace(0.1, 1, SIZE, dtype=torch.float64)  # eigenvalues, of which Neumann's step_size=1 contracts all

SOLVERS: dict[str, Solver] = {
    "Identity": Identity(0.7),
    "OneStep": OneStep(0.7),
    "SingleLoop": SingleLoop(0.7),
    "Neumann": Neumann(500, 1.0),
    "Neumann, tolerance": Neumann(500, 1.0, tol=1e-8),
    "Neumann, auto": Neumann(500, tol=1e-8),
    "Chebyshev": Chebyshev(500, (0.05, 1.5), tol=1e-8),
    "Chebyshev, auto": Chebyshev(500, tol=1e-8),
    "Chebyshev, Jacobi": Chebyshev(500, tol=1e-8, preconditioner=Jacobi()),
    "ConjugateGradient": ConjugateGradient(tol=1e-8),
    "ConjugateGradient, Nystrom": ConjugateGradient(tol=1e-8, preconditioner=Nystrom(5)),
    "MINRES": MINRES(tol=1e-8),
    "MINRES, Jacobi": MINRES(tol=1e-8, preconditioner=Jacobi()),
    "GMRES": GMRES(tol=1e-8),
    "NormalEquations": NormalEquations(tol=1e-8),
    "Nystrom": Nystrom(20, tol=1e-8),
    "Dense": Dense(tol=1e-8),
    "GradientFlow": GradientFlow(20.0, tol=1e-8),
}
NO_SYSTEM = {"GradientFlow": "it solves no linear system, and has no residual; test_gradient_flow.py has its claims"}
NO_PRODUCT = {"OneStep": "it spends no product, so that its residual is not known"}
APPROXIMATES = {
    "Identity": "it approximates H by a multiple of the identity",
    "SingleLoop": "it comes nearer by one step in each call",
    **NO_PRODUCT,
    **NO_SYSTEM,
}
FIXED_STEP = dict.fromkeys(("Neumann", "Neumann, tolerance", "Chebyshev"), "its step or bounds are for one scale")
NO_WARM_START = dict.fromkeys(
    ("Identity", "OneStep", "SingleLoop", "Nystrom", "Dense", "GradientFlow"), "it has no such setting"
)


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


def true_residual(matrix: Tensor, x: Tensor, b: Tensor, damping: float = 0.0) -> float:
    """The relative residual of `(matrix + damping I) x = b`, in float64."""
    matrix, x, b = (tensor.double() for tensor in (matrix, x, b))
    return float((b - matrix @ x - damping * x).norm() / b.norm())


def rounding_error(matrix: Tensor, x: Tensor, b: Tensor) -> float:
    """The error of a residual, relative to the right-hand side, that rounding makes in `b - matrix x`."""
    sizes = matrix.abs() @ x.abs() + b.abs()
    return 2 * torch.finfo(b.dtype).eps * float(sizes.norm() / b.norm())


def test_every_solver_is_here():
    offered = {getattr(auxfast.solvers, name) for name in auxfast.solvers.__all__}
    classes = {
        cls for cls in offered if inspect.isclass(cls) and dataclasses.is_dataclass(cls) and hasattr(cls, "solve")
    }
    # They need a block diagonal H, an optimizer, and one right-hand side, and have tests of their own.
    classes -= {BlockDiagonal, SAMA, CompactMINRES}
    assert {cls for cls in classes if not inspect.isabstract(cls)} == {type(solver) for solver in SOLVERS.values()}


# -------------------------------------------------------------------------------------------------------------- answers


@every_solver(APPROXIMATES)
def test_a_list_of_tensors_is_solved(solver, device):
    """A list of tensors of several shapes is solved to a relative residual of 1e-6."""
    system = symmetric(device=device)
    x, stats = solver.solve(system.matvec, system.rhs)
    torch.testing.assert_close(flat(x), system.solution(), rtol=1e-5, atol=1e-5)
    assert [(t.shape, t.dtype, t.device) for t in x] == [(b.shape, b.dtype, b.device) for b in system.rhs]
    assert stats.residual <= 1e-6
    assert not stats.negative_curvature
    assert stats.matvecs == system.products


@every_solver(APPROXIMATES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (2, 2)], ids=str)
def test_tensors_of_any_shape_are_solved(solver, shape, device):
    b = torch.ones(shape, dtype=torch.float64, device=device)
    (x,), stats = solver.solve(lambda v: [1.25 * v[0]], [b])
    torch.testing.assert_close(x, b / 1.25, rtol=1e-6, atol=0)
    assert stats.residual <= 1e-6


@every_solver(NO_SYSTEM, NO_PRODUCT)
@spectra
@dtypes
def test_residual_is_true(solver, values, dtype, device):
    operator, b = Operator(with_eigenvalues(values, dtype).to(device)), gaussian(len(values), dtype=dtype).to(device)
    (x,), stats = solver.solve(operator, [b])
    assert x.isfinite().all()
    assert stats.residual == pytest.approx(
        true_residual(operator.matrix, x, b), rel=1e-3, abs=rounding_error(operator.matrix, x, b)
    )
    assert stats.matvecs == operator.products


@every_solver(
    dict.fromkeys(("Identity", "SingleLoop"), "a scale that is wrong makes it worse than x = 0"), NO_SYSTEM, NO_PRODUCT
)
@spectra
@dtypes
def test_residual_is_a_bound(solver, values, dtype, device):
    """The solution is no worse than its figure says, and not worse than x = 0."""
    operator, b = Operator(with_eigenvalues(values, dtype).to(device)), gaussian(len(values), dtype=dtype).to(device)
    (x,), stats = solver.solve(operator, [b])
    assert x.isfinite().all()
    assert true_residual(operator.matrix, x, b) <= stats.residual + rounding_error(operator.matrix, x, b)
    assert stats.residual <= 1


@every_solver(NO_PRODUCT)
@spectra
def test_stats_are_consistent(solver, values):
    operator = Operator(with_eigenvalues(values))
    _, stats = solver.solve(operator, [gaussian(len(values))])
    tol = getattr(solver, "tol", None) or 0.0
    assert stats.residual == max(stats.residuals)
    assert stats.converged == (stats.residual <= tol)
    assert (stats.stop_reason == "converged") == stats.converged
    assert stats.stop_reason in ("converged", "steps", "negative curvature", "diverged", "stagnated")
    assert 0 <= stats.iterations <= getattr(solver, "steps", isinstance(solver, SingleLoop))
    assert stats.largest_eigenvalue is None or stats.largest_eigenvalue <= float(values.max()) + 1e-9


@every_solver(dict.fromkeys(("Identity", "SingleLoop"), "it has no damping"), NO_SYSTEM, NO_PRODUCT)
def test_damping_is_a_shift(solver, device):
    """Damping is added to all eigenvalues, and makes an indefinite H definite. The estimate of the largest is of H."""
    operator, b = Operator(with_eigenvalues(UNIFORM - 0.2).to(device)), gaussian(SIZE).to(device)
    shifted = Operator(operator.matrix + 0.3 * torch.eye(SIZE, dtype=b.dtype, device=device))
    (x,), stats = dataclasses.replace(solver, damping=0.3).solve(operator, [b])
    (wanted,), undamped = solver.solve(shifted, [b])
    torch.testing.assert_close(x, wanted, rtol=1e-6, atol=1e-6)
    assert true_residual(operator.matrix, x, b, damping=0.3) <= stats.residual + 1e-12
    assert (stats.largest_eigenvalue is None) == (undamped.largest_eigenvalue is None)
    if undamped.largest_eigenvalue is not None:
        assert stats.largest_eigenvalue == pytest.approx(undamped.largest_eigenvalue - 0.3, rel=1e-6)


@every_solver(APPROXIMATES, FIXED_STEP)
@dtypes
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40], ids=["small", "large"])
def test_scale_does_not_matter(solver, dtype, scale, device):
    """The same solution for as much work, whatever H and b are multiplied with."""
    operator, b = Operator(with_eigenvalues(UNIFORM, dtype).to(device)), gaussian(SIZE, dtype=dtype).to(device)
    (x,), stats = solver.solve(operator, [b])
    scaled_operator = Operator(scale * operator.matrix)
    (scaled,), scaled_stats = solver.solve(scaled_operator, [scale * b])
    torch.testing.assert_close(scaled, x, rtol=1e-4, atol=1e-4)
    assert scaled_stats.residual == pytest.approx(stats.residual, rel=1e-3, abs=rounding_error(operator.matrix, x, b))
    assert (scaled_stats.iterations, scaled_stats.stop_reason) == (stats.iterations, stats.stop_reason)


@every_solver(APPROXIMATES)
def test_bfloat16_is_solved_to_its_precision(solver, device):
    b = torch.ones(100, dtype=torch.bfloat16, device=device)
    (x,), stats = solver.solve(lambda v: [0.5 * v[0]], [b])
    torch.testing.assert_close(x, 2 * b, rtol=0.05, atol=0)
    assert x.dtype == torch.bfloat16
    assert stats.residual < 0.05


# --------------------------------------------------------------------------------------------- several right-hand sides


@every_solver(NO_PRODUCT)
@pytest.mark.parametrize("plain", [False, True], ids=["batched", "plain"])
def test_batched_is_one_at_a_time(solver, plain, device):
    """Right-hand sides, one of zeros, one long and one an eigenvector, have the solutions that each has alone. `plain`:
    the matvec has no batched products."""
    operator = Operator(with_eigenvalues(UNIFORM).to(device))
    eigenvector = torch.linalg.eigh(operator.matrix)[1][:, SIZE // 2].cpu()
    b = torch.stack([gaussian(SIZE), torch.zeros(SIZE).double(), 1e3 * gaussian(SIZE, seed=5), eigenvector]).to(device)
    (x,), stats = solver.solve((lambda v: operator(v)) if plain else operator, [b], batched=True)
    assert stats.matvecs == operator.products
    assert x.shape == b.shape
    for row, solution, residual in zip(b, x, stats.residuals, strict=True):
        (alone,), one = solver.solve(operator, [row])
        torch.testing.assert_close(solution, alone, rtol=1e-5, atol=1e-5)
        assert residual == pytest.approx(one.residual, rel=1e-6, abs=1e-6)
    assert stats.residuals[1] == 0
    assert not x[1].any()
    assert stats.residual == max(stats.residuals)


# ------------------------------------------------------------------------------------------------------ right-hand side


def not_a_number(vectors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.full_like(v, torch.nan) for v in vectors]


@every_solver()
def test_zero_right_hand_side_has_the_zero_solution(solver, device):
    for b in ([torch.zeros(3, device=device)], [torch.zeros(0)], [torch.zeros(()), torch.zeros(2)]):
        x, stats = solver.solve(not_a_number, b)
        torch.testing.assert_close(x, b)
        assert (stats.residual, stats.residuals, stats.converged, stats.stop_reason) == (0.0, (0.0,), True, "trivial")


def no_product(vectors: Sequence[Tensor]) -> list[Tensor]:
    pytest.fail("no product is needed")


@every_solver({"Identity": "the product of its certificate is all that it spends, and is spent"})
def test_zero_right_hand_side_costs_nothing(solver):
    _, stats = solver.solve(no_product, [torch.zeros(3)])
    assert (stats.matvecs, stats.iterations) == (0, 0)


@every_solver()
def test_right_hand_side_stays_and_solution_has_no_graph(solver):
    """Products that record a graph leave none in the solution either."""
    weight, b = torch.full((6,), 0.5, requires_grad=True), torch.ones(6, requires_grad=True)
    (x,), _ = solver.solve(lambda v: [weight * v[0]], [b])
    assert b.tolist() == [1.0] * 6
    assert x.data_ptr() != b.data_ptr()
    assert not x.requires_grad


@every_solver()
def test_right_hand_side_is_checked(solver):
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="rhs is not finite"):
            solver.solve(list, [torch.ones(3), torch.tensor(value)])
    with pytest.raises(ValueError, match="rhs is empty"):
        solver.solve(list, [])
    with pytest.raises(ValueError, match="one floating dtype on one device"):
        solver.solve(list, [torch.ones(3), torch.ones(3).double()])
    with pytest.raises(ValueError, match="one axis of right-hand sides"):
        solver.solve(list, [torch.ones(3, 2), torch.ones(2, 2)], batched=True)


# ------------------------------------------------------------------------------------------------------------- products


@every_solver(NO_PRODUCT)
def test_wrong_products_are_refused(solver):
    for matvec in (lambda v: [v[0][:2], v[1]], lambda v: v[:1]):
        with pytest.raises(RuntimeError, match=r"for tensor 0|parameters|neumann_step_"):
            solver.solve(matvec, [torch.ones(4), torch.ones(4)])


@every_solver(NO_SYSTEM, NO_PRODUCT)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("for_good", [True, False], ids=["for good", "once"])
@pytest.mark.parametrize("first", [1, 2, 3, 5, 9, 10, 11, 13, 20, 21])
def test_products_that_are_not_finite_do_no_harm(solver, value, for_good, first, device):
    """The answer is finite and its figure holds, though product `first` (`for_good`: and each after it) is not."""
    system = symmetric(device=device)

    def matvec(vectors: Sequence[Tensor]) -> list[Tensor]:
        products = system.matvec(vectors)
        broken = system.products >= first if for_good else system.products == first
        return [t * value for t in products] if broken else products

    x, stats = solver.solve(matvec, system.rhs)
    assert flat(x).isfinite().all()
    assert system.residual(x) <= stats.residual * (1 + 1e-6)
    assert stats.residual <= 1
    assert all(math.isfinite(value) for value in dataclasses.astuple(stats) if isinstance(value, float))
    if for_good and system.products >= first:
        assert (stats.converged, stats.stop_reason in ("diverged", "not finite")) == (False, True)
    if for_good and first == 1:
        assert (stats.residual, stats.stop_reason) == (1, "not finite")
        assert not flat(x).any()
    assert stats.matvecs == system.products


# ---------------------------------------------------------------------------------------------------------------- state


def saved_and_loaded(state: SolverState) -> SolverState:
    file = io.BytesIO()
    torch.save(vars(state), file)
    file.seek(0)
    return SolverState(**torch.load(file, weights_only=True))


@every_solver(NO_PRODUCT, {"SingleLoop": "each call comes nearer, which is what its state is for"})
def test_state_is_reusable(solver, device):
    """A second solve of the same system is as good; the state can be copied and saved between, and loaded as data."""
    state = SolverState()
    system = symmetric(device=device)
    _, first = solver.solve(system.matvec, system.rhs, state=state)
    copies = [copy.deepcopy(state), pickle.loads(pickle.dumps(state)), saved_and_loaded(state), state]
    solutions = []
    for again in copies:
        x, stats = solver.solve(system.matvec, system.rhs, state=again)
        assert stats.residual <= max(first.residual, 1e-6)
        solutions.append(flat(x))
    assert all(torch.equal(x, solutions[0]) for x in solutions)


@every_solver(APPROXIMATES)
def test_state_of_another_system_does_no_harm(solver):
    for other in (Operator(1e-3 * with_eigenvalues(UNIFORM)), Operator(with_eigenvalues(UNIFORM[:7]))):
        state = SolverState()
        solver.solve(other, [gaussian(len(other.matrix))], state=state)
        for _ in range(2):  # a step that is far too small is seen in the end only
            system = symmetric()
            x, stats = solver.solve(system.matvec, system.rhs, state=state)
        assert system.residual(x) <= stats.residual + 1e-12
        assert stats.residual <= 1e-6


@every_solver(
    NO_WARM_START,
    {"Neumann": "without a tolerance it does not stop at a solution that is good enough"},
    {"NormalEquations": "it takes as many steps as there are entries, from any start"},
)
def test_warm_start_begins_at_the_solution_in_the_state(solver):
    """It takes one product, and only a solution that helps."""
    solver, cold = (dataclasses.replace(solver, warm_start=warm) for warm in (True, False))
    system, state = symmetric(), SolverState()
    x, first = solver.solve(system.matvec, system.rhs, state=state)
    torch.testing.assert_close(state.solution, x)
    _, again = solver.solve(system.matvec, system.rhs, state=state)
    assert (again.iterations, again.matvecs, again.converged) == (0, 1, True)
    near = cut(flat(system.rhs) * (1 + 1e-3 * gaussian(SIZE)))
    _, warm = solver.solve(system.matvec, near, state=state)
    assert warm.converged
    assert warm.matvecs < first.matvecs

    for useless in (cut(1e3 * flat(system.rhs)), cut(flat(system.rhs) * torch.nan), [torch.ones(2)]):
        x, stats = solver.solve(system.matvec, system.rhs, state=SolverState(useless))
        assert stats.converged
        torch.testing.assert_close(flat(x), system.solution(), rtol=1e-5, atol=1e-5)

    state = SolverState()
    cold.solve(system.matvec, system.rhs, state=state)
    assert state.solution is None


# ------------------------------------------------------------------------------------------------------ reproducibility


def assert_same_bits(results: Sequence[tuple[list[Tensor], SolveStats]]) -> None:
    (wanted, wanted_stats), *others = results
    for x, stats in others:
        assert all(torch.equal(a, b) for a, b in zip(x, wanted, strict=True))
        assert stats == wanted_stats


@every_solver()
def test_same_bits_on_every_run(solver):
    """The global random state plays no part, and stays as it is."""
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        system = symmetric()
        results.append(solver.solve(system.matvec, system.rhs))
        assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(results)


MATRIX_PRODUCTS = dict.fromkeys(
    (
        "Neumann, auto",
        "Chebyshev, auto",
        "Chebyshev, Jacobi",
        "ConjugateGradient, Nystrom",
        "GMRES",
        "Nystrom",
        "Dense",
        "GradientFlow",
    ),
    "torch's matrix products add in an order that depends on the number of threads",
)


@pytest.mark.slow
@every_solver(MATRIX_PRODUCTS)
def test_same_bits_for_any_number_of_threads(solver):
    curvature = torch.linspace(0.1, 1, 200_003)
    b = [torch.randn(200_003, generator=torch.Generator().manual_seed(0))]
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(solver.solve(lambda v: [curvature * v[0]], b))
    assert_same_bits(results)


ITERATIVE = {
    "Neumann": Neumann(1, 1.0),
    "Neumann, tolerance": Neumann(1, 1.0, 1e-12),
    "Neumann, auto": Neumann(1, tol=1e-12),
    "Chebyshev": Chebyshev(1, (1e-3, 1.0), 1e-12),
    "ConjugateGradient": ConjugateGradient(1, 1e-15),
    "MINRES": MINRES(1, 1e-15),
    "GMRES": GMRES(1, 100, 1e-15),
    "NormalEquations": NormalEquations(1, 1e-15),
    "GradientFlow": GradientFlow(1e5, 1, tol=1e-15),
}


@pytest.mark.parametrize("solver", ITERATIVE.values(), ids=ITERATIVE.keys())
def test_waits_for_a_gpu_every_8_steps_only(solver, set_check_every, monkeypatch):
    """24 more steps take 3 more readings of numbers; on a GPU, every reading is a wait."""
    set_check_every(8)
    operator, b = Operator(with_eigenvalues(torch.logspace(-5, 0, 100, dtype=torch.float64))), gaussian(100)

    def solve(steps):
        return dataclasses.replace(solver, steps=steps).solve(operator, [b])[1]

    reads: list[str] = []
    for name in ("item", "tolist", "cpu", "nonzero", "__float__", "__bool__"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, _m=method, _n=name: (reads.append(_n), _m(self, *a))[1])
    counts = []
    for steps in (24, 48):
        reads.clear()
        assert solve(steps).iterations == steps
        counts.append(len(reads))
    assert counts[1] - counts[0] == 3


# ------------------------------------------------------------------------------------------------------------- settings


NOT_POSITIVE = [0, 0.0, -1.0, math.nan, math.inf, True, "1"]
NOT_AT_LEAST_ONE = [0, -1, 1.5, True, None]
COUNT = "must be an integer of at least 1"
WRONG = {
    **dict.fromkeys(("steps", "restart", "rank", "refresh", "max_size"), (COUNT, NOT_AT_LEAST_ONE)),
    "tol": ("must be", [0, 1, 1.5, -1e-3, math.nan, math.inf, True, "1e-3"]),
    "damping": ("must be a finite number of at least 0", [-1e-9, -1.0, math.nan, math.inf, False, "0"]),
    "seed": ("must be an integer from 0 to", [-1, 2**64, 1.5, True]),
    **dict.fromkeys(("warm_start", "certify", "floored", "lookahead"), ("must be True or False", [0, 1, None, "no"])),
    **dict.fromkeys(("scale", "time", "learning_rate", "lr"), ("must be a finite number above 0", NOT_POSITIVE)),
    "step_size": ("must be a finite number above 0", [*NOT_POSITIVE, "best"]),
    "mixed": ("must be 'exact' or 'difference'", ["", "central", None]),
    "bounds": ('must be "auto" or two numbers', [(1.0, 0.5), (0.0, 0.5), (0.1, math.inf), (0.1,), "wide", 3.0]),
}
FREE = {"preconditioner"}  # it has settings of its own
SETTINGS = [
    (solver, setting.name, value, WRONG[setting.name][0])
    for solver in {type(solver): solver for solver in SOLVERS.values()}.values()
    for setting in dataclasses.fields(solver)
    if setting.name not in FREE
    for value in WRONG[setting.name][1]
]


@pytest.mark.parametrize(("solver", "name", "value", "message"), SETTINGS)
def test_settings_are_checked(solver, name, value, message):
    with pytest.raises(ValueError, match=rf"^{name}\b.*{message}"):
        dataclasses.replace(solver, **{name: value})


def test_extreme_settings_are_allowed():
    assert Neumann(steps=1, step_size=1e-300, tol=1e-12, damping=0).damping == 0
    assert Neumann(tol=None).tol is None


@every_solver()
def test_a_solver_is_a_value(solver):
    same = dataclasses.replace(solver)
    assert same == solver
    assert hash(same) == hash(solver)
    name = dataclasses.fields(solver)[0].name
    with pytest.raises(AttributeError):
        setattr(solver, name, 1)


@every_solver(NO_PRODUCT)
@pytest.mark.parametrize("first", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_products_at_the_end_of_the_range_do_no_harm(solver, first, scale):
    """An entry of the products is the largest number that there is, from the `first` on."""
    calls = 0

    def matvec(v: Sequence[Tensor]) -> list[Tensor]:
        nonlocal calls
        calls += 1
        product = scale * UNIFORM * v[0]
        if calls >= first:
            product[0] = torch.finfo(product.dtype).max
        return [product]

    (x,), stats = solver.solve(matvec, [gaussian(SIZE)])
    assert x.isfinite().all()
    assert stats.residual >= 0
