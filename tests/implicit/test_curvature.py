"""Products with second derivatives against the matrices themselves, and what has none."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from auxfast import _native
from auxfast.implicit import hypergradient
from auxfast.implicit.curvature import GaussNewton, Hessian
from auxfast.implicit.losses import LossGraph
from auxfast.nn import NonlinearCombiner

from .problems import Dense, flat


def hessian_of(loss: Tensor, params: list[Tensor], **options) -> Hessian:
    return Hessian(LossGraph("inner_loss", loss), params, **options)


def problem() -> tuple[Hessian, list[Tensor], Tensor, Tensor]:
    """inner = sum(exp(u)^T M v) + phi . v^2 / 2 with W = (u, v); also its Hessian and d grad / d phi."""
    generator = torch.Generator().manual_seed(0)
    u, v, phi = (torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for n in (3, 4, 4))
    m = torch.randn(3, 4, generator=generator, dtype=torch.float64)

    def inner(u: Tensor, v: Tensor, phi: Tensor) -> Tensor:
        return u.exp() @ m @ v + 0.5 * (phi * v.square()).sum()

    blocks = torch.autograd.functional.hessian(inner, (u.detach(), v.detach(), phi.detach()))
    hessian = torch.cat([torch.cat(blocks[i][:2], dim=1) for i in range(2)])
    mixed = torch.cat([blocks[i][2] for i in range(2)])
    return hessian_of(inner(u, v, phi), [u, v]), [phi], hessian, mixed


def test_products():
    curvature, _, hessian, _ = problem()
    for column, unit in zip(hessian.T, torch.eye(7, dtype=torch.float64), strict=True):
        product = curvature(unit.split([3, 4]))
        torch.testing.assert_close(torch.cat(product), column)
        assert not any(t.requires_grad for t in product)


@pytest.mark.parametrize("count", [1, 3, 7, 40])
def test_batched_products(count):
    curvature, _, hessian, _ = problem()
    block = torch.randn(count, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    product = curvature.batched([t.reshape(count, -1) for t in block.split([3, 4], dim=1)])
    torch.testing.assert_close(torch.cat(product, dim=1), block @ hessian)


def test_mixed():
    curvature, phi, _, mixed = problem()
    q = torch.arange(7, dtype=torch.float64)
    unused = torch.ones(2, requires_grad=True)
    assert curvature.mixed(q.split([3, 4]), []) == []
    products = curvature.mixed(q.split([3, 4]), [unused, *phi])
    assert products[0] is None
    torch.testing.assert_close(products[1], q @ mixed)


def test_parameters_without_curvature_are_not_in_the_system():
    w, linear, unused = (torch.ones(3, requires_grad=True) for _ in range(3))
    curvature = hessian_of(w.square().sum() + linear.sum(), [unused, linear, w])
    assert curvature.in_system == [False, False, True]
    torch.testing.assert_close(curvature([torch.ones(3)]), [torch.full((3,), 2.0)])


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.qkv = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 24)

        def forward(self, tokens: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(self.embed(tokens))).chunk(3, dim=-1)
            return ((q @ k.mT).softmax(-1) @ v).mean(1)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
            for step in x.unbind(1):
                h = self.cell(step, h)
            return h

    conv = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    )
    return {
        "mlp": (nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 4)), torch.randn(5, 3)),
        "conv": (conv, torch.randn(5, 2, 6, 6)),
        "attention": (Attention(), torch.randint(20, (5, 6))),
        "gru": (Recurrent(), torch.randn(5, 4, 3)),
        "sdpa math": (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), torch.randn(5, 3, 4)),
    }


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
@pytest.mark.parametrize("name", networks())
def test_batched_products_of_networks_are_those_one_at_a_time(name, kind):
    torch.manual_seed(0)
    net, x = networks()[name]
    net, x = net.double(), x.double() if x.is_floating_point() else x
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = net(x)
    loss = F.cross_entropy(outputs.flatten(1), torch.randint(4, (5,)))
    curvature = kind(LossGraph("inner_loss", loss, outputs), list(net.parameters()))
    block = [torch.randn(8, *w.shape, dtype=w.dtype) for w in curvature.params]
    together = curvature.batched(block)
    apart = [curvature(vectors) for vectors in zip(*(t.unbind() for t in block), strict=True)]
    for a, *b in zip(together, *apart, strict=True):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-9, atol=1e-12)
    assert curvature.pullback.refusal is None


@pytest.mark.parametrize("native", [True, False])
def test_batched_products_through_a_combiner(native):
    torch.manual_seed(0)
    net, combiner = nn.Linear(4, 3).double(), NonlinearCombiner(3, (5, 5)).double()
    with nullcontext() if native else _native.reference_kernels():
        curvature = hessian_of(combiner(net(torch.randn(8, 4).double()).square()), list(net.parameters()))
        block = [torch.randn(9, *w.shape, dtype=w.dtype) for w in curvature.params]
        together = curvature.batched(block)
        assert curvature.pullback.num_batched == 9
        for i in range(9):
            torch.testing.assert_close([t[i] for t in together], curvature([t[i] for t in block]))


def test_a_function_that_looks_at_values_runs_once_for_each_vector():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * Inner.apply(x)

    class Inner(torch.autograd.Function):  # its backward looks at values, as vmap cannot
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 3 * x**2

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 6 * x if float(grad.sum()) < 1e9 else None

    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    curvature = hessian_of(Opaque.apply(w).sum() + (w**2).sum(), [w])
    block = torch.randn(8, 4, dtype=torch.float64)
    torch.testing.assert_close(curvature.batched([block])[0], block * (6 * w.detach() + 2))
    assert curvature.pullback.num_batched == 8


# ---------------------------------------------------------------------------------- what has no second derivatives


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3 * ctx.saved_tensors[0] ** 2


class OnceOnly(Cube):
    backward = staticmethod(once_differentiable(Cube.backward))


class Detached(Cube):
    @staticmethod
    def backward(ctx, grad):
        return grad.detach() * 3 * ctx.saved_tensors[0].detach() ** 2


class ZeroGradient(Cube):
    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


def refused(loss: Tensor, params: list[Tensor], name: str) -> None:
    phi = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"inner_loss went through {name}, which has no second.*finite-difference"):
        hypergradient(sum(w.sum() for w in params), loss * phi, params, [phi])


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_weight_norm_whose_second_derivatives_torch_gets_wrong_is_refused(curvature):
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3, bias=False).double())
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    x, phi = torch.randn(8, 5, dtype=torch.float64), torch.ones((), dtype=torch.float64, requires_grad=True)

    def problem(network):
        def inner(with_outputs: bool = False) -> Any:
            outputs = network()
            loss = (outputs - 1).square().mean() + phi * (v.square().sum() + g.square().sum())
            return (loss, outputs) if with_outputs else loss

        return (lambda: network().square().mean()), inner, [v, g], [phi]

    by_torch, by_hand = problem(lambda: layer(x)), problem(lambda: x @ (g * v / v.norm(dim=1, keepdim=True)).T)
    remedy = r"inner_loss went through WeightNorm.*v\.norm\(dim=1, keepdim=True\).*finite-difference"
    outer, inner, *params = by_torch
    given = inner() if curvature == "hessian" else (lambda: inner(True))
    with pytest.raises(RuntimeError, match=remedy):
        hypergradient(outer, given, *params, curvature=curvature)
    found = hypergradient(*by_torch, curvature="finite-difference", solver=Dense(), warn=False)
    torch.testing.assert_close(found.grads, hypergradient(*by_hand, solver=Dense(), warn=False).grads)


def test_weight_norm_of_outer_parameters_is_right():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 1, bias=False).double())
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    w, x = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(8, 5, dtype=torch.float64)
    grads = []
    for weight in (lambda: layer.weight, lambda: g * v / v.norm(dim=1, keepdim=True)):
        inner = ((w - weight().flatten()) ** 2 * (1 + x.square().mean(0))).sum()
        grads.append(hypergradient(w.sin().sum(), inner, [w], [g, v], solver=Dense()).grads)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("function", [OnceOnly, Detached])
def test_functions_that_are_once_differentiable(function):
    """The first raises nothing of its own where unused inputs are allowed, the second never: both gave zeros."""
    w = torch.randn(4, requires_grad=True)
    refused(function.apply(w).square().sum(), [w], f"{function.__name__}Backward")
    if function is OnceOnly:  # it may also stand at the end
        refused(function.apply(w).sum(), [w], "OnceOnlyBackward")


@pytest.mark.parametrize("function", [Cube, ZeroGradient])
def test_functions_that_are_twice_differentiable_pass(function):
    w = torch.randn(4, requires_grad=True)
    expected = 30 * w.detach() ** 4 + 2 if function is Cube else torch.full((4,), 2.0)
    curvature = hessian_of(function.apply(w).square().sum() + w.square().sum(), [w])
    torch.testing.assert_close(curvature([torch.ones(4)])[0], expected)


def test_operators_without_a_double_backward_are_named():
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        loss = F.scaled_dot_product_attention(q * 2, q, q).square().sum()
    refused(loss, [q], "ScaledDotProductFlashAttentionForCpuBackward0")
    logits = torch.randn(10, 2, 5, requires_grad=True)
    targets = torch.randint(1, 5, (2, 3))
    refused(F.ctc_loss(logits.log_softmax(-1), targets, [10, 10], [3, 3]), [logits], "CtcLossBackward0")
    bag = nn.EmbeddingBag(5, 2)
    refused(bag(torch.tensor([[0, 3]])).pow(4).sum(), [bag.weight], "EmbeddingBagBackward0")
    x, y = torch.randn(2, 3, 4, requires_grad=True)
    refused(torch.cdist(x, y).sum() + x.pow(4).sum(), [x, y], "CdistBackward0")


class Block(nn.Module):
    """Pre-normalised attention and a gated network, both added to what comes in, as in Llama."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(size), nn.RMSNorm(size)])
        self.qkv, self.out, self.gate, self.up = (nn.Linear(size, n) for n in (3 * size, size, size, size))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x))[:, None].chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        h = self.norms[1](x)
        return x + F.silu(self.gate(h)) * self.up(h)


