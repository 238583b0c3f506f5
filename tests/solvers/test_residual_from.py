"""The recurrence's residual is reported where it is the true one, and a product is spent where it may not be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxfast
from auxfast.solvers import MINRES, ConjugateGradient, Jacobi, Neumann, OneStep, SolverState

from .systems import Operator, gaussian, with_eigenvalues

SOLVERS = [ConjugateGradient, MINRES]
both = pytest.mark.parametrize("solver", SOLVERS)
DTYPES = [torch.float32, torch.float64]
SPECTRA = {
    "well conditioned": torch.linspace(0.1, 1, 60),
    "condition 1e3": torch.logspace(-3, 0, 60),
    "condition 1e6": torch.logspace(-6, 0, 60),
    "condition 1e12": torch.logspace(-12, 0, 60),
    "few large": torch.cat([torch.linspace(1e-5, 1e-4, 50), torch.linspace(0.1, 1, 10)]),
    "indefinite": torch.linspace(-0.5, 1, 60),
    "singular": torch.cat([torch.zeros(5), torch.linspace(0.1, 1, 55)]),
}


class Exact(Operator):
    """An operator that says of its products that they are exact, whether or not that is true."""

    exact = True


class Claims:
    """A function of one vector as an operator that says the same."""

    exact = True

    def __init__(self, multiply: Callable[[Tensor], Tensor]) -> None:
        self.multiply, self.products = multiply, 0

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        self.products += 1
        return [self.multiply(vectors[0])]

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack([self([vector])[0] for vector in vectors[0]])]


def true_residual(matrix: Tensor, x: Tensor, b: Tensor) -> float:
    return float((b.double() - matrix.double() @ x.double()).norm() / b.double().norm())


@both
def test_an_exact_operator_saves_the_closing_product(solver):
    operator = Exact(with_eigenvalues(torch.logspace(-2, 0, 30).double()))
    x, stats = solver(tol=1e-6).solve(operator, [gaussian(30)])
    assert stats.residual_from == "recurrence"
    assert stats.matvecs == operator.products == stats.iterations
    assert stats.residual == pytest.approx(true_residual(operator.matrix, x[0], gaussian(30)), rel=1e-6)
    assert (stats.converged, stats.stop_reason) == (True, "converged")


def test_a_residual_that_is_not_known_comes_from_nothing():
    operator = Exact(with_eigenvalues(torch.logspace(-2, 0, 30).double()))
    for solver in (OneStep(0.1), Neumann(3, 0.1, certify=False)):
        _, stats = solver.solve(operator, [gaussian(30)])
        assert stats.residual_from is None
        assert solver.solve(operator, [0 * gaussian(30)])[1].residual_from == "product"


@both
def test_other_operators_are_certified_by_a_product(solver):
    operator = Operator(with_eigenvalues(torch.logspace(-2, 0, 30).double()))
    _, stats = solver(tol=1e-6).solve(operator, [gaussian(30)])
    assert stats.residual_from == "product"
    assert stats.matvecs == operator.products == stats.iterations + 1


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("in_range", [False, True], ids=["any", "in the range"])
def test_what_is_reported_is_true(solver, values, dtype, in_range):
    """However many steps, and however ill-conditioned: within 5%, or within 3% of the tolerance."""
    matrix = with_eigenvalues(values.double(), dtype)
    b = gaussian(60, dtype=dtype)
    b = matrix @ b if in_range else b
    for steps in (3, 10, 40, 200):
        for tol in (None, 0.1, 1e-3, 1e-6):
            operator = Exact(matrix)
            (x,), stats = solver(steps, tol).solve(operator, [b])
            true = true_residual(matrix, x, b)
            assert operator.products == stats.matvecs <= steps + 1
            if stats.residual_from == "recurrence":
                assert true <= max(1.05 * stats.residual, 0.03 * (tol or 0))
                assert stats.residual <= max(1.05 * true, 0.04 * (tol or 0))
                assert not stats.converged or true <= tol


@both
@pytest.mark.parametrize("noise", [1e-6, 1e-3, 0.1])
def test_noise_in_products_is_not_trusted(solver, noise):
    """Products with errors of their own claim to be exact: as far as they are trusted, the residual is true."""
    matrix = with_eigenvalues(torch.linspace(0.1, 1, 60).double())
    trusted = 0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)

        def multiply(v: Tensor, generator: torch.Generator = generator) -> Tensor:
            return matrix @ v + noise * v.norm() / 60**0.5 * torch.randn(60, generator=generator).double()

        for steps, tol in ((3, None), (10, None), (40, 1e-1), (40, 1e-3), (40, 1e-5)):
            (x,), stats = solver(steps, tol).solve(Claims(multiply), [gaussian(60, seed=seed)])
            true = true_residual(matrix, x, gaussian(60, seed=seed))
            trusted += stats.residual_from == "recurrence"
            if stats.residual_from == "recurrence":
                assert true == pytest.approx(stats.residual, rel=0.05, abs=0.03 * (tol or 0))
    assert trusted > 0 or noise > 1e-6


@both
def test_an_operator_that_is_not_symmetric_is_told(solver):
    part = gaussian(30, 30)
    operator = Exact(with_eigenvalues(torch.logspace(-2, 0, 30).double()) + 0.1 * (part - part.T))
    x, stats = solver(20, tol=1e-6).solve(operator, [gaussian(30)])
    assert (stats.stop_reason, stats.converged) == ("not symmetric", False)
    assert stats.residual == pytest.approx(true_residual(operator.matrix, x[0], gaussian(30)), rel=1e-6)


@both
def test_an_operator_that_is_not_linear_is_not_trusted(solver):
    matrix = with_eigenvalues(torch.linspace(0.1, 1, 60).double())
    operator = Claims(lambda v: matrix @ v + 1e-2 * v.abs())
    _, stats = solver(10, tol=None).solve(operator, [gaussian(60)])
    assert stats.residual_from == "product"


@both
def test_two_steps_are_too_few_to_trust(solver):
    """Products that are off by a factor contradict nothing that a single step has seen."""
    operator = Claims(lambda v: 1.1 * v if operator.products == 1 else v)
    _, stats = solver(tol=1e-3).solve(operator, [torch.ones(3).double()])
    assert stats.residual_from == "product"
    assert stats.residual < 1e-3


@both
def test_a_preconditioned_system_is_certified_by_a_product(solver):
    operator = Exact(with_eigenvalues(torch.logspace(-2, 0, 30).double()))
    _, stats = solver(tol=1e-6, preconditioner=Jacobi()).solve(operator, [gaussian(30)])
    assert stats.residual_from == "product"


@both
@pytest.mark.parametrize("steps", [1, 2, 5, 30, 100])
def test_restarts_stay_within_the_steps(solver, steps):
    """Products of float32 rounded to bfloat16 make the recurrence drift: it restarts, and each restart is a step."""
    matrix = with_eigenvalues(torch.linspace(0.5, 1, 60).double(), torch.float32)
    calls: list[int] = []

    def matvec(vectors: Sequence[Tensor]) -> list[Tensor]:
        calls.append(1)
        return [(matrix @ vectors[0]).bfloat16().float()]

    _, stats = solver(steps, 1e-5).solve(matvec, [gaussian(60, dtype=torch.float32)])
    assert len(calls) == stats.matvecs <= steps + 1 + 4  # four confirm what looks like asymmetry


@both
def test_every_row_has_its_own(solver, check_every):
    """One right-hand side needs a product, since its system is ill-conditioned; another none."""
    values, vectors = torch.logspace(-7, 0, 40).double(), torch.linalg.qr(gaussian(40, 40))[0]
    matrix = ((vectors * values) @ vectors.T).float()
    matrix = (matrix + matrix.T) / 2
    easy, hard = vectors[:, -4:].sum(1).float(), vectors[:, :20].sum(1).float()
    operator = Exact(matrix)
    (x,), stats = solver(8, tol=1e-2).solve(operator, [torch.stack([easy, hard])], batched=True)
    for row, b in enumerate((easy, hard)):
        assert stats.residuals[row] == pytest.approx(true_residual(matrix, x[row], b), rel=0.05, abs=3e-4)
    assert stats.residual_from == "recurrence"
    assert stats.matvecs == operator.products


@both
def test_a_warm_start_costs_its_product(solver):
    operator, state = Exact(with_eigenvalues(torch.logspace(-2, 0, 30).double())), SolverState()
    for more in (0, 1):
        _, stats = solver(tol=1e-6, warm_start=True).solve(operator, [gaussian(30) + more * 0.1], state=state)
        assert stats.matvecs == stats.iterations + more
        assert stats.residual_from == "recurrence"


# ------------------------------------------------------------------------------------------------------------- networks


def losses(dtype: torch.dtype = torch.float32, autocast: bool = False) -> tuple[Any, Any, list[Tensor], Tensor, Tensor]:
    """Outer and inner loss of a small network, its parameters, the outer parameters, and the network's outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
    x, y, phi = torch.randn(32, 16, dtype=dtype), torch.randint(4, (32,)), torch.zeros(32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = net(x)
        inner = (nn.functional.cross_entropy(outputs, y, reduction="none") * phi.exp()).mean()
        outer = nn.functional.cross_entropy(net(-x), y)
    return outer, inner, list(net.parameters()), phi, outputs


@both
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_the_hessian_of_a_network_is_exact(solver, curvature):
    outer, inner, params, phi, outputs = losses()
    outputs = outputs if curvature == "gauss-newton" else None
    stats = auxfast.hypergradient(
        outer, inner, params, [phi], solver=solver(4, tol=None, damping=0.5), curvature=curvature, outputs=outputs
    ).stats
    assert (stats.residual_from, stats.matvecs) == ("recurrence", stats.iterations)


@both
def test_free_entries_keep_it_exact(solver):
    outer, inner, params, phi, _ = losses()
    free = [torch.rand_like(w) < 0.7 for w in params]
    stats = auxfast.hypergradient(outer, inner, params, [phi], solver=solver(4, tol=None, damping=0.5), free=free).stats
    assert stats.residual_from == "recurrence"


@both
@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_products_in_bfloat16_are_not_trusted(solver, kind):
    outer, inner, params, phi, _ = losses(torch.bfloat16 if kind == "bfloat16" else torch.float32, kind == "autocast")
    stats = auxfast.hypergradient(
        outer, inner, params, [phi], solver=solver(6, tol=1e-2, damping=0.5), warn=False
    ).stats
    assert stats.residual_from == "product"


@both
@pytest.mark.parametrize("kind", ["finite-difference", "micro-batches"])
def test_products_that_are_computed_anew_are_not_trusted(solver, kind):
    w, phi, x = (torch.randn(6, requires_grad=True) for _ in range(3))

    def inner() -> Tensor:
        return ((w - phi).square() * x.detach().exp()).sum()

    micro = kind == "micro-batches"
    stats = auxfast.hypergradient(
        lambda: w.square().sum(),
        [inner, inner] if micro else inner,
        [w],
        [phi],
        solver=solver(3, tol=None),
        curvature="hessian" if micro else kind,
        warn=False,
    ).stats
    assert stats.residual_from == "product"
