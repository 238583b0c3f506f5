from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import auxfast
from auxfast.compat.linear_operators import from_curvlinops, from_scipy, to_curvlinops, to_scipy
from auxfast.curvature import Hessian
from auxfast.solvers import GMRES, MINRES, ConjugateGradient, FromOptimizer, InverseOperator, NormalEquations

SHAPES = [(2, 3), (4,), ()]
SIZE = 11


def spread(condition: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """(n, n), symmetric, with eigenvalues from 1 to `condition`."""
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    return ((basis * torch.linspace(1, condition, SIZE, dtype=torch.float64)) @ basis.T).to(dtype)


@dataclass
class Known:
    """A symmetric operator that knows its parameters."""

    matrix: Tensor

    def __post_init__(self) -> None:
        self.params = [torch.zeros(shape, dtype=self.matrix.dtype, requires_grad=True) for shape in SHAPES]

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return [product[0] for product in self.batched([v[None] for v in vectors])]

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        products = rows(vectors) @ self.matrix
        parts = products.split([v[0].numel() for v in vectors], dim=1)
        return [part.reshape(v.shape) for part, v in zip(parts, vectors, strict=True)]


def right_hand_sides(count: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    lead = () if count is None else (count,)
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((*lead, *shape), generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def solved(matrix: Tensor, rhs: Sequence[Tensor]) -> Tensor:
    return torch.linalg.solve(matrix, rows(rhs).T).T


def rows(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(len(t), -1) for t in tensors], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scipys_operators_have_the_same_products_there_and_back(dtype):
    pytest.importorskip("scipy")
    operator = Known(spread(100, dtype))
    exported = to_scipy(operator)
    assert exported.shape == (SIZE, SIZE)
    vectors = right_hand_sides(3, dtype)
    again = from_scipy(exported)
    for found, wanted in (
        (again.batched(vectors), operator.batched(vectors)),
        (again([v[0] for v in vectors]), operator([v[0] for v in vectors])),
    ):
        torch.testing.assert_close(found, wanted)


def test_scipys_eigenvalues_of_an_operator_are_those_of_its_matrix():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    operator = Known(spread(100))
    values = linalg.eigsh(to_scipy(operator), k=3, return_eigenvectors=False)
    assert sorted(values) == pytest.approx(torch.linalg.eigvalsh(operator.matrix)[-3:].tolist())
    x, info = linalg.minres(to_scipy(operator), rows([b[None] for b in right_hand_sides()])[0].numpy(), rtol=1e-12)
    assert info == 0
    found, _ = MINRES(tol=1e-10).solve(operator, right_hand_sides())
    torch.testing.assert_close(rows([t[None] for t in found])[0], torch.from_numpy(x))


def test_a_solver_takes_scipys_matrices_and_its_factorisations_as_preconditioners():
    sparse = pytest.importorskip("scipy.sparse")
    linalg = pytest.importorskip("scipy.sparse.linalg")
    matrix = spread(1000)
    rhs = right_hand_sides(2)
    plain, helped = (
        ConjugateGradient(tol=1e-9, preconditioner=preconditioner).solve(from_scipy(matrix.numpy()), rhs, batched=True)
        for preconditioner in (
            None,
            InverseOperator(
                from_scipy(linalg.LinearOperator((SIZE, SIZE), linalg.splu(sparse.csc_matrix(matrix.numpy())).solve))
            ),
        )
    )
    torch.testing.assert_close(rows(helped[0]), solved(matrix, rhs), rtol=1e-6, atol=1e-9)
    assert helped[1].converged
    assert helped[1].iterations <= 2 < plain[1].iterations


@pytest.mark.parametrize("solver", [GMRES(tol=1e-10), NormalEquations(tol=1e-10)], ids=["GMRES", "NormalEquations"])
def test_scipys_matrices_need_not_be_symmetric(solver):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    matrix = spread(5.0) + torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 5
    b = torch.ones(SIZE, dtype=torch.float64)
    (x,), stats = solver.solve(from_scipy(linalg.aslinearoperator(matrix.numpy()), symmetric=False), [b])
    assert stats.converged
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="symmetric"):
        MINRES().solve(from_scipy(matrix.numpy(), symmetric=False), [b])


def test_the_public_hessian_goes_to_scipy_and_knows_its_optimizer():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    net, x, y = curved_network()
    params = list(net.parameters())
    optimizer = torch.optim.Adam(params, lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    hessian = Hessian(torch.nn.functional.cross_entropy(net(x), y), params)
    dense = hessian.matmat(torch.eye(hessian.shape[0], dtype=torch.float64))
    largest = linalg.eigsh(to_scipy(hessian), k=1, which="LA", return_eigenvectors=False)
    assert largest[0] == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item())
    rhs = [torch.ones_like(w) for w in params]
    solver = MINRES(steps=200, tol=1e-6, damping=1.0, preconditioner=FromOptimizer(optimizer))
    solution, stats = solver.solve(hessian, rhs)
    assert stats.converged
    flat = torch.linalg.solve(dense + torch.eye(len(dense)), torch.ones(len(dense), dtype=torch.float64))
    torch.testing.assert_close(rows([part[None] for part in solution])[0], flat, rtol=1e-4, atol=1e-5)


def curved_network() -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    x = torch.randn(200, 6, dtype=torch.float64) * torch.logspace(-1, 1, 6)
    return net, x, torch.randint(3, (200,))


@pytest.mark.filterwarnings("ignore")  # theirs
def test_curvlinops_operators_have_the_same_products_there_and_back():
    curvlinops = pytest.importorskip("curvlinops")
    net, x, y = curved_network()
    params = list(net.parameters())
    loss_function = torch.nn.CrossEntropyLoss()
    theirs = from_curvlinops(
        curvlinops.HessianLinearOperator(net, loss_function, params, [(x, y)], check_deterministic=False)
    )
    grads = torch.autograd.grad(loss_function(net(x), y), params, create_graph=True)

    class Ours:
        def __init__(self):
            self.params = params

        def __call__(self, vectors):
            return torch.autograd.grad(grads, params, vectors, retain_graph=True)

        def batched(self, vectors):
            return [torch.stack(products) for products in zip(*map(self, zip(*vectors, strict=True)), strict=True)]

    ours = Ours()
    vectors = [torch.randn(3, *w.shape, dtype=torch.float64) for w in params]
    one = [v[0] for v in vectors]
    for found in (theirs, from_curvlinops(to_curvlinops(ours))):
        torch.testing.assert_close(found(one), list(ours(one)))
        torch.testing.assert_close(found.batched(vectors), ours.batched(vectors))
    flat = torch.cat([v.flatten() for v in one])
    torch.testing.assert_close(to_curvlinops(ours) @ flat, torch.cat([p.flatten() for p in ours(one)]))
    trace = curvlinops.hutchinson_trace(to_curvlinops(ours), num_matvecs=40)
    assert trace.isfinite()
    settings = {"tol": 1e-8, "damping": 0.1}
    found, stats = MINRES(**settings).solve(theirs, one)
    torch.testing.assert_close(found, MINRES(**settings).solve(ours, one)[0], rtol=1e-5, atol=1e-8)
    assert stats.converged


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_kfacs_inverse_leaves_nothing_to_do_where_it_is_exact(name):
    """A linear network with several outputs, whose squared loss has a Hessian of Kronecker products."""
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    x = torch.randn(200, 30, dtype=torch.float64) * torch.logspace(-1, 1, 30)
    y = torch.randn(200, 4, dtype=torch.float64)
    net = torch.nn.Linear(30, 4, bias=False).double()
    phi = torch.full((1,), -4.0, dtype=torch.float64, requires_grad=True)
    decay = float(phi.exp())

    def inner_loss():
        return torch.nn.functional.mse_loss(net(x), y) + phi.exp().sum() / 2 * net.weight.square().sum()

    factors = getattr(curvlinops, f"{name}LinearOperator")(
        net, torch.nn.MSELoss(), [net.weight], [(x, y)], fisher_type="type-2", check_deterministic=False
    )
    inverse = curvlinops.KFACInverseLinearOperator(factors, damping=decay, use_exact_damping=True)
    plain, helped = (
        auxfast.hypergradient(
            net.weight.square().sum(),
            inner_loss(),
            [net.weight],
            [phi],
            solver=ConjugateGradient(steps=1000, tol=1e-6, preconditioner=preconditioner),
        )
        for preconditioner in (None, InverseOperator(from_curvlinops(inverse)))
    )
    assert helped.stats.converged
    assert helped.stats.matvecs <= 3 < plain.stats.matvecs / 10
    torch.testing.assert_close(helped.grads, plain.grads, rtol=1e-4, atol=0)


def test_what_has_no_params_or_is_no_operator_is_refused():
    pytest.importorskip("scipy")
    with pytest.raises(TypeError, match="a function has not"):
        to_scipy(lambda v: v)
    with pytest.raises(TypeError, match="a function has not"):
        to_curvlinops(lambda v: v)
    with pytest.raises(TypeError, match="must be a PyTorchLinearOperator of curvlinops, not a function"):
        from_curvlinops(lambda v: v)


def test_what_a_real_symmetric_operator_is_not_is_refused():
    pytest.importorskip("scipy")
    matrix = spread(10)
    with pytest.raises(TypeError, match=r"the vector must be real, not torch.complex128"):
        to_scipy(Known(matrix)) @ matrix[0].to(torch.complex128).numpy()
    with pytest.raises(TypeError, match=r"operator must be real, not torch.complex128"):
        MINRES().solve(from_scipy((1j * matrix).numpy()), right_hand_sides())
    other = Known(matrix)
    other.symmetric = False
    with pytest.raises(TypeError, match="operator must be symmetric, for it stands for its transpose too"):
        to_scipy(other)


def test_no_columns_have_no_products():
    pytest.importorskip("scipy")
    w = torch.ones(3, requires_grad=True)
    hessian = to_scipy(auxfast.curvature.Hessian(w.square().sum(), [w]))
    assert (hessian @ torch.ones(3, 0).numpy()).shape == (3, 0)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    monkeypatch.setitem(sys.modules, "curvlinops._torch_base", None)
    with pytest.raises(ModuleNotFoundError, match="pip install curvlinops-for-pytorch"):
        to_curvlinops(Known(spread(10)))
