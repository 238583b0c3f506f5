"""Repeated passes: when the engine is asked, and that passes of our own are its equal."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from auxfast.autograd import pullback as module
from auxfast.autograd.graph import vjp
from auxfast.autograd.pullback import OneAtATime, Pullback
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.losses import Evaluation

WIDTH = 72  # of a layer with enough weights for passes of our own


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(module, "_known", {})


def net() -> tuple[list[Tensor], nn.Module]:
    layers = nn.Sequential(nn.Linear(5, WIDTH), nn.Softplus(), nn.Linear(WIDTH, WIDTH)).double()
    return [*layers.parameters()], layers


def gradient(layers: nn.Module, rows: int = 4, scale: Tensor | float = 1.0, hook=None) -> list[Tensor]:
    hidden = layers[1](layers[0](torch.randn(rows, 5, dtype=torch.float64)))
    if hook is not None:
        hidden.register_hook(hook)
    loss = (scale * layers[2](hidden).square()).mean()
    return [*torch.autograd.grad(loss, [*layers.parameters()], create_graph=True)]


def vectors_like(params: list[Tensor], *many: int) -> list[Tensor]:
    return [torch.randn(*many, *w.shape, dtype=w.dtype) for w in params]


def check(pullback: Pullback, outputs: list[Tensor], inputs: list[Tensor]) -> None:
    vectors = vectors_like(outputs)
    torch.testing.assert_close([*pullback(vectors)], [*vjp(outputs, inputs, vectors)])


def is_ours(pullback: Pullback) -> bool:
    return pullback._single is not None and pullback._single._pass is not None


def test_a_structure_is_compared_with_the_engine_once_and_planned_once(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "vjp", lambda *args: asked.append(1) or vjp(*args))
    params, layers = net()
    plans = set()
    for rows in (4, 4, 7, 1):
        grads = gradient(layers, rows)
        pullback = Pullback(grads, params)
        for _ in range(2):
            check(pullback, grads, params)
        plans.add(id(pullback._single._pass))
        del pullback
    assert len(asked) == 1
    assert len(plans) == 1


def test_two_graphs_of_a_structure_at_a_time():
    params, layers = net()
    graphs = [gradient(layers) for _ in range(2)]
    pullbacks = [Pullback(grads, params) for grads in graphs]
    for _ in range(2):
        for pullback, grads in zip(pullbacks, graphs, strict=True):
            check(pullback, grads, params)
    assert pullbacks[0]._single._pass is not pullbacks[1]._single._pass


def test_other_inputs_of_the_same_graph():
    params, layers = net()
    scale = torch.rand(WIDTH, dtype=torch.float64, requires_grad=True)
    grads = gradient(layers, scale=scale)
    pullback = Pullback(grads, params)
    check(pullback, grads, params)
    to_scale = Pullback(grads, [scale], pullback)
    check(to_scale, grads, [scale])
    assert is_ours(to_scale)
    assert to_scale._graph is pullback._graph


def test_nothing_of_a_graph_is_kept():
    params, layers = net()
    hidden = layers[0](torch.randn(4, 5, dtype=torch.float64)).relu()  # whose result its node saves
    grads = [*torch.autograd.grad(layers[2](hidden).square().mean(), params, create_graph=True)]
    pullback = Pullback(grads, params)
    check(pullback, grads, params)
    assert is_ours(pullback)
    reference = weakref.ref(hidden)
    del hidden, grads
    assert reference() is not None
    del pullback
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("hook", [lambda grad: grad.clamp(max=0.1), lambda grad: 2 * grad])
def test_hooks_that_change_gradients_are_not_passed_over(hook):
    params, layers = net()
    for _ in range(2):
        grads = gradient(layers, hook=hook)
        pullback = Pullback(grads, params)
        check(pullback, grads, params)
        assert not is_ours(pullback)
    grads = gradient(layers)
    pullback = Pullback(grads, params)
    check(pullback, grads, params)
    assert is_ours(pullback)  # the hook shows in the structure: another one


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_vectors_that_say_nothing_decide_nothing(value):
    params, layers = net()
    grads = gradient(layers)
    pullback = Pullback(grads, params)
    vectors = [torch.full_like(w, value) for w in params]
    torch.testing.assert_close([*pullback(vectors)], [*vjp(grads, params, vectors)], equal_nan=True)
    (plans,) = module._known.values()
    assert [plan.agrees for plan in plans.values()] == [None]
    check(Pullback(grads, params), grads, params)
    assert [plan.agrees for plan in plans.values()] == [True]


def test_zeros_do_not_speak_for_what_they_leave_out():
    params, layers = net()
    grads = gradient(layers)
    pullback = Pullback(grads, params)
    vectors = vectors_like(params)
    vectors[2] = torch.zeros_like(params[2])
    torch.testing.assert_close([*pullback(vectors)], [*vjp(grads, params, vectors)])
    assert pullback._single._plan.agrees is None
    check(pullback, grads, params)
    assert pullback._single._plan.agrees


def test_an_output_may_be_an_input():
    w, alone = (torch.randn(100, 100, dtype=torch.float64, requires_grad=True) for _ in range(2))
    outputs = [w.tanh(), alone, w]
    for inputs in ([w, alone], [alone], [w]):
        pullback = Pullback(outputs, inputs)
        for _ in range(2):
            check(pullback, outputs, inputs)
        assert is_ours(pullback)


def test_nothing_depends_on_nothing():
    w = torch.randn(3, requires_grad=True)
    assert Pullback([], [w])([]) == [None]
    assert Pullback([], [w]).together([]) == [None]


def test_under_autocast_the_engine_is_asked():
    params, layers = net()
    grads = gradient(layers)
    with torch.autocast("cpu"):
        pullback = Pullback(grads, params)
        check(pullback, grads, params)
        assert not is_ours(pullback)
        with pytest.raises(OneAtATime):
            pullback.together(vectors_like(params, 8))


@pytest.mark.parametrize("after", [0, 1])
def test_what_was_overwritten_is_an_error(after):
    params, layers = net()
    grads = gradient(layers)
    pullback = Pullback(grads, params)
    for _ in range(after):
        check(pullback, grads, params)
    with torch.no_grad():
        params[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pullback(vectors_like(params))


def test_a_graph_that_was_freed_is_an_error():
    params, layers = net()
    grads = gradient(layers)
    torch.autograd.grad(grads, params, vectors_like(params))
    with pytest.raises(RuntimeError, match="second time"):
        Pullback(grads, params)(vectors_like(params))


def test_an_error_in_a_node_is_the_engines():
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("not today")

    params, _ = net()
    outputs = [Stubborn.apply(w.sin()) for w in params]
    pullback = Pullback(outputs, params)
    for _ in range(2):
        with pytest.raises(ValueError, match="not today"):
            pullback(vectors_like(params))


def test_where_the_engine_is_as_fast_it_is_asked():
    few = torch.randn(4, 5, requires_grad=True)
    assert not is_ours(Pullback([few.exp()], [few]))
    kernels = torch.randn(8, 8, 16, 16, requires_grad=True)
    assert not is_ours(Pullback([kernels.exp()], [kernels]))


def test_structures_are_not_kept_without_end(monkeypatch):
    monkeypatch.setattr(module, "_MOST_STRUCTURES", 3)
    w = torch.randn(100, 100, dtype=torch.float64, requires_grad=True)
    value = w
    for _ in range(8):
        value = value.sin()
        check(Pullback([value], [w]), [value], [w])
        assert len(module._known) <= 3


# ------------------------------------------------------------------------------------------- several vectors at once


def test_several_vectors_through_a_large_graph_go_in_pieces(monkeypatch):
    monkeypatch.setattr(module, "_TOGETHER_BYTES", 8 * 8 * 4 * WIDTH)
    params, layers = net()
    grads = gradient(layers)
    pullback = Pullback(grads, params)
    assert pullback._at_once == 8
    block = vectors_like(params, 19)
    found = pullback.together(block)
    for i in range(19):
        torch.testing.assert_close([t[i] for t in found], [*vjp(grads, params, [t[i] for t in block])])


def test_few_vectors_are_taken_one_at_a_time():
    params, layers = net()
    with pytest.raises(OneAtATime):
        Pullback(gradient(layers), params).together(vectors_like(params, 3))


@pytest.mark.parametrize("first", ["random", "zeros"])
def test_a_hook_that_changes_gradients_is_not_passed_over(first):
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    h = w.sin() @ torch.randn(5, 3, dtype=torch.float64)
    h.register_hook(lambda grad: grad.clamp(max=0.1))
    curvature = Hessian(Evaluation("inner_loss", h.tanh().square().sum()), [w])
    block = torch.randn(8, 4, 5, dtype=torch.float64)
    if first == "zeros":  # which agree with anything
        assert not curvature.batched([torch.zeros_like(block)])[0].any()
    together = curvature.batched([block])
    torch.testing.assert_close(together[0], torch.stack([curvature([row])[0] for row in block]))


def test_checkpoints_are_left_to_the_engine():
    """Their hooks would keep a segment for every tensor of every pass."""
    w = torch.randn(100, 100, dtype=torch.float64, requires_grad=True)
    h = checkpoint(lambda w: (w @ w).tanh(), w, use_reentrant=False)
    curvature = Hessian(Evaluation("inner_loss", h.square().sum()), [w])
    block = torch.randn(8, 100, 100, dtype=torch.float64)
    together = curvature.batched([block])
    assert curvature._pullback._block is None
    torch.testing.assert_close(together[0], torch.stack([curvature([row])[0] for row in block]))
    assert not is_ours(curvature._pullback)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_parameters_of_any_rank(shape):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    curvature = Hessian(Evaluation("inner_loss", w.exp().square().sum()), [w])
    block = torch.randn(6, *shape, dtype=torch.float64)
    torch.testing.assert_close(curvature.batched([block])[0], block * 4 * (2 * w.detach()).exp())
    assert curvature._pullback._block is not None


def test_complex_numbers_are_left_to_the_engine():
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    curvature = Hessian(Evaluation("inner_loss", (torch.fft.fft2(w) @ (1j * w).exp()).abs().square().sum()), [w])
    block = torch.randn(6, 4, 4, dtype=torch.float64)
    together = curvature.batched([block])
    torch.testing.assert_close(together[0], torch.stack([curvature([row])[0] for row in block]))
