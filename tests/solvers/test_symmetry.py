"""Operators that are not symmetric are told, by products that the solvers have anyway; and symmetric ones are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import auxfast
from auxfast.solvers import (
    MINRES,
    Chebyshev,
    ConjugateGradient,
    Dense,
    GradientFlow,
    Identity,
    Jacobi,
    Matvec,
    Neumann,
    Nystrom,
    SolverState,
)

from .systems import Operator, gaussian, with_eigenvalues

TELLING = {
    "MINRES": MINRES(),
    "MINRES, Jacobi": MINRES(preconditioner=Jacobi()),
    "ConjugateGradient": ConjugateGradient(),
    "ConjugateGradient, Nystrom": ConjugateGradient(preconditioner=Nystrom(5)),
    "Neumann, auto": Neumann(20),
    "Chebyshev, auto": Chebyshev(30),
    "Nystrom": Nystrom(8),
    "Dense": Dense(),
    "GradientFlow": GradientFlow(20.0),
}
telling = pytest.mark.parametrize("solver", TELLING.values(), ids=TELLING.keys())
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in [*DTYPES, torch.float16]}


def skew(size: int, seed: int) -> Tensor:
    """(n, n), of Frobenius norm 1, its own transpose's negative."""
    part = gaussian(size, size, seed=seed)
    return (part - part.T) / (part - part.T).norm()


@telling
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_an_operator_that_is_not_symmetric_is_told(solver, dtype, seed, check_every):
    symmetric = with_eigenvalues(torch.logspace(-2, 0, 2 + 9 * seed, dtype=torch.float64), seed=seed)
    operator = Operator((symmetric + symmetric.norm() * skew(len(symmetric), seed)).to(dtype))
    _, stats = solver.solve(operator, [gaussian(len(symmetric), seed=seed, dtype=dtype)])
    assert (stats.stop_reason, stats.converged) == ("not symmetric", False)
    assert stats.symmetry_error > 0.05
    assert stats.matvecs == operator.products


@telling
@pytest.mark.parametrize(("dtype", "part"), [(torch.float64, 1e-4), (torch.float32, 0.1)])
def test_a_small_asymmetry_is_told_too(solver, dtype, part):
    symmetric = with_eigenvalues(torch.logspace(-2, 0, 30, dtype=torch.float64))
    operator = Operator((symmetric + part * symmetric.norm() * skew(30, 1)).to(dtype))
    _, stats = solver.solve(operator, [gaussian(4, 30, dtype=dtype)], batched=True)
    assert (stats.stop_reason, stats.converged) == ("not symmetric", False)


@telling
def test_the_figure_of_a_symmetric_operator_is_its_rounding(solver):
    for dtype in DTYPES:
        operator = Operator(with_eigenvalues(torch.logspace(-2, 0, 30, dtype=torch.float64), dtype))
        _, stats = solver.solve(operator, [gaussian(30, dtype=dtype)])
        assert stats.symmetry_error <= 20 * EPSILON[dtype]
        assert stats.stop_reason != "not symmetric"


@pytest.mark.parametrize(
    "solver", [Identity(), Neumann(3, 0.1), Neumann(3, 0.1, certify=False), Chebyshev(9, (0.1, 2.0))]
)
def test_solvers_without_two_products_that_tell_say_none(solver):
    operator = Operator(with_eigenvalues(torch.linspace(0.5, 1, 9, dtype=torch.float64)))
    assert solver.solve(operator, [gaussian(9)])[1].symmetry_error is None
    assert MINRES().solve(lambda v: [2 * v[0]], [gaussian(9)])[1].symmetry_error is None  # done after one product


def test_a_sketch_that_is_kept_keeps_what_it_tells():
    operator, state = Operator(torch.eye(9).double() + 3 * skew(9, 0)), SolverState()
    for _ in range(2):
        _, stats = Nystrom(5).solve(operator, [gaussian(9)], state=state)
        assert stats.stop_reason == "not symmetric"


def test_it_costs_products_only_where_it_is_large():
    symmetric = with_eigenvalues(torch.logspace(-2, 0, 30, dtype=torch.float64))
    for matrix, more in ((symmetric, 0), (symmetric + skew(30, 0), 4)):
        _, stats = MINRES(7, 1e-9).solve(Operator(matrix), [gaussian(30)])
        assert stats.matvecs == 7 + 1 + more


HOSTILE = [
    (spectrum, rhs, dtype, products)
    for spectrum in ("condition 1e12", "indefinite", "singular", "two values")
    for rhs in ("random", "of small eigenvalues", "in the range", "an eigenvector")
    for dtype in EPSILON
    for products in ("of a matrix", "of factors", "by cancellation", "noisy")
]


