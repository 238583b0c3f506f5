"""The public operators of curvature against dense matrices, in all the forms that vectors have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxfast
from auxfast.curvature import GaussNewton, Hessian
from auxfast.solvers import MINRES, Dense, LinearOperator


class Network:
    """A small network, a parameter that the loss is linear in, one that it does not use, and a frozen one."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        self.linear, self.unused = (nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
        self.net[0].bias.requires_grad_(False)
        self.params = [self.linear, *self.net.parameters(), self.unused]
        self.x, self.y = torch.randn(7, 3, dtype=dtype), torch.randint(3, (7,))

    def loss(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        logits = self.net(self.x[rows])
        return F.cross_entropy(logits, self.y[rows]) + self.linear.sum(), logits

    def dense(self, gauss_newton: bool) -> Tensor:
        """(n, n), by torch alone."""
        names = ["linear", *(f"net.{name}" for name, _ in self.net.named_parameters()), "unused"]
        sizes = [w.numel() for w in self.params]

        def logits(flat: Tensor) -> Tensor:
            parts = [p.view(w.shape) for p, w in zip(flat.split(sizes), self.params, strict=True)]
            values = {n.removeprefix("net."): p for n, p in zip(names, parts, strict=True) if n.startswith("net.")}
            return torch.func.functional_call(self.net, {**values, "0.bias": self.net[0].bias.detach()}, self.x)

        flat = torch.cat([w.detach().reshape(-1) for w in self.params])
        if not gauss_newton:
            return torch.autograd.functional.hessian(lambda w: F.cross_entropy(logits(w), self.y), flat)
        jacobian = torch.autograd.functional.jacobian(logits, flat)
        z = logits(flat).detach()
        inner = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, self.y), z)
        return torch.einsum("abi,abcd,cdj->ij", jacobian, inner, jacobian)


def operators(case: Network, kind: type[Hessian]) -> dict[str, Hessian]:
    loss, logits = case.loss()
    gauss_newton = kind is GaussNewton
    function = case.loss if gauss_newton else lambda *rows: case.loss(*rows)[0]
    return {
        "tensor": GaussNewton(loss, case.params, logits) if gauss_newton else Hessian(loss, case.params),
        "function": kind(function, case.params),
        "micro-batches": kind(auxfast.MicroBatches(function, [slice(0, 5), slice(5, 7)], [5, 2]), case.params),
    }


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
@pytest.mark.parametrize("form", ["tensor", "function", "micro-batches"])
def test_products_are_those_of_the_dense_matrix(kind, form):
    case = Network()
    matrix, dense = operators(case, kind)[form], case.dense(kind is GaussNewton)
    n = len(dense)
    assert matrix.shape == (n, n)
    assert (matrix.dtype, matrix.device) == (torch.float64, torch.device("cpu"))
    torch.testing.assert_close(matrix.matmat(torch.eye(n).double()), dense)  # more vectors than fit in one batch
    v = torch.randn(n, 3).double()
    torch.testing.assert_close(matrix.matvec(v[:, 0]), dense @ v[:, 0])
    torch.testing.assert_close(matrix.matmat(v), dense @ v)
    assert matrix.matmat(v[:, :0]).shape == (n, 0)
    sizes = [w.numel() for w in case.params]
    batch = [part.reshape(3, *w.shape) for part, w in zip(v.T.split(sizes, 1), case.params, strict=True)]
    expected = [p.reshape(3, *w.shape) for p, w in zip((dense @ v).T.split(sizes, 1), case.params, strict=True)]
    torch.testing.assert_close(matrix.matmat(batch), expected)
    torch.testing.assert_close(matrix.batched(batch), expected)
    torch.testing.assert_close(matrix.matvec([t[1] for t in batch]), [t[1] for t in expected])
    torch.testing.assert_close(matrix([t[1] for t in batch]), [t[1] for t in expected])
    assert not any(t.requires_grad for t in matrix([t[1].requires_grad_() for t in batch]))


def test_solvers_take_it():
    case = Network()
    matrix = operators(case, GaussNewton)["tensor"]
    assert isinstance(matrix, LinearOperator)
    rhs = [torch.randn_like(w) for w in case.params]
    for solver in (MINRES(200, tol=1e-10, damping=0.1), Dense(damping=0.1)):
        solution, stats = solver.solve(matrix, rhs)
        assert stats.converged
        expected = torch.linalg.solve(
            case.dense(True) + 0.1 * torch.eye(matrix.shape[0]).double(), torch.cat([b.reshape(-1) for b in rhs])
        )
        torch.testing.assert_close(torch.cat([x.reshape(-1) for x in solution]), expected, rtol=1e-6, atol=1e-7)