def test_only_the_operators_without_second_derivatives_are_named():
    torch.manual_seed(0)
    net, words = nn.Sequential(nn.Embedding(7, 8), Block(8), Block(8)), torch.randint(7, (2, 3))
    q = torch.randn(1, 2, 4, 4, requires_grad=True)
    added = q + F.scaled_dot_product_attention(q, q, q) + q
    for loss, params in ((net(words).square().mean(), [*net.parameters()]), (added.sum() ** 2, [q])):
        refused(loss, params, "ScaledDotProductFlashAttentionForCpuBackward0")
    bag, logits = nn.EmbeddingBag(5, 4), torch.randn(3, 4, requires_grad=True)
    margin = F.multi_margin_loss(bag(torch.tensor([[0], [1], [2]])) + logits, torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="through MultiMarginLossBackward0, which has no second"):
        hypergradient(logits.sum(), margin + logits.square().sum(), [logits], [bag.weight])


@pytest.mark.parametrize(
    ("loss", "way_out"),
    [
        (lambda w: F.scaled_dot_product_attention(w[None], w[None], w[None]), r"Compute attention within torch"),
        (lambda w: F.embedding_bag(torch.tensor([[0, 1]]), w[0]).exp(), r"Take torch\.nn\.Embedding, and the sum"),
        (lambda w: torch.cdist(w, 2 * w + 1), "Compute distances as"),
        (lambda w: F.multi_margin_loss(w[0], torch.tensor([0, 1])), "Pass inner_loss as a function"),
    ],
)
def test_the_way_out_that_works_comes_first(loss, way_out):
    w, phi = torch.randn(1, 2, 3, requires_grad=True), torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"no second derivatives\. {way_out}.*finite-difference'\.$"):
        hypergradient(w.sum(), loss(w).sum() + phi * w.square().sum(), [w], [phi])


