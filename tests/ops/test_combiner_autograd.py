"""The combiner's derivatives: gradcheck and gradgradcheck, which of them are computed, and where they end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from auxfast import reference_kernels
from auxfast.ops import combiner as module
from auxfast.ops.combiner import CombinerNetwork, combiner, combiner_reference

from .combiner_cases import DEVICES, SMALL, inputs, name, normal

OPTIONS = [
    CombinerNetwork(2, hidden, activation, bias, main, reduction)  # type: ignore[arg-type]
    for (activation, reduction, main), (hidden, bias) in zip(
        product(["softplus", "identity"], ["mean", "sum", "none"], [None, 1]),
        [((3,), True), ((2, 3), False), ((1, 2, 2), True), ((2, 2), True)] * 3,
        strict=True,
    )
]
WRT = {"losses": (True, False), "phi": (False, True), "both": (True, True)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrt", WRT.values(), ids=WRT.keys())
@pytest.mark.parametrize("network", OPTIONS, ids=map(name, OPTIONS))
def test_gradcheck_and_gradgradcheck(network, wrt, device):
    losses, phi, *_ = inputs(network, 3, device=device)
    given = losses.requires_grad_(wrt[0]), phi.requires_grad_(wrt[1])
    assert torch.autograd.gradcheck(lambda x, p: combiner(x, p, network), given)
    assert torch.autograd.gradgradcheck(lambda x, p: combiner(x, p, network), given)


@pytest.mark.parametrize("device", DEVICES)
def test_gradgradcheck_with_a_mask_and_several_tiles(device):
    network = CombinerNetwork(1, (2,), main=0, reduction="none")
    losses, phi, *_ = inputs(network, 67, device=device)
    mask = normal(67, 1, seed=4, device=device) > 0
    given = losses.requires_grad_(), phi.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, p: combiner(x, p, network, mask), given, fast_mode=True)


# ---------------------------------------------------------------------------------------------- what is computed at all


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the later passes that run, in order; with "+phi" where the second derivatives in phi are computed."""
    made: list[str] = []

    def record(op: Callable[..., object], label: str) -> Callable[..., object]:
        def wrapped(*args: object) -> object:
            made.append(label)
            return op(*args)

        return wrapped

    for op, label in {"_backward_phi": "gradient", "_second_order": "second+phi", "_hessian": "second"}.items():
        monkeypatch.setattr(module, op, record(getattr(module, op), label))
    return made


def _inner_loss(phi: Tensor) -> tuple[Tensor, Tensor]:
    """(w, value): losses that depend on inner parameters w, and their combination."""
    w = normal(3, seed=8).requires_grad_()
    losses = (normal(6, 3, seed=9) * w).square()
    return w, combiner(losses, phi, SMALL)


def _leaf() -> tuple[Tensor, Tensor]:
    phi = inputs(SMALL, 1)[1].requires_grad_()
    return phi, phi


def _inner_node() -> tuple[Tensor, Tensor]:
    leaf = inputs(SMALL, 1)[1].requires_grad_()
    return leaf, leaf * 1.0


PHIS = pytest.mark.parametrize("make_phi", [_leaf, _inner_node], ids=["leaf", "inner node"])


@PHIS
def test_gradient_in_the_inner_parameters_computes_none_in_phi(make_phi, calls):
    leaf, phi = make_phi()
    w, value = _inner_loss(phi)
    torch.autograd.grad(value, w, retain_graph=True)
    assert calls == []
    torch.autograd.grad(value, leaf, retain_graph=True)
    torch.autograd.grad(value, phi)
    assert calls == ["gradient", "gradient"]


@PHIS
def test_hessian_product_computes_nothing_in_phi(make_phi, calls):
    leaf, phi = make_phi()
    w, value = _inner_loss(phi)
    (gradient,) = torch.autograd.grad(value, w, create_graph=True)
    assert calls == []
    torch.autograd.grad(gradient, w, torch.ones_like(w), retain_graph=True)
    assert calls == ["second"]
    torch.autograd.grad(gradient, leaf, torch.ones_like(w), retain_graph=True)
    torch.autograd.grad(gradient, (w, phi), torch.ones_like(w))
    assert calls == ["second", "second+phi", "second+phi"]


@PHIS
def test_backward_fills_grad_of_what_it_should(make_phi, calls):
    leaf, phi = make_phi()
    w, value = _inner_loss(phi)
    wanted = torch.autograd.grad(value, (w, leaf), retain_graph=True)
    value.backward(inputs=[w], retain_graph=True)
    assert calls == ["gradient"]
    assert leaf.grad is None
    value.backward(inputs=[leaf], retain_graph=True)
    value.backward()
    torch.testing.assert_close(w.grad, 2 * wanted[0])
    torch.testing.assert_close(leaf.grad, 2 * wanted[1])