@pytest.mark.slow
@pytest.mark.parametrize("solver", [*TELLING.values(), MINRES(tol=1e-8)], ids=[*TELLING, "MINRES, long"])
def test_rounding_is_not_taken_for_asymmetry(solver):
    """Products of symmetric matrices may be little but rounding, or noise 10 times that, and contradict symmetry."""
    for number, (spectrum, rhs, dtype, products) in enumerate(HOSTILE):
        size = (2, 3, 7, 24)[number * 7 % 11 % 4]
        generator = torch.Generator().manual_seed(number)
        values = torch.logspace(-12, 0, size, dtype=torch.float64)
        if spectrum == "indefinite":
            values[::2] *= -1
        elif spectrum == "singular":
            values[: size // 2] = 0
        elif spectrum == "two values":
            values = torch.where(torch.arange(size) % 2 == 0, 1e-7, 1.0).double()
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        parts = torch.randn(size, generator=generator, dtype=torch.float64)
        if rhs == "in the range":
            parts = parts * values
        elif rhs == "of small eigenvalues":
            parts = parts * (values.abs() < 1e-3)
        elif rhs == "an eigenvector":
            parts = torch.eye(size).double()[size // 2]
        product = hostile_product(products, values, basis, dtype, generator)
        b = (basis @ parts).to(dtype)
        (x,), stats = solver.solve(product, [b])
        assert stats.stop_reason != "not symmetric", (spectrum, rhs, dtype, products)
        assert x.isfinite().all()


def hostile_product(kind: str, values: Tensor, basis: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Matvec:
    """Products with a symmetric matrix of these eigenvalues, in a dtype, each with another kind of rounding."""
    matrix = basis @ torch.diag(values) @ basis.T
    part = 10 * torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
    whole, first, second = (_symmetric_in(dtype, m) for m in (matrix, matrix + part + part.T, part + part.T))
    factor, signs = (basis * values.abs().sqrt()).T.to(dtype), values.sign().to(dtype)

    def noisy(v: Tensor) -> Tensor:
        noise = torch.randn(v.shape, generator=generator, dtype=torch.float64) * v.double().norm()
        return whole @ v + (10 * EPSILON[dtype] * noise).to(dtype)

    return {
        "of a matrix": lambda v: [whole @ v[0]],
        "of factors": lambda v: [factor.T @ (signs * (factor @ v[0]))],
        "by cancellation": lambda v: [first @ v[0] - second @ v[0]],
        "noisy": lambda v: [noisy(v[0])],
    }[kind]


def _symmetric_in(dtype: torch.dtype, matrix: Tensor) -> Tensor:
    """The matrix rounded, symmetric to the last bit."""
    rounded = matrix.to(dtype)
    return rounded.triu() + rounded.triu(1).T


NETWORKS = {
    "MLP": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)),
    "normalised": lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)),
    "CNN": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_networks_are_symmetric_to_rounding(name, dtype, curvature):
    torch.manual_seed(0)
    net = NETWORKS[name]().to(dtype)
    x, y = torch.randn(32, 8).to(dtype), torch.randint(3, (32,))
    phi = torch.zeros(32, requires_grad=True, dtype=dtype)
    for solver in (MINRES(12), ConjugateGradient(12, damping=0.1), Neumann(5), Nystrom(6)):
        logits = net(x)
        inner = (nn.functional.cross_entropy(logits, y, reduction="none") * phi.exp()).mean()
        outer = nn.functional.cross_entropy(net(-x), y)
        outputs = None if curvature == "hessian" else logits
        stats = auxfast.hypergradient(
            outer, inner, net.parameters(), [phi], solver=solver, curvature=curvature, outputs=outputs, warn=False
        ).stats
        assert (stats.symmetry_error or 0) <= 20 * EPSILON[dtype]  # None: a first step that met negative curvature
        assert stats.stop_reason != "not symmetric"


class ScaledBackward(torch.autograd.Function):
    """The identity, whose backward pass depends on the other argument: no derivative of anything."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


@pytest.mark.parametrize("solver", [MINRES(), ConjugateGradient(), Dense()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_backward_pass_that_is_no_derivative_is_told(solver, dtype):
    w, v, phi = (torch.tensor(value, dtype=dtype, requires_grad=True) for value in ([0.8, 0.3], [1.5, 2.0], [1.0, 2.0]))
    inner = (w - phi).square().sum() + 5 * (v - 1).square().sum() + (ScaledBackward.apply(w, v) * phi).sum()
    result = auxfast.hypergradient(w.sum() + v.sum() * 0.3, inner, [w, v], [phi], solver=solver, warn=False)
    assert (result.stats.stop_reason, result.stats.converged) == ("not symmetric", False)
    assert result.stats.symmetry_error > 0.01
