"""Products by differences of gradients: accuracy at any scale, an honest error, and networks that have no other way."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxfast
from auxfast.implicit import hypergradient
from auxfast.implicit.finite_difference import FiniteDifference
from auxfast.implicit.losses import as_loss_fns
from auxfast.solvers import MINRES, Identity, SolverState

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


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_curvature_that_short_moves_do_not_show_is_found(size, dtype):
    w = torch.full((3,), size, dtype=dtype, requires_grad=True)
    phi = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    result = hypergradient(w.sum(), lambda: (w - 5 * phi).square().sum(), [w], [phi], curvature="finite-difference")
    torch.testing.assert_close(result.grads[0], torch.tensor(15.0, dtype=dtype), rtol=3e-4, atol=0)


def test_which_parameters_couple():
    w, linear, unused = (torch.ones(3, requires_grad=True) for _ in range(3))
    curvature = finite_difference(lambda: w.square().sum() + linear.sum(), [unused, linear, w])
    assert curvature.in_system == [False, False, True]


@pytest.mark.parametrize("fails_at", [None, 1, 3, 4, 7])
def test_parameters_have_their_bits_back(fails_at):
    problem = Ridge()
    base = torch.cat([problem.w.detach(), torch.full((2,), torch.pi, dtype=torch.float64)])
    problem.w = base[:5].requires_grad_()  # shares its memory, as fused and tied parameters do
    before, version, calls, was_moved = base.clone(), problem.w._version, 0, False
    graph = (problem.w.square() * problem.decay).sum()

    def inner() -> Tensor:
        nonlocal calls, was_moved
        calls += 1
        if calls == fails_at:
            raise KeyboardInterrupt
        was_moved |= not torch.equal(base, before)
        return problem.inner_loss()

    args = (problem.outer_loss(), inner, [problem.w], [problem.decay])
    if fails_at is None:
        hypergradient(*args, curvature="finite-difference", solver=Dense())
    else:
        with pytest.raises(KeyboardInterrupt):
            hypergradient(*args, curvature="finite-difference", solver=Dense())
    assert was_moved == (fails_at != 1)
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


def two_scales(large: float, small: float, *, at_zero: bool = False, loss_scale: float = 1.0, dtype: torch.dtype):
    """One parameter far from the other in scale, at the minimum: H is diag(1, 2), the hypergradient 0.5."""
    centre = 0.0 if at_zero else small
    psi = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    a, b = (torch.tensor([value], dtype=dtype, requires_grad=True) for value in (large, centre))

    def inner() -> Tensor:
        z = (b - centre) / small
        bowl = 0.5 * (a - large) ** 2 + small**2 * z.cosh().log() + 0.5 * (b - centre - (psi - 1) * small) ** 2
        return loss_scale * bowl.sum()

    return lambda: b.sum() / small, inner, [a, b], [psi]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [MINRES(), auxfast.solvers.Dense()])
@pytest.mark.parametrize("at_zero", [False, True])
@pytest.mark.parametrize(("large", "small"), [(100.0, 0.01), (1e4, 1e-6), (1.0, 1e-4), (1e-6, 1e-9)])
def test_parameters_of_different_scales(large, small, at_zero, solver, dtype):
    problem = two_scales(large, small, at_zero=at_zero, dtype=dtype)
    result = hypergradient(*problem, curvature="finite-difference", solver=solver)
    assert abs(result.grads[0].item() - 0.5) < 5e-4
    assert result.stats.converged
    assert abs(result.grads[0].item() - 0.5) <= 3 * 0.5 * result.stats.operator_error + 1e-7


@pytest.mark.parametrize("loss_scale", [1e-30, 1e-8, 1e8])
def test_the_scale_of_the_loss_does_not_matter(loss_scale):
    problem = two_scales(100.0, 0.01, loss_scale=loss_scale, dtype=torch.float32)
    result = hypergradient(*problem, curvature="finite-difference")
    assert abs(result.grads[0].item() - 0.5) < 5e-4
    assert result.stats.converged


def test_a_scale_that_float32_cannot_resolve_is_not_called_converged():
    centre, scale = 1e4, 0.01  # next to the rounding of the parameter
    w, psi = (torch.tensor(value, requires_grad=True) for value in (centre, 1.0))

    def inner() -> Tensor:
        return scale**2 * ((w - centre) / scale).cosh().log() + 0.5 * (w - centre - (psi - 1) * scale) ** 2

    with pytest.warns(RuntimeWarning, match=r"float64"):
        stats = hypergradient(lambda: w / scale, inner, [w], [psi], curvature="finite-difference").stats
    assert (stats.converged, stats.stop_reason) == (False, "inexact")
    assert stats.operator_error > 1e-3


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(10, 16, batch_first=True), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x).mean(1))


def with_batch_norm() -> nn.Module:
    layers = nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(32, 2))


def convolutional() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))


def with_zeros() -> nn.Module:
    net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
    for tensor in (net[0].bias, net[2].weight, net[2].bias):
        nn.init.zeros_(tensor)
    return net


@pytest.mark.parametrize("vector", ["outer gradient", "random"])
def test_products_of_a_transformer_in_float32(vector):
    torch.manual_seed(0)
    x, y = torch.randn(64, 12, 32), torch.randint(2, (64,))
    x_out, y_out = torch.randn(64, 12, 32), torch.randint(2, (64,))
    net, log_decay = Transformer(), torch.tensor(-5.0, requires_grad=True)
    params = list(net.parameters())

    def inner() -> Tensor:
        return F.cross_entropy(net(x), y) + log_decay.exp() * sum(w.square().sum() for w in params)

    train(inner, params, steps=30)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(inner(), params, create_graph=True)
        outer = torch.autograd.grad(F.cross_entropy(net(x_out), y_out), params)
    for _ in range(1 if vector == "outer gradient" else 4):
        v = outer if vector == "outer gradient" else [torch.randn_like(w) for w in params]
        wanted = flat(torch.autograd.grad(gradient, params, v, retain_graph=True))
        assert (flat(finite_difference(inner, params)(v)) - wanted).norm() < 1e-2 * wanted.norm()


def train(inner: Callable[[], Tensor], params: list[Tensor], steps: int) -> None:
    optimizer = torch.optim.Adam(params, lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        inner().backward()
        optimizer.step()


NETWORKS: list[tuple[Callable[[], nn.Module], tuple[int, ...], int]] = [
    (Transformer, (12, 32), 20),
    (with_batch_norm, (10,), 30),
    (convolutional, (3, 8, 8), 30),
    (Recurrent, (6, 10), 30),
    (with_zeros, (10,), 0),
    (with_zeros, (10,), 1),  # what was zero is tiny now
]


@pytest.mark.parametrize(("make", "shape", "steps"), NETWORKS)
def test_products_of_networks_and_their_estimated_error(make, shape, steps):
    torch.manual_seed(0)
    x, y = torch.randn(2, 64, *shape), torch.randint(2, (2, 64))
    net = make()
    params, log_decay = list(net.parameters()), torch.tensor(-5.0, requires_grad=True)

    def inner() -> Tensor:
        return F.cross_entropy(net(x[0]), y[0]) + log_decay.exp() * sum(w.square().sum() for w in params)

    train(inner, params, steps)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), auxfast.preserved_state():
        gradient = torch.autograd.grad(inner(), params, create_graph=True)
        outer = torch.autograd.grad(F.cross_entropy(net(x[1]), y[1]), params)
        vectors = [outer, *([torch.randn_like(w) for w in params] for _ in range(3))]
        products = [torch.autograd.grad(gradient, params, v, retain_graph=True) for v in vectors]
        mixed = [torch.autograd.grad(gradient, log_decay, v, retain_graph=True)[0] for v in vectors]
    with auxfast.preserved_state():
        curvature = finite_difference(inner, params)
        for vector, product, wanted in zip(vectors, products, mixed, strict=True):
            error = (flat(curvature(vector)) - flat(product)).norm() / flat(product).norm()
            (found,) = curvature.mixed(vector, [log_decay])
            assert abs(found - wanted) <= max(3e-2 * abs(wanted), 1e-6 * flat(vector).norm())
            assert error <= 3 * curvature.operator_error
            assert curvature.operator_error < (10 * error + 1e-3)  # kinks and float32 allow no better than error
            assert not curvature.disagrees


@pytest.mark.parametrize("norm", [1e-36, 1e36])
def test_vectors_of_any_norm(norm):
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    curvature = finite_difference(lambda: w.exp().sum(), [w])
    (product,) = curvature([norm * torch.tensor([1.0, -1.0])])
    torch.testing.assert_close(product / norm, w.detach().exp() * torch.tensor([1.0, -1.0]), rtol=1e-3, atol=0)


def test_dropout_masks_are_the_same_in_every_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1)).double()
    x, phi = torch.randn(32, 6).double(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def inner() -> Tensor:
        return net(x).square().mean() + phi * sum(w.square().sum() for w in net.parameters())

    grads = []
    for curvature in ("hessian", "finite-difference"):
        torch.manual_seed(1)
        result = hypergradient(lambda: net(x).mean(), inner, net.parameters(), [phi], curvature=curvature)
        assert result.stats.converged
        grads.append(result.grads[0])
    torch.testing.assert_close(*grads, rtol=1e-2, atol=0)


def test_transforms_of_torch_func_inside_of_the_loss():
    problem = Ridge()

    def inner() -> Tensor:
        return problem.inner_loss() + torch.func.grad(lambda w: (w**2).sum())(problem.w).square().sum()

    args = (problem.outer_loss, inner, [problem.w], [problem.decay])
    exact = hypergradient(*args, solver=Dense()).grads[0]
    found = hypergradient(*args, curvature="finite-difference", solver=Dense()).grads[0]
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


def test_torchs_random_state_does_not_matter():
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(hypergradient(*two_scales(100.0, 0.01, dtype=torch.float32), curvature="finite-difference"))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0].stats == results[1].stats
    assert torch.equal(results[0].grads[0], results[1].grads[0])


@pytest.mark.parametrize("compute", ["parameters", "autocast"])
def test_bfloat16_is_not_called_converged(compute):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    x, phi = torch.randn(32, 6), torch.tensor(0.1, requires_grad=True)
    if compute == "parameters":
        net, x = net.to(torch.bfloat16), x.to(torch.bfloat16)

    def inner() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast"):
            fit = (net(x).float() - 1).square().mean()
        return fit + phi * sum(w.float().square().sum() for w in net.parameters())

    args = (lambda: net(x.to(net[0].weight.dtype)).float().mean(), inner, list(net.parameters()), [phi])
    exact = hypergradient(*args, warn=False).grads[0]
    result = hypergradient(*args, curvature="finite-difference", warn=False)
    assert result.stats.stop_reason == "inexact"
    torch.testing.assert_close(result.grads[0], exact, rtol=3 * result.stats.operator_error, atol=0)


def test_the_error_is_told_of_free_entries_too():
    w = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    phi = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def inner() -> Tensor:
        return (w - phi / 2).square().sum() + 3 * w.abs().sum() + w[0] ** 4

    args = (lambda: w.exp().sum(), inner, [w], [phi])
    exact = hypergradient(*args, free=[w != 0])
    found = hypergradient(*args, free=[w != 0], curvature="finite-difference")
    torch.testing.assert_close(found.grads, exact.grads, rtol=1e-7, atol=0)
    assert 0 < found.stats.operator_error < 1e-6


class MetaWeights:
    """Samples that are weighted by their own detached losses, as in Meta-Weight-Net."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y, v = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((64, 5), (64,), (5,)))
        self.w = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
        self.a = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
        self.outer = lambda: self.w @ v

    def inner(self, *, detached: bool = True) -> Tensor:
        losses = (self.x @ self.w - self.y) ** 2
        weights = torch.sigmoid(self.a[0] + self.a[1] * (losses.detach() if detached else losses))
        return (weights * losses).mean() + 0.1 * self.w.square().sum()

    def result(self, **options):
        options = {"curvature": "finite-difference", "solver": MINRES(damping=1.0)} | options
        return hypergradient(self.outer, lambda: self.inner(), [self.w], [self.a], **options)