@PHIS
def test_backward_of_second_order_fills_grad(make_phi, calls):
    results = []
    for context in (torch.enable_grad, reference_kernels):
        with context():
            leaf, phi = make_phi()
            w, value = _inner_loss(phi)
        (gradient,) = torch.autograd.grad(value, w, create_graph=True)
        gradient.square().sum().backward()
        results.append((w.grad, leaf.grad))
    torch.testing.assert_close(*results)
    assert calls == ["second+phi"]


def test_frozen_phi(calls):
    phi = inputs(SMALL, 1)[1]
    w, value = _inner_loss(phi)
    (gradient,) = torch.autograd.grad(value, w, create_graph=True)
    gradient.sum().backward()
    assert phi.grad is None
    assert w.grad is not None
    assert calls == ["second"]


def test_frozen_losses(calls):
    losses, phi, *_ = inputs(SMALL, 6)
    phi.requires_grad_()
    combiner(losses, phi, SMALL).backward()
    assert calls == ["gradient"]
    (wanted,) = torch.autograd.grad(combiner_reference(losses, phi, SMALL), phi)
    torch.testing.assert_close(phi.grad, wanted)


def test_nothing_to_differentiate():
    losses, phi, *_ = inputs(SMALL, 6)
    assert combiner(losses, phi, SMALL).grad_fn is None
    with torch.no_grad():
        assert combiner(losses, phi.requires_grad_(), SMALL).grad_fn is None


# --------------------------------------------------------------------------------------------------- life of the graph


@pytest.mark.parametrize("changed", ["losses", "phi"])
@pytest.mark.parametrize("order", [1, 2])
def test_in_place_change_before_the_backward_raises(order, changed):
    losses, phi, *_ = (t.requires_grad_() for t in inputs(SMALL, 6))
    result = combiner(losses, phi, SMALL)
    if order == 2:
        (result,) = torch.autograd.grad(result, losses, create_graph=True)
    with torch.no_grad():
        (losses if changed == "losses" else phi).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_retained_graph_gives_the_same_bits_again():
    losses, phi, grad, tangent = inputs(CombinerNetwork(5, (10, 6)), 700, torch.float32)
    given = losses.requires_grad_(), phi.requires_grad_()
    value = combiner(*given, CombinerNetwork(5, (10, 6)))
    first = [torch.autograd.grad(value, given, grad, retain_graph=True) for _ in range(2)]
    (gradient,) = torch.autograd.grad(value, losses, grad, create_graph=True)
    second = [torch.autograd.grad(gradient, given, tangent, retain_graph=True) for _ in range(2)]
    for one, other in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_freed_graph_raises():
    losses, phi, _, tangent = inputs(SMALL, 6)
    losses.requires_grad_()
    value = combiner(losses, phi, SMALL)
    (gradient,) = torch.autograd.grad(value, losses, create_graph=True)
    torch.autograd.grad(gradient, losses, tangent)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(gradient, losses, tangent)
    value = combiner(losses, phi, SMALL)
    torch.autograd.grad(value, losses)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, losses)


# ------------------------------------------------------------------------------------------------- beyond second order


def _second_order_with_graph(losses: Tensor, phi: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
    (gradient,) = torch.autograd.grad(combiner(losses, phi, SMALL), losses, create_graph=True)
    return torch.autograd.grad(gradient, (losses, phi), tangent, create_graph=True)


@pytest.mark.parametrize("of", [0, 1], ids=["hessian product", "mixed product"])
@pytest.mark.parametrize("wrt", range(3), ids=["losses", "phi", "tangent"])
def test_third_order_raises_and_says_what_to_do(wrt, of):
    losses, phi, _, tangent = (t.requires_grad_() for t in inputs(SMALL, 6))
    second = _second_order_with_graph(losses, phi, tangent)[of]
    (gradient,) = torch.autograd.grad(combiner(losses, phi, SMALL), losses, create_graph=True)
    alone = torch.autograd.grad(gradient, (losses, phi), tangent)[of]
    assert torch.equal(second, alone)
    with pytest.raises(RuntimeError, match=r"(?s)a third.*auxfast\.reference_kernels\(\)"):
        torch.autograd.grad(second.sum(), (losses, phi, tangent)[wrt])


def test_third_order_within_reference_kernels():
    losses, phi, _, tangent = (t.requires_grad_() for t in inputs(SMALL, 2))
    with reference_kernels():
        assert torch.autograd.gradcheck(_second_order_with_graph, (losses, phi, tangent))


def test_second_derivatives_in_phi_and_their_graph_are_the_references():
    results = []
    for function in (combiner, combiner_reference):
        losses, phi, *_ = (t.requires_grad_() for t in inputs(SMALL, 6))
        value = function(losses, phi, SMALL)
        (gradient,) = torch.autograd.grad(value, phi, create_graph=True)
        second = torch.autograd.grad(gradient, (losses, phi), torch.arange(28.0).double(), create_graph=True)
        third = torch.autograd.grad(second[1].square().sum(), (losses, phi))
        results.append((gradient, *second, *third))
    torch.testing.assert_close(*results)
