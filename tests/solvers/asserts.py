"""Claims that every solver must keep: one function each, for all solvers of auxfast and for any other."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from auxfast.solvers import Solver, SolverState, SolveStats

from .systems import SIZE, Operator, cut, flat, gaussian, symmetric, with_eigenvalues

Solution = tuple[list[Tensor], SolveStats]
UNIFORM = torch.linspace(0.1, 1, SIZE, dtype=torch.float64)  # eigenvalues, of which Neumann's step_size=1 contracts all


def true_residual(matrix: Tensor, x: Tensor, b: Tensor, damping: float = 0.0) -> float:
    """The relative residual of `(matrix + damping I) x = b`, in float64."""
    matrix, x, b = (tensor.double() for tensor in (matrix, x, b))
    return float((b - matrix @ x - damping * x).norm() / b.norm())


def no_product(vectors: Sequence[Tensor]) -> list[Tensor]:
    pytest.fail("no product is needed")


def not_a_number(vectors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.full_like(v, torch.nan) for v in vectors]


# ------------------------------------------------------------------------------------------------------------- answers


def assert_solves(solver: Solver, device: str) -> None:
    """A list of tensors of several shapes is solved to a relative residual of 1e-6."""
    system = symmetric(device=device)
    x, stats = solver.solve(system.matvec, system.rhs)
    torch.testing.assert_close(flat(x), system.solution(), rtol=1e-5, atol=1e-5)
    assert [(t.shape, t.dtype, t.device) for t in x] == [(b.shape, b.dtype, b.device) for b in system.rhs]
    assert stats.residual <= 1e-6
    assert not stats.negative_curvature
    assert stats.matvecs == system.products


def assert_any_shape(solver: Solver, shape: tuple[int, ...], device: str) -> None:
    b = torch.ones(shape, dtype=torch.float64, device=device)
    (x,), stats = solver.solve(lambda v: [1.25 * v[0]], [b])
    torch.testing.assert_close(x, b / 1.25, rtol=1e-6, atol=0)
    assert stats.residual <= 1e-6


def assert_residual_is_true(solver: Solver, values: Tensor, dtype: torch.dtype, device: str) -> None:
    operator, b = Operator(with_eigenvalues(values, dtype).to(device)), gaussian(len(values), dtype=dtype).to(device)
    (x,), stats = solver.solve(operator, [b])
    assert x.isfinite().all()
    rounding = _rounding(operator.matrix, x, b)
    assert stats.residual == pytest.approx(true_residual(operator.matrix, x, b), rel=1e-3, abs=rounding)
    assert stats.matvecs == operator.products


def assert_residual_is_a_bound(solver: Solver, values: Tensor, dtype: torch.dtype, device: str) -> None:
    """The solution is no worse than its figure says, and not worse than x = 0."""
    operator, b = Operator(with_eigenvalues(values, dtype).to(device)), gaussian(len(values), dtype=dtype).to(device)
    (x,), stats = solver.solve(operator, [b])
    assert x.isfinite().all()
    assert true_residual(operator.matrix, x, b) <= stats.residual + _rounding(operator.matrix, x, b)
    assert stats.residual <= 1


def _rounding(matrix: Tensor, x: Tensor, b: Tensor) -> float:
    """The error of a residual, relative to the right-hand side, that rounding makes in `b - matrix x`."""
    sizes = matrix.abs() @ x.abs() + b.abs()
    return 2 * torch.finfo(b.dtype).eps * float(sizes.norm() / b.norm())


def assert_stats_are_consistent(solver: Any, values: Tensor) -> None:
    operator = Operator(with_eigenvalues(values))
    _, stats = solver.solve(operator, [gaussian(len(values))])
    tol = getattr(solver, "tol", None) or 0.0
    assert stats.residual == max(stats.residuals)
    assert stats.converged == (stats.residual <= tol)
    assert (stats.stop_reason == "converged") == stats.converged
    assert stats.stop_reason in ("converged", "steps", "negative curvature", "diverged", "stagnated")
    assert 0 <= stats.iterations <= getattr(solver, "steps", 0)
    assert stats.largest_eigenvalue is None or stats.largest_eigenvalue <= float(values.max()) + 1e-9


def assert_damping_is_a_shift(solver: Any, device: str) -> None:
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


def assert_scale_invariant(solver: Solver, dtype: torch.dtype, scale: float, device: str) -> None:
    """The same solution for as much work, whatever H and b are multiplied with."""
    operator, b = Operator(with_eigenvalues(UNIFORM, dtype).to(device)), gaussian(SIZE, dtype=dtype).to(device)
    (x,), stats = solver.solve(operator, [b])
    scaled_operator = Operator(scale * operator.matrix)
    (scaled,), scaled_stats = solver.solve(scaled_operator, [scale * b])
    torch.testing.assert_close(scaled, x, rtol=1e-4, atol=1e-4)
    assert scaled_stats.residual == pytest.approx(stats.residual, rel=1e-3, abs=_rounding(operator.matrix, x, b))
    assert (scaled_stats.iterations, scaled_stats.stop_reason) == (stats.iterations, stats.stop_reason)


def assert_low_precision(solver: Solver, device: str) -> None:
    b = torch.ones(100, dtype=torch.bfloat16, device=device)
    (x,), stats = solver.solve(lambda v: [0.5 * v[0]], [b])
    torch.testing.assert_close(x, 2 * b, rtol=0.05, atol=0)
    assert x.dtype == torch.bfloat16
    assert stats.residual < 0.05


# ------------------------------------------------------------------------------------------- several right-hand sides


def assert_batched_is_one_at_a_time(solver: Solver, plain: bool, device: str) -> None:
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


# ----------------------------------------------------------------------------------------------------- right-hand side


def assert_zero_rhs(solver: Solver, device: str) -> None:
    """The solution is zero, whatever the operator."""
    for b in ([torch.zeros(3, device=device)], [torch.zeros(0)], [torch.zeros(()), torch.zeros(2)]):
        x, stats = solver.solve(not_a_number, b)
        torch.testing.assert_close(x, b)
        assert (stats.residual, stats.residuals, stats.converged, stats.stop_reason) == (0.0, (0.0,), True, "trivial")


def assert_zero_rhs_costs_nothing(solver: Solver) -> None:
    _, stats = solver.solve(no_product, [torch.zeros(3)])
    assert (stats.matvecs, stats.iterations) == (0, 0)


def assert_rhs_stays_and_solution_has_no_graph(solver: Solver) -> None:
    """Products that record a graph leave none in the solution either."""
    weight, b = torch.full((6,), 0.5, requires_grad=True), torch.ones(6, requires_grad=True)
    (x,), _ = solver.solve(lambda v: [weight * v[0]], [b])
    assert b.tolist() == [1.0] * 6
    assert x.data_ptr() != b.data_ptr()
    assert not x.requires_grad


def assert_rhs_is_checked(solver: Solver) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="rhs is not finite"):
            solver.solve(list, [torch.ones(3), torch.tensor(value)])
    with pytest.raises(ValueError, match="rhs is empty"):
        solver.solve(list, [])
    with pytest.raises(ValueError, match="one floating dtype on one device"):
        solver.solve(list, [torch.ones(3), torch.ones(3).double()])
    with pytest.raises(ValueError, match="one axis of right-hand sides"):
        solver.solve(list, [torch.ones(3, 2), torch.ones(2, 2)], batched=True)


# ------------------------------------------------------------------------------------------------------------ products


def assert_wrong_products_are_refused(solver: Solver) -> None:
    for matvec in (lambda v: [v[0][:2], v[1]], lambda v: v[:1]):
        with pytest.raises(RuntimeError, match=r"shape|for tensor 0|parameters|one length"):
            solver.solve(matvec, [torch.ones(4), torch.ones(4)])


def assert_broken_products_do_no_harm(solver: Solver, value: float, first: int, for_good: bool, device: str) -> None:
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
    if for_good and system.products >= first:
        assert (stats.converged, stats.stop_reason) == (False, "diverged")
    if for_good and first == 1:
        assert stats.residual == 1
        assert not flat(x).any()


# ---------------------------------------------------------------------------------------------------------------- state


def assert_state_reusable(solver: Solver, device: str) -> None:
    """A second solve of the same system is as good; the state can be copied and saved between, and loaded as data."""
    state = SolverState()
    system = symmetric(device=device)
    _, first = solver.solve(system.matvec, system.rhs, state=state)
    copies = [copy.deepcopy(state), pickle.loads(pickle.dumps(state)), _saved_and_loaded(state), state]
    solutions = []
    for again in copies:
        x, stats = solver.solve(system.matvec, system.rhs, state=again)
        assert stats.residual <= max(first.residual, 1e-6)
        solutions.append(flat(x))
    assert all(torch.equal(x, solutions[0]) for x in solutions)


def _saved_and_loaded(state: SolverState) -> SolverState:
    file = io.BytesIO()
    torch.save(vars(state), file)
    file.seek(0)
    return SolverState(**torch.load(file, weights_only=True))


def assert_state_of_another_system_does_no_harm(solver: Solver) -> None:
    for other in (Operator(1e-3 * with_eigenvalues(UNIFORM)), Operator(with_eigenvalues(UNIFORM[:7]))):
        state = SolverState()
        solver.solve(other, [gaussian(len(other.matrix))], state=state)
        for _ in range(2):  # a step that is far too small is seen in the end only
            system = symmetric()
            x, stats = solver.solve(system.matvec, system.rhs, state=state)
        assert system.residual(x) <= stats.residual + 1e-12
        assert stats.residual <= 1e-6


def assert_warm_start(solver: Any) -> None:
    """The setting `warm_start` starts from the solution in the state, at one product, if that helps."""
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


# ----------------------------------------------------------------------------------------------------- reproducibility


def assert_same_bits_on_every_run(solver: Solver) -> None:
    """The global random state plays no part, and stays as it is."""
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        system = symmetric()
        results.append(solver.solve(system.matvec, system.rhs))
        assert torch.equal(torch.get_rng_state(), before)
    _assert_same_bits(results)


def assert_same_bits_for_any_number_of_threads(solver: Solver) -> None:
    curvature = torch.linspace(0.1, 1, 200_003)
    b = [torch.randn(200_003, generator=torch.Generator().manual_seed(0))]
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(solver.solve(lambda v: [curvature * v[0]], b))
    _assert_same_bits(results)


def _assert_same_bits(results: Sequence[Solution]) -> None:
    (wanted, wanted_stats), *others = results
    for x, stats in others:
        assert all(torch.equal(a, b) for a, b in zip(x, wanted, strict=True))
        assert stats == wanted_stats


def assert_reads_every_eighth_step(solve: Callable[[int], SolveStats], monkeypatch: pytest.MonkeyPatch) -> None:
    """`solve(steps)` waits for the device once more for 8 more steps; on a GPU, every reading is a wait."""
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


def assert_setting_is_checked(cls: Callable[..., Solver], name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b.*{message}"):
        cls(**{name: value})


def assert_is_a_value(solver: Any) -> None:
    same = dataclasses.replace(solver)
    assert same == solver
    assert hash(same) == hash(solver)
    name = dataclasses.fields(solver)[0].name
    with pytest.raises(AttributeError):
        setattr(solver, name, 1)
