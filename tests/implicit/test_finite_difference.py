"""Products by differences of gradients: accuracy, bits put back, and networks that have no other way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auxfast.implicit import hypergradient
from auxfast.implicit.finite_difference import FiniteDifference
from auxfast.implicit.losses import as_loss_fns
from auxfast.solvers import MINRES

from .problems import Dense, Ridge, flat


def finite_difference(loss, params) -> FiniteDifference:
    return FiniteDifference(as_loss_fns("inner_loss", loss, lambda function: function), params)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-3), (torch.float64, 1e-8)])
@pytest.mark.parametrize("scale", [1.0, 1e3])  # of the parameters; curvature and vectors scale otherwise
def test_products(dtype, tolerance, scale):
    torch.manual_seed(0)
    u, v, phi = (torch.randn(n, dtype=dtype) for n in (3, 4, 4))
    u, v = (scale * u).requires_grad_(), (scale * v).requires_grad_()
    phi.requires_grad_()
    m = torch.randn(3, 4, dtype=dtype)

    def inner(u: Tensor, v: Tensor, phi: Tensor) -> Tensor:
        return (u / scale).exp() @ m @ (v / scale) + (phi.exp() * v.square()).sum() / (2 * scale**2)

    curvature = finite_difference(lambda: inner(u, v, phi), [u, v])
    blocks = torch.autograd.functional.hessian(inner, (u.detach(), v.detach(), phi.detach()))
    hessian = torch.cat([torch.cat(blocks[i][:2], dim=1) for i in range(2)])
    for factor in (1e-6, 1.0, 1e6):
        vector = factor * torch.randn(7, dtype=dtype)
        for found, wanted in (
            (flat(curvature(vector.split([3, 4]))), hessian @ vector),
            (curvature.mixed(vector.split([3, 4]), [phi])[0], vector @ torch.cat([blocks[i][2] for i in range(2)])),
        ):
            assert (found - wanted).norm() <= tolerance * wanted.norm()
    block = torch.randn(5, 7, dtype=dtype).split([3, 4], dim=1)
    for i, row in enumerate(zip(*curvature.batched(block), strict=True)):
        torch.testing.assert_close(list(row), curvature([t[i] for t in block]))
    assert [t.shape for t in curvature([torch.zeros(3, dtype=dtype), torch.zeros(4, dtype=dtype)])] == [(3,), (4,)]


def test_the_hypergradient():
    problem = Ridge()
    args = (problem.outer_loss, problem.inner_loss, [problem.w], [problem.decay, problem.weights])
    result = hypergradient(*args, curvature="finite-difference", solver=MINRES(tol=1e-7))
    for grad, exact in zip(result.grads, problem.exact(), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-7)


def test_which_parameters_couple():
    w, linear, unused = (torch.ones(3, requires_grad=True) for _ in range(3))
    curvature = finite_difference(lambda: w.square().sum() + linear.sum(), [unused, linear, w])
    assert curvature.in_system == [False, False, True]


@pytest.mark.parametrize("fails_at", [None, 1, 3, 4, 7])
def test_parameters_have_their_bits_back(fails_at):
    problem = Ridge()
    base = torch.cat([problem.w.detach(), torch.full((2,), torch.pi, dtype=torch.float64)])
    problem.w = base[:5].requires_grad_()  # shares its memory, as fused and tied parameters do
    before, version, calls = base.clone(), problem.w._version, 0
    graph = (problem.w.square() * problem.decay).sum()

    def inner() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise KeyboardInterrupt
        assert calls == 1 or not torch.equal(base, before)
        return problem.inner_loss()

    args = (problem.outer_loss(), inner, [problem.w], [problem.decay])
    if fails_at is None:
        hypergradient(*args, curvature="finite-difference", solver=Dense())
        assert calls == 2 + 2 * 5 + 2
    else:
        with pytest.raises(KeyboardInterrupt):
            hypergradient(*args, curvature="finite-difference", solver=Dense())
    assert torch.equal(base, before)
    assert problem.w._version == version
    graph.backward()  # still valid


class Attention(nn.Module):
    """Through the flash kernel, which has no double backward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 1)

    def forward(self, x: Tensor, backend: torch.nn.attention.SDPBackend) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        with torch.nn.attention.sdpa_kernel(backend):
            return self.out(F.scaled_dot_product_attention(q, k, v)).squeeze(1).mean(1)


@pytest.mark.parametrize("batches", [1, 2])
def test_operators_without_a_double_backward(batches):
    torch.manual_seed(0)
    net, phi = Attention().double(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(3, 8, 6, 4).double(), torch.randn(3, 8, 1).double()

    def result(backend: torch.nn.attention.SDPBackend, curvature: str) -> Tensor:
        def inner(i: int) -> Tensor:
            decay = phi.exp() * sum(p.square().sum() for p in net.parameters())
            return (net(x[i], backend) - y[i]).square().mean() + decay

        return hypergradient(
            lambda: (net(x[2], backend) - y[2]).square().mean(),
            [lambda i=i: inner(i) for i in range(batches)],
            net.parameters(),
            [phi],
            curvature=curvature,
            solver=MINRES(tol=1e-8),
        ).grads[0]

    backends = torch.nn.attention.SDPBackend
    wanted = result(backends.MATH, "hessian")
    assert abs(wanted) > 1e-3
    torch.testing.assert_close(result(backends.FLASH_ATTENTION, "finite-difference"), wanted, rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match=r"went through ScaledDotProductFlashAttentionForCpuBackward0, which"):
        result(backends.FLASH_ATTENTION, "hessian")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of torch's
def test_a_compiled_inner_loss():
    torch._dynamo.reset()
    problem = Ridge()
    compiled = torch.compile(problem.inner_loss, backend="aot_eager")
    args = (problem.outer_loss, compiled, [problem.w], [problem.decay])
    result = hypergradient(*args, curvature="finite-difference", solver=Dense())
    torch.testing.assert_close(result.grads[0], problem.exact()[0], rtol=1e-6, atol=1e-8)


def test_a_tensor_is_refused():
    problem = Ridge()
    args = (problem.outer_loss(), problem.inner_loss(), [problem.w], [problem.decay])
    with pytest.raises(TypeError, match="inner_loss must be a function for curvature='finite-difference'"):
        hypergradient(*args, curvature="finite-difference")