def test_a_detached_path_is_told():
    problem, state = MetaWeights(), SolverState()
    with pytest.warns(RuntimeWarning, match=r"disagree about its second derivatives.*detach\(\)") as record:
        results = [problem.result(state=state) for _ in range(2)]
    assert len(record) == 1
    first = results[0]
    assert (first.stats.converged, first.stats.stop_reason) == (False, "inexact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert problem.result(warn=False).stats == first.stats
        problem.result(curvature="hessian")
        problem.inner = lambda: MetaWeights.inner(problem, detached=False)
        assert problem.result().stats.converged


def test_a_detached_path_that_only_the_mixed_product_takes_is_told():
    w, phi = (torch.full((), value, dtype=torch.float64, requires_grad=True) for value in (1.0, 2.0))
    with pytest.warns(RuntimeWarning, match=r"disagree about its second derivatives"):
        hypergradient(
            w, lambda: w.square() * (1 + phi) + phi * w.detach() ** 4, [w], [phi], curvature="finite-difference"
        )


def test_products_of_a_detached_path_are_those_of_the_gradient():
    problem = MetaWeights()
    vector = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (product,) = finite_difference(problem.inner, [problem.w])([vector])

    def gradient(w: Tensor) -> Tensor:
        residuals = problem.x @ w - problem.y
        weights = torch.sigmoid(problem.a[0] + problem.a[1] * residuals**2)
        return (2 * weights * residuals) @ problem.x / 64 + 0.2 * w

    _, wanted = torch.autograd.functional.jvp(gradient, problem.w.detach(), vector)
    torch.testing.assert_close(product, wanted, rtol=1e-8, atol=0)


def test_the_identity_approximation_takes_few_gradients():
    problem, calls = Ridge(), 0

    def inner() -> Tensor:
        nonlocal calls
        calls += 1
        return problem.inner_loss()

    args = (problem.outer_loss, inner, [problem.w], [problem.decay])
    hypergradient(*args, curvature="finite-difference", solver=Identity(0.1), warn=False)
    assert calls < 30
