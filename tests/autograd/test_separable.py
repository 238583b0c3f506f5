"""Products where terms of the loss are sums over the entries of a parameter, against autograd's own."""

from __future__ import annotations

import random
import time

import pytest
import torch
from torch import Tensor

from auxfast.autograd.pullback import Pullback
from auxfast.autograd.separable import split
from auxfast.implicit.curvature import GaussNewton, Hessian
from auxfast.implicit.losses import LossGraph

D = torch.float64
PENALTIES = {
    "weight decay": lambda w, v, phi: w.square().sum(),
    "product": lambda w, v, phi: (w * w).mean(),
    "dot product": lambda w, v, phi: w.flatten() @ w.flatten(),
    "dot product of a vector": lambda w, v, phi: v @ v,
    "L1": lambda w, v, phi: (w - 0.1).abs().sum(),
    "cube": lambda w, v, phi: v.pow(3).sum(),
    "linear": lambda w, v, phi: (phi[0] * w).sum(),
    "a weight each": lambda w, v, phi: (phi.exp() * v.square()).sum(),
    "proximal": lambda w, v, phi: (v - phi).square().sum(),
    "proximal, the other way round": lambda w, v, phi: (2 * phi - v).pow(2).sum(),
    "stack": lambda w, v, phi: (phi[:2] * torch.stack([w.square().sum(), v.square().sum()])).sum(),
    "cat": lambda w, v, phi: torch.cat([w.flatten(), v]).square().sum(),
    "several parameters": lambda w, v, phi: sum(p.square().sum() for p in (w, v)) / 7,
    "difference of parameters": lambda w, v, phi: (w[0] - v).square().sum(),
    "product of parameters": lambda w, v, phi: (w * v).square().sum(),
    "square of the sum": lambda w, v, phi: v.sum().square(),
    "square of the decay": lambda w, v, phi: v.square().sum() ** 2,
    "norm": lambda w, v, phi: v.norm() ** 2 + w.norm(),
    "log of the decay": lambda w, v, phi: (1 + v.square().sum()).log(),
    "product of decays": lambda w, v, phi: w.square().sum() * v.square().sum(),
    "times itself": lambda w, v, phi: (v * v.sum()).sum(),
    "broadcast": lambda w, v, phi: (v * torch.ones(4, 3, dtype=D) - 1).square().sum(),
    "reversed": lambda w, v, phi: (v * v.flip(0)).sum(),
    "selected": lambda w, v, phi: v[0].square() + w[:, 1].square().sum(),
}


def made(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """w (2, 3), v (3,), phi (3,)"""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*s, generator=generator, dtype=D, requires_grad=True) for s in [(2, 3), (3,), (3,)])


def network(w: Tensor, v: Tensor, phi: Tensor) -> Tensor:
    return ((w.T @ w @ v).tanh() * phi.sin()).sum()