def test_the_graph_of_a_tensor_stays_usable():
    case = Network()
    loss, _ = case.loss()
    Hessian(loss, case.params).matvec(torch.ones(42).double())
    loss.backward()
    assert case.net[0].weight.grad is not None


def test_parameters_of_two_dtypes_take_vectors_of_any():
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    matrix = Hessian((a.double().square() * b).sum(), [a, b])
    assert matrix.dtype == torch.float64
    expected = torch.tensor([[6.0, 0, 2], [0, 6, 4], [2, 4, 0]])
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(matrix.matmat(torch.eye(3, dtype=dtype)), expected.to(dtype))
    torch.testing.assert_close(matrix.matvec([torch.ones(2), torch.ones(1).double()])[1], torch.tensor([6.0]).double())


def test_micro_batches_leave_no_trace_and_see_the_same_masks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1)).double()
    x = torch.randn(8, 3).double()
    saved = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    matrix = Hessian(auxfast.MicroBatches(lambda part: net(part).square().mean(), x.split(4)), net.parameters())
    dense = matrix.matmat(torch.eye(matrix.shape[0]).double())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    torch.testing.assert_close(dense, dense.T)
    torch.testing.assert_close(matrix.matvec(dense[0]), dense @ dense[0])
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())


def test_what_is_refused():
    case = Network()
    loss, logits = case.loss()
    matrix, n = Hessian(loss, case.params), 42
    for vector, message in (
        (torch.ones(n + 1), rf"vector must be of shape \({n},\), or a list of tensors, not of shape \({n + 1},\)"),
        (torch.ones(n, 1), rf"vector must be of shape \({n},\)"),
        ([torch.ones(2)], "vector must be one tensor for each of the 6 params, not 1"),
        ([torch.ones(3), *case.params[1:]], r"vector\[0\] must be of shape \(2,\), as params\[0\], not \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            matrix.matvec(vector)
    with pytest.raises(TypeError, match="vector must be a tensor, or a list of tensors like params, not a ndarray"):
        matrix.matvec(torch.ones(n).numpy())
    for rhs, error, message in (
        (torch.ones(n), TypeError, r"rhs must be a list of tensors, like parameters, and not a tensor: pass \[rhs\]"),
        ([torch.ones(n)], ValueError, "vectors must be one tensor for each of the 6 params, not 1"),
    ):
        with pytest.raises(error, match=message):
            auxfast.solvers.MINRES().solve(matrix, rhs)
    for vectors, message in (
        (torch.ones(n), rf"vectors must be of shape \({n}, k\)"),
        (torch.ones(()), rf"vectors must be of shape \({n}, k\)"),
        (torch.ones(3, n), rf"vectors must be of shape \({n}, k\)"),
        (case.params, r"vectors\[1\] must be of shape \(k, 5, 3\)|vectors\[0\] must be of shape \(k, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            matrix.matmat(vectors)
    with pytest.raises(ValueError, match="outputs must be given for curvature='gauss-newton'"):
        GaussNewton(loss, case.params)
    with pytest.raises(ValueError, match="outputs must be None where loss is made of functions"):
        GaussNewton(case.loss, case.params, logits)
    with pytest.raises(ValueError, match="params has no parameter with requires_grad=True"):
        Hessian(loss, [torch.ones(2)])
    with pytest.raises(ValueError, match=r"params\[1\] is the same tensor"):
        Hessian(loss, [case.linear, case.linear])
    with pytest.raises(TypeError, match=r"vector must be of a floating dtype, not torch.int64"):
        Hessian(loss, case.params).matvec(torch.ones(n, dtype=torch.long))
    with pytest.raises(TypeError, match=r"vectors\[0\] must be of a floating dtype, not torch.int64"):
        Hessian(loss, case.params).matmat([torch.ones(2, *w.shape, dtype=torch.long) for w in case.params])
    with pytest.raises(ValueError, match="loss must not be FreshBatches"):
        Hessian(auxfast.FreshBatches(lambda rows: case.loss(rows)[0], [slice(0, 5)]), case.params)
    with pytest.raises(TypeError, match="loss must be a tensor, a function"):
        Hessian(3, case.params)
    with pytest.raises(ValueError, match="loss does not depend on any of"):
        Hessian(case.linear.sum(), [case.unused])
