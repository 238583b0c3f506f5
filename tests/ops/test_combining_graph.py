"""The graph that the combiner and the loss image leave: its life, and where its derivatives end."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from auxfast import reference_kernels

from .combiner_cases import normal
from .combining_cases import BOTH


@BOTH
@pytest.mark.parametrize("changed", ["losses", "phi"])
@pytest.mark.parametrize("order", [1, 2])
def test_in_place_change_before_the_backward_raises(order, changed, op):
    losses, phi, *_ = (t.requires_grad_() for t in op.inputs(op.small, op.some))
    result = op(losses, phi, op.small)
    if order == 2:
        (result,) = torch.autograd.grad(result, losses, create_graph=True)
    with torch.no_grad():
        (losses if changed == "losses" else phi).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@BOTH
def test_in_place_change_of_the_incoming_gradient_raises(op):
    losses, phi, grad, tangent = op.inputs(op.small, op.some)
    (gradient,) = torch.autograd.grad(op(losses.requires_grad_(), phi, op.small), losses, grad, create_graph=True)
    grad.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(gradient, losses, tangent)


@BOTH
@pytest.mark.parametrize("detached", ["losses", "phi"])
def test_inputs_that_were_detached_do_not_lose_their_second_derivatives_without_a_word(detached, op):
    leaves = [t.requires_grad_() for t in op.inputs(op.small, op.some)[:2]]
    losses, phi = (leaf * 1 for leaf in leaves)
    value = op(losses, phi, op.small).sum()
    expected = torch.autograd.grad(value, leaves, retain_graph=True)
    (losses if detached == "losses" else phi).detach_()
    first_order = torch.autograd.grad(value, leaves, retain_graph=True)
    assert all(map(torch.equal, first_order, expected))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, leaves, create_graph=True)


@BOTH
def test_retained_graph_gives_the_same_bits_again(op):
    losses, phi, grad, tangent = op.inputs(op.small, op.many, torch.float32)
    given = losses.requires_grad_(), phi.requires_grad_()
    value = op(*given, op.small)
    first = [torch.autograd.grad(value, given, grad, retain_graph=True) for _ in range(2)]
    (gradient,) = torch.autograd.grad(value, losses, grad, create_graph=True)
    second = [torch.autograd.grad(gradient, given, tangent, retain_graph=True) for _ in range(2)]
    for one, other in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@BOTH
def test_freed_graph_raises(op):
    losses, phi, _, tangent = op.inputs(op.small, op.some)
    losses.requires_grad_()
    value = op(losses, phi, op.small)
    (gradient,) = torch.autograd.grad(value, losses, create_graph=True)
    torch.autograd.grad(gradient, losses, tangent)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(gradient, losses, tangent)
    value = op(losses, phi, op.small)
    torch.autograd.grad(value, losses)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, losses)


@BOTH
def test_a_graph_goes_with_its_last_reference(op):
    losses, phi, *_ = (t.requires_grad_() for t in op.inputs(op.small, op.some))
    node = op(losses, phi, op.small).grad_fn
    freed = []
    assert node is not None
    weakref.finalize(node, freed.append, True)
    del node
    assert freed == [True]


# ------------------------------------------------------------------------------------------------- beyond second order


def _second_order(op, losses: Tensor, phi: Tensor, tangent: Tensor, with_graph: bool = True) -> tuple[Tensor, ...]:
    (gradient,) = torch.autograd.grad(op(losses, phi, op.small), losses, create_graph=True)
    return torch.autograd.grad(gradient, (losses, phi), tangent, create_graph=with_graph)


@BOTH
@pytest.mark.parametrize("of", [0, 1], ids=["hessian product", "mixed product"])
@pytest.mark.parametrize("wrt", range(3), ids=["losses", "phi", "tangent"])
def test_third_order_raises_and_says_what_to_do(wrt, of, op):
    losses, phi, _, tangent = (t.requires_grad_() for t in op.inputs(op.small, op.some))
    second = _second_order(op, losses, phi, tangent)[of]
    assert torch.equal(second, _second_order(op, losses, phi, tangent, with_graph=False)[of])
    with pytest.raises(RuntimeError, match=rf"(?s){op.label} kernels.*a third.*auxfast\.reference_kernels\(\)"):
        torch.autograd.grad(second.sum(), (losses, phi, tangent)[wrt])


@BOTH
def test_third_order_within_reference_kernels(op):
    losses, phi, _, tangent = (t.requires_grad_() for t in op.inputs(op.small, op.few))
    with reference_kernels():
        assert torch.autograd.gradcheck(lambda *given: _second_order(op, *given), (losses, phi, tangent))


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_in_phi_and_their_graph_are_the_references(reduction, op):
    network = op.networks[reduction]
    direction = normal(network.num_parameters, seed=5)
    results = []
    for function in (op, op.reference):
        losses, phi, *_ = (t.requires_grad_() for t in op.inputs(network, op.some))
        (gradient,) = torch.autograd.grad(function(losses, phi, network).sum(), phi, create_graph=True)
        second = torch.autograd.grad(gradient, (losses, phi), direction, create_graph=True)
        third = torch.autograd.grad(second[1].square().sum(), (losses, phi))
        results.append((gradient, *second, *third))
    torch.testing.assert_close(*results)