def check(loss: Tensor, params: list[Tensor], outer: list[Tensor], tolerance: float = 1e-12) -> Hessian:
    """Products, batches of them and mixed products of the loss in `params`, against torch.autograd.grad."""
    curvature = Hessian(LossGraph("inner_loss", loss), params, retain_graph=True)
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    chosen = [i for i, grad in enumerate(grads) if grad is not None and grad.requires_grad]
    assert [i for i, inside in enumerate(curvature.in_system) if inside] == chosen
    inside, recorded = [params[i] for i in chosen], [grads[i] for i in chosen]
    batch = [torch.randn(9, *p.shape, dtype=p.dtype) for p in inside]
    rows = []
    for vectors in zip(*batch, strict=True):
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        expected = torch.autograd.grad(recorded, inside, vectors, **options)
        torch.testing.assert_close(curvature(vectors), list(expected), rtol=tolerance, atol=tolerance)
        mixed = torch.autograd.grad(recorded, outer, vectors, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(curvature.mixed(vectors, outer), list(mixed), rtol=tolerance, atol=tolerance)
        rows.append(expected)
    expected = [torch.stack(column) for column in zip(*rows, strict=True)]
    torch.testing.assert_close(curvature.batched(batch), expected, rtol=tolerance, atol=tolerance)
    return curvature


@pytest.mark.parametrize("with_network", [False, True])
@pytest.mark.parametrize("name", PENALTIES)
def test_products_of_a_penalty_are_those_of_autograd(name, with_network):
    w, v, phi = made(0)
    loss = 0.3 * PENALTIES[name](w, v, phi)
    check(network(w, v, phi) + loss if with_network else loss, [w, v], [phi])


@pytest.mark.parametrize("seed", range(60))
def test_products_of_random_sums_of_penalties_are_those_of_autograd(seed):
    choose = random.Random(seed)
    w, v, phi = made(seed)
    loss = network(w, v, phi) * choose.choice([0, 1])
    for name in choose.choices(list(PENALTIES), k=choose.randint(1, 5)):
        term = PENALTIES[name](w, v, phi)
        factor = choose.choice([2.0, phi.exp().mean(), phi[1], v.detach().sum(), torch.tensor(0.5, dtype=D)])
        change = choose.choice(["+", "-", "/", "tanh", "times the loss", "negative"])
        loss = {
            "+": lambda loss, term, factor: loss + factor * term,
            "-": lambda loss, term, factor: loss - term * factor,
            "/": lambda loss, term, factor: (loss + term) / 3 + factor,
            "tanh": lambda loss, term, factor: (loss / 9 + term / 9).tanh() + factor,
            "times the loss": lambda loss, term, factor: (1 + loss / 10) * (term / 10) + factor,
            "negative": lambda loss, term, factor: -torch.stack([loss, factor * term]).sum(),
        }[change](loss, term, factor)
    check(loss, choose.choice([[w, v], [v, w], [v]]), [phi], tolerance=1e-9)


RECOGNISED = [
    "weight decay", "product", "dot product of a vector", "L1", "cube", "a weight each", "proximal", "stack",
    "proximal, the other way round", "several parameters", "linear",
]  # fmt: skip


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_penalty_is_no_part_of_what_the_engine_multiplies(name):
    w, v, phi = made(0)
    params = [p for p, grad in zip((w, v), torch.autograd.grad(PENALTIES[name](w, v, phi), (w, v), allow_unused=True),
                                   strict=True) if grad is not None]  # fmt: skip
    curvature = Hessian(LossGraph("inner_loss", PENALTIES[name](w, v, phi)), params)
    curvature.batched([torch.ones(20, *p.shape, dtype=D) for p in params])
    assert curvature.pullback.num_batched == 0


def test_parameters_that_are_no_leaves():
    leaf, phi = torch.randn(2, 4, dtype=D, requires_grad=True), torch.randn(4, dtype=D, requires_grad=True)
    first, second = leaf.unbind()
    check(phi.exp() @ first.square() + (first @ second).sin() + (second - phi).square().sum(), [first, second], [phi])
    check(second.square().sum() * (leaf.detach() @ phi).sum(), [first, second], [phi])


HOOKS = {
    "a factor": lambda grad: 3 * grad,
    "clipping": lambda grad: grad.clamp(-0.1, 0.1),
    "a constant": lambda grad: torch.add(grad, torch.ones_like(grad), alpha=2),
    "a look": lambda grad: None,
}


@pytest.mark.parametrize("place", ["parameter", "difference", "square", "node", "node of the difference"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_act_as_they_do_in_autograd(name, place):
    """They act in the recorded gradient, and in every product with it that goes where they are."""
    w, v, phi = made(1)
    difference = v - phi
    square = difference.square()
    hook = HOOKS[name]
    if place.startswith("node"):
        node = (square if place == "node" else difference).grad_fn
        node.register_hook(lambda outgoing, incoming: tuple(g if g is None else hook(g) for g in outgoing))
    else:
        {"parameter": v, "difference": difference, "square": square}[place].register_hook(hook)
    check(network(w, v, phi) + square.sum(), [w, v], [phi])


def test_sums_that_are_weighted_or_broadcast():
    torch.manual_seed(6)
    a, b = torch.randn(2, 3, dtype=D, requires_grad=True), torch.randn(3, dtype=D, requires_grad=True)
    outputs = [torch.add((a @ a.T @ a).sin(), a.square(), alpha=3), a.sin() + b.square(), b.square() + a.sin().sum(0)]
    pullback = Pullback(outputs, [a, b])
    for _ in range(5):
        vectors = [torch.randn_like(output) for output in outputs]
        expected = torch.autograd.grad(outputs, [a, b], vectors, retain_graph=True)
        torch.testing.assert_close(pullback(vectors), list(expected))


def test_an_input_that_is_squared_in_several_outputs():
    a, b = (torch.randn(3, dtype=D, requires_grad=True) for _ in range(2))
    outputs = [a.sin() + b.square(), b.sin() + b * b + a.square()]
    pullback = Pullback(outputs, [a, b])
    for _ in range(5):
        vectors = [torch.randn(3, dtype=D) for _ in outputs]
        expected = torch.autograd.grad(outputs, [a, b], vectors, retain_graph=True)
        torch.testing.assert_close(pullback(vectors), list(expected))


class Doubled(torch.autograd.Function):
    """A square whose backward pass is twice its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 4 * grad * x


def test_functions_of_the_user_are_left_to_autograd():
    w, v, phi = made(2)
    check(network(w, v, phi) + Doubled.apply(v).sum() + Doubled.apply(w.square()).mean(), [w, v], [phi])


def test_parameters_of_several_dtypes():
    w, v, phi = made(3)
    low = v.detach().bfloat16().requires_grad_()
    check((w @ v).tanh().sum() + low.double().square().sum() + w.square().mean(), [w, v, low], [phi])


def test_a_parameter_of_one_number_that_is_broadcast():
    w, v, phi = made(4)
    scale = torch.tensor(0.7, dtype=D, requires_grad=True)
    one = torch.tensor([0.7], dtype=D, requires_grad=True)
    check(network(w, v, phi) + scale.square() + (scale - v).square().sum() + (one * w).square().sum(), [scale, one, v],
          [phi])  # fmt: skip


@pytest.mark.parametrize("linear", [False, True])
def test_gauss_newton_with_a_weight_decay(linear):
    w, v, phi = made(5)
    outputs = w @ v
    curved = 0 if linear else 2
    loss = outputs.sum() if linear else (outputs - 1).square().sum()
    loss = loss + (phi.exp() * v.square()).sum() + w.square().sum()
    curvature = GaussNewton(LossGraph("inner_loss", loss, outputs), [w, v], retain_graph=True)
    vectors = [torch.randn_like(w), torch.randn_like(v)]
    tangent = (vectors[0] @ v + w @ vectors[1]).detach()
    pulled = torch.autograd.grad(outputs, (w, v), curved * tangent, retain_graph=True)
    expected = [pulled[0] + 2 * vectors[0], pulled[1] + 2 * phi.exp() * vectors[1]]
    torch.testing.assert_close(curvature(vectors), [grad.detach() for grad in expected])
    batch = [torch.stack([v] * 9) for v in vectors]
    torch.testing.assert_close(curvature.batched(batch), [torch.stack([grad.detach()] * 9) for grad in expected])
    torch.testing.assert_close(curvature.mixed(vectors, [phi])[0], (2 * vectors[1] * v * phi.exp()).detach())


def test_a_split_visits_each_node_of_the_gradient_once() -> None:
    """A gradient through a recurrence has a term a step, each of which leads through all steps before it."""
    w, phi = (torch.full((2,), 0.5, dtype=D, requires_grad=True) for _ in range(2))
    state, loss = torch.zeros(2, dtype=D), torch.zeros((), dtype=D)
    for _ in range(200):
        state = state * w + 1
        loss = loss + (phi * state).sum()
    start = time.thread_time()
    curvature = check(loss, [w], [phi])
    plain = time.thread_time() - start
    start = time.thread_time()
    assert len(split(curvature._grads, [w]).diagonals) == 1
    assert time.thread_time() - start < plain


def test_a_sum_of_sums_is_not_written_out() -> None:
    """Doubled forty times it has 2^40 terms."""
    w, phi = (torch.rand(2, dtype=D, requires_grad=True) for _ in range(2))
    doubled = w
    for _ in range(40):
        doubled = doubled + doubled
    check((2.0**-40 * doubled).square().sum() + (phi * w.exp()).sum(), [w], [phi])