# ------------------------------------------------------------------------------------------- reentrant checkpoints


@pytest.mark.parametrize("name", ["outer_loss", "inner_loss"])
@pytest.mark.parametrize("curvature", ["hessian", "finite-difference"])
@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpoints_are_refused(name, curvature, needs_gradient):
    net, phi = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), torch.zeros(1, requires_grad=True)
    x = torch.randn(5, 3, requires_grad=needs_gradient)

    def loss(**options):
        inside = checkpoint(net[:2], x, **options) if options else net[:2](x)
        return net[2](inside).square().mean() + phi.exp() * sum(w.square().sum() for w in net.parameters())

    def call(losses):
        return hypergradient(**losses, inner_params=net.parameters(), outer_params=[phi], curvature=curvature).grads[0]

    losses = {"outer_loss": loss, "inner_loss": loss}
    expected = call(losses)
    right, wrong = (lambda: loss(use_reentrant=False)), (lambda: loss(use_reentrant=True))
    torch.testing.assert_close(call({**losses, name: right}), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match=f"{name} went through a reentrant.*pass use_reentrant=False"):
        call({**losses, name: wrong})
    if needs_gradient and (curvature == "hessian" or name == "outer_loss"):
        with pytest.raises(RuntimeError, match=f"{name} went through a reentrant.*pass use_reentrant=False"):
            call({**losses, name: wrong()})


