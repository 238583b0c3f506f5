"""Products of a batch of vectors, and of one, through graphs of many kinds, against the engine's of each vector."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from auxfast.autograd.batched_backward import SingleBackward
from auxfast.autograd.engine import vjp
from auxfast.autograd.pullback import Pullback
from auxfast.nn import ConvCombiner, NonlinearCombiner


class Pair(torch.autograd.Function):
    """Two results, of which a graph may use one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2, x**3

    @staticmethod
    def backward(ctx, first, second):
        (x,) = ctx.saved_tensors
        return 2 * first * x + 3 * second * x**2


class Scaled(torch.autograd.Function):
    """A Function with arguments that are not tensors between those that are, one of which needs no gradient."""

    @staticmethod
    def forward(ctx, power, constant, factor, x):
        ctx.save_for_backward(constant, x)
        ctx.power, ctx.factor = power, factor
        return factor * constant * x**power

    @staticmethod
    def backward(ctx, grad):
        constant, x = ctx.saved_tensors
        return None, None, None, grad * ctx.factor * ctx.power * constant * x ** (ctx.power - 1)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.linear(x.reshape(-1, w.shape[1]), w, b)


X = torch.linspace(-1, 2, 30, dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
Loss = Callable[..., Tensor]
GRAPHS: dict[str, tuple[Loss, list[tuple[int, ...]]]] = {
    "linear layers": (
        lambda w, b, v, c: linear(linear(X, w, b).relu(), v, c).square().sum(),
        [(4, 5), (4,), (3, 4), (3,)],
    ),
    "without bias": (lambda w, v: linear(linear(X, w).tanh(), v).square().sum(), [(4, 5), (3, 4)]),
    "one unit, one sample": (lambda w, v: linear(linear(X, w).tanh(), v).square().sum(), [(1, 30), (1, 1)]),
    "no samples": (lambda w, v: linear(linear(X[:0], w).tanh(), v).square().sum() + w.square().sum(), [(4, 5), (3, 4)]),
    "addmm with factors": (lambda a, b, c: torch.addmm(c, a, b, beta=-3, alpha=2).sin().sum(), [(4, 5), (5, 3), (3,)]),
    "mm of transposes": (lambda a, b: ((a.T @ b.T).tanh() @ (b @ a)).sin().sum(), [(4, 5), (3, 4)]),
    "mm of itself": (lambda a: (a @ a.T @ a).sin().sum(), [(4, 5)]),
    "mm of every other row": (lambda a, b: (a[::2] @ b[:, ::2]).sin().sum(), [(8, 3), (3, 6)]),
    "a transposed parameter twice": (lambda a: (a.T.exp() * a.T).sum() + a.t().t().sin().sum(), [(4, 5)]),
    "a transposed vector": (lambda u, s: (u.t().exp() * u * s.t()).sin().sum(), [(5,), ()]),
    "numbers": (lambda s, t: (s.exp() * t).sin() + (s * t).sum(None, keepdim=True) ** 2 + s.sum(0).cos(), [(), ()]),
    "sums": (
        lambda x: x.sum(0).sin().sum() + x.sum(-1, keepdim=True).sin().sum() + x.sum((0, 2)).exp().sum(),
        [(2, 3, 4)],
    ),
    "log-softmax": (
        lambda x: x.log_softmax(0).sin().sum() + x.log_softmax(-1).exp().sin().sum() + x.log_softmax(1).cos().sum(),
        [(2, 3, 4)],
    ),
    "cross entropy": (
        lambda w, b: F.cross_entropy(linear(X, w, b), LABELS, torch.tensor([1.0, 2, 3], dtype=X.dtype)),
        [(3, 5), (3,)],
    ),
    "cross entropy of a sample, weighted": (
        lambda w, u: (u.exp() * F.cross_entropy(linear(X, w), LABELS, reduction="none")).sum(),
        [(3, 5), (6,)],
    ),
    "cross entropy of pixels": (
        lambda w, u: (
            (F.cross_entropy((u * w).exp(), LABELS.view(2, 3, 1), reduction="none") ** 2).sum()
            + F.cross_entropy(w * u, LABELS.view(2, 3, 1), reduction="sum").exp()
        ),
        [(2, 3, 3, 1), (3, 1)],
    ),
    "cross entropy, mean and sum, within": (
        lambda w, b: (
            F.cross_entropy(linear(X, w, b), LABELS).exp()
            + F.cross_entropy(linear(X, w, b), LABELS, ignore_index=1, reduction="sum").square()
            + F.cross_entropy(b, LABELS[1]).square()
        ),
        [(3, 5), (3,)],
    ),
    "smoothed labels": (lambda w: F.cross_entropy(linear(X, w), LABELS, label_smoothing=0.2), [(3, 5)]),
    "mean squares": (lambda w, b: F.mse_loss(linear(X, w, b).sigmoid(), X[:18].view(6, 3)), [(3, 5), (3,)]),
    "binary cross entropy": (
        lambda w: F.binary_cross_entropy_with_logits(linear(X, w), X[:18].view(6, 3).sigmoid()),
        [(3, 5)],
    ),
    "broadcasting": (
        lambda u, v, s: (u[:, None] * v.exp() / (2 + s.sigmoid()) - v.abs().sqrt() * s + u.sum() ** 2).sin().sum(),
        [(3,), (1, 4), ()],
    ),
    "powers": (lambda u: (u**0 * u**3 + u**2).sum() + (u.square() + 1).log().sum(), [(5,)]),
    "sums of one thing": (lambda u: ((u + u) * (u - 2 * u) + (-u).exp() + (u + u).sin()).sum(), [(5,)]),
    "activations": (
        lambda w: sum(f(linear(X, w)).square().sum() for f in (F.gelu, F.silu, F.softplus, F.elu, F.leaky_relu)),
        [(3, 5)],
    ),
    "norms": (
        lambda w, g, b: F.layer_norm(linear(X, w), (4,), g, b).square().sum() + w.norm() ** 3,
        [(4, 5), (4,), (4,)],
    ),
    "convolution": (lambda w: F.conv2d(X.view(1, 1, 5, 6), w).tanh().square().sum(), [(2, 1, 3, 3)]),
    "a number rolled": (lambda u, v: (u.sin().roll(1) * v.sum()).sin() + (u * v).sin().sum(), [(), (4,)]),
    "log-softmax of a number": (
        lambda u, v: (F.log_softmax(u.sin(), -1) * v.sum()).sin() + (u * v).sin().sum(),
        [(), (4,)],
    ),
    "its gradient is a parameter": (lambda u, v: (u * v).sum(), [(5,), (2, 5)]),
    "a Function's other arguments": (lambda u: Scaled.apply(3, X[:5], 0.5, u.tanh()).square().sum(), [(5,)]),
    "one of two results": (lambda u: Pair.apply(u)[0].sin().sum() + Pair.apply(u.exp())[1].sum(), [(5,)]),
}


def compare(loss: Tensor, inputs: list[Tensor], k: int = 8) -> None:
    """Twice, so that the second pass finds what the first one left."""
    grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    dependent = [grad for grad in grads if grad is not None and grad.requires_grad]
    pullback, single = Pullback(dependent, inputs), SingleBackward(dependent, inputs)
    vectors = [torch.randn(k, *grad.shape, dtype=grad.dtype) for grad in dependent]
    before = [tensor.clone() for tensor in vectors]
    rtol = 1e-9 if loss.dtype == torch.float64 else 1e-5
    for _ in range(2):
        products = pullback.batched(vectors)
        for i in range(k):
            vector = [tensor[i] for tensor in vectors]
            expected = vjp(dependent, inputs, vector)
            for found in ([None if a is None else a[i] for a in products], single(vector)):
                assert [a is None for a in found] == [b is None for b in expected]
                for a, b in zip(found, expected, strict=True):
                    if a is not None:
                        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)
        assert all(map(torch.equal, vectors, before))
    assert pullback.refusal is None
    assert pullback.num_batched == 2 * k


@pytest.mark.parametrize("k", [8, 11])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_batch_is_the_pass_of_each_vector(name, k):
    torch.manual_seed(0)
    graph, shapes = GRAPHS[name]
    params = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    compare(graph(*params), params, k)


def test_inputs_may_be_inside_the_graph():
    torch.manual_seed(0)
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    h = linear(X, w).tanh()
    t = h.T
    compare((t @ h).sin().sum() + t.exp().sum(), [h, w, t])


def test_inputs_that_play_no_part_get_none():
    w, unused, out_of_reach = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    compare((w.exp() * X[:3]).sum(), [unused, w, out_of_reach, unused.exp()])


@pytest.mark.parametrize("after", ["alone", "within"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["vector", "image"])
def test_combiners_batch_their_own_passes(kind, reduction, after):
    torch.manual_seed(0)
    if kind == "vector":
        combiner, shape = NonlinearCombiner(3, (4, 4), reduction=reduction), (6, 3)
    else:
        combiner, shape = ConvCombiner(2, (3,), reduction=reduction), (2, 2, 5, 4)
    losses = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    value = combiner.double()(losses.square())
    compare(value.sum() if after == "alone" else value.exp().sum(), [losses, combiner.phi])