def test_modules_that_are_called_without_gradients_are_no_checkpoints():
    teacher, w, phi = nn.Linear(3, 1), torch.ones(3, requires_grad=True), torch.zeros(1, requires_grad=True)

    def inner():
        with torch.no_grad():
            target = teacher(torch.ones(1, 3))
        return (w.sum() - target).square().sum() + phi.exp() * w.square().sum()

    assert hypergradient(lambda: w.sum(), inner, [w], [phi]).grads[0].isfinite()


# -------------------------------------------------------------------------------------------------- Gauss-Newton


class TwoLayers:
    """W1, W2 with tanh between; a log loss, a weight decay per tensor that phi governs, and weights of examples."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.w = [torch.randn(*s, generator=generator).double().requires_grad_() for s in ((3, 4), (4, 2))]
        self.phi = torch.randn(2, generator=generator).double().requires_grad_()
        self.x = torch.randn(7, 3, generator=generator).double()
        self.y = torch.randint(2, (7,), generator=generator)

    def outputs(self, w1: Tensor, w2: Tensor) -> Tensor:
        return torch.tanh(self.x @ w1) @ w2

    def head(self, z: Tensor, w1: Tensor, w2: Tensor, phi: Tensor) -> Tensor:
        decay = sum(p.exp() * w.square().sum() for p, w in zip(phi, (w1, w2), strict=True))
        return F.cross_entropy(z, self.y) + decay

    def dense(self, decay: bool) -> Tensor:
        """J^T l'' J, with J of (z, W) in W."""
        w = [t.detach() for t in self.w]
        jacobian = torch.autograd.functional.jacobian(self.outputs, tuple(w))
        j = torch.cat([t.reshape(14, -1) for t in jacobian], dim=1)
        z = self.outputs(*w)
        head = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z.reshape(7, 2), self.y), z.reshape(-1))
        scale = torch.cat([p.exp().expand(t.numel()) for p, t in zip(self.phi.detach(), w, strict=True)])
        return j.T @ head @ j + (torch.diag(2 * scale) if decay else 0)

    def gauss_newton(self, decay: bool) -> GaussNewton:
        z = self.outputs(*self.w)
        loss = self.head(z, *self.w, self.phi) if decay else F.cross_entropy(z, self.y)
        return GaussNewton(LossGraph("inner_loss", loss, z), self.w)


@pytest.mark.parametrize("decay", [False, True], ids=["network only", "parameters in the loss too"])
def test_gauss_newton_products(decay):
    case = TwoLayers()
    curvature, dense = case.gauss_newton(decay), case.dense(decay)
    eye = torch.eye(20, dtype=torch.float64)
    block = [eye[:, :12].reshape(20, 3, 4), eye[:, 12:].reshape(20, 4, 2)]
    torch.testing.assert_close(torch.cat([t.flatten(1) for t in curvature.batched(block)], dim=1), dense)
    torch.testing.assert_close(flat(curvature([t[5] for t in block])), dense[5])
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12


def test_gauss_newton_hypergradient():
    """The solve is with G, the mixed product exact."""
    case = TwoLayers()
    z = case.outputs(*case.w)
    outer = case.outputs(*case.w).square().sum()
    result = hypergradient(
        outer, case.head(z, *case.w, case.phi), case.w, [case.phi], curvature="gauss-newton", outputs=z, solver=Dense()
    )
    b = flat(torch.autograd.grad(case.outputs(*case.w).square().sum(), case.w))
    q = torch.linalg.solve(case.dense(True), b)
    mixed = [2 * p.exp() * w.detach().reshape(-1) for p, w in zip(case.phi.detach(), case.w, strict=True)]
    wanted = torch.stack([-(q[:12] @ mixed[0]), -(q[12:] @ mixed[1])])
    torch.testing.assert_close(result.grads[0], wanted)


def test_gauss_newton_of_outputs_that_depend_on_no_parameter():
    w, phi = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = torch.randn(5, 3, dtype=torch.float64) @ phi
    curvature = GaussNewton(LossGraph("inner_loss", z.square().sum() + (w**4).sum(), z), [w])
    block = torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(curvature.batched([block])[0], block * 12 * w.detach() ** 2)
    torch.testing.assert_close(curvature([block[0]])[0], block[0] * 12 * w.detach() ** 2)


def test_gauss_newton_with_several_outputs_and_views():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    a, b = (x @ w).chunk(2, dim=1)  # linear in w, so that G is the Hessian; b is no output, and enters directly

    def loss_of(w: Tensor) -> Tensor:
        a, b = (x @ w.view(3, 4)).chunk(2, dim=1)
        return a.exp().sum() + (a * b).square().sum()

    hessian = torch.autograd.functional.hessian(loss_of, w.detach().reshape(-1))
    loss = a.exp().sum() + (a * b).square().sum()
    vector = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    for outputs in ([a, b], [a], [b]):
        curvature = GaussNewton(LossGraph("inner_loss", loss, outputs), [w], retain_graph=True)
        torch.testing.assert_close(curvature([vector])[0].reshape(-1), hessian @ vector.reshape(-1))


def test_outputs_are_checked():
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    z = w * 2
    other, later = w * 3, z.exp()
    loss = (later * phi).sum()

    def call(outputs, curvature="gauss-newton", inner=loss):
        return hypergradient(w.sum(), inner, [w], [phi], curvature=curvature, outputs=outputs, retain_graph=True)

    with pytest.raises(ValueError, match="outputs must be given for curvature='gauss-newton'"):
        call(None)
    with pytest.raises(TypeError, match="outputs must be a tensor or a list of tensors"):
        call([])
    for wrong in (other, w, torch.ones(3)):
        with pytest.raises(ValueError, match=r"outputs\[0\] is not a result in the graph of inner_loss"):
            call(wrong)
    with pytest.raises(ValueError, match=r"outputs\[1\] is computed from outputs\[0\]"):
        call([z, later])
    with pytest.raises(ValueError, match="outputs are for curvature='gauss-newton', not for 'hessian'"):
        call(z, "hessian")
    with pytest.raises(ValueError, match="outputs must be None where inner_loss is made of functions"):
        call(z, inner=lambda: (loss, z))
    with pytest.raises(TypeError, match=r"inner_loss must return \(loss, outputs\)"):
        call(None, inner=lambda: loss)
    with pytest.raises(ValueError, match="curvature must be one of hessian, gauss-newton, hessian-jvp, f"):
        call(None, "fisher")
