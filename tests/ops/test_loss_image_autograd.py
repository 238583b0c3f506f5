"""The loss image's derivatives: gradcheck and gradgradcheck, which of them are computed, and where they end."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from auxfast import reference_kernels
from auxfast.ops import loss_image as module
from auxfast.ops.loss_image import loss_image, loss_image_reference
from auxfast.ops.loss_image_network import LossImageNetwork

from .combiner_cases import normal
from .loss_image_cases import SMALL, inputs, name

OPTIONS = [
    LossImageNetwork(2, channels, activation, main, main_reduction, reduction)  # type: ignore[arg-type]
    for (activation, reduction, main), (channels, main_reduction) in zip(
        product(["softplus", "identity"], ["mean", "sum", "none"], [None, 1]),
        [((2,), "mean"), ((2, 3), "sum"), ((1, 2, 2), "valid_mean"), ((2, 2), "mean")] * 3,
        strict=True,
    )
]
WRT = {"losses": (True, False), "phi": (False, True), "both": (True, True)}


@pytest.mark.parametrize("wrt", WRT.values(), ids=WRT.keys())
@pytest.mark.parametrize("network", OPTIONS, ids=map(name, OPTIONS))
def test_gradcheck_and_gradgradcheck(network, wrt):
    losses, phi, *_ = inputs(network, 2, 3, 5)
    given = losses.requires_grad_(wrt[0]), phi.requires_grad_(wrt[1])
    fast = wrt == (True, True)  # every entry of each alone; both together along random directions
    assert torch.autograd.gradcheck(lambda x, p: loss_image(x, p, network), given, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda x, p: loss_image(x, p, network), given, fast_mode=fast)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 6), (2, 7, 1), (20, 9, 34), (1, 516, 3)])
def test_gradgradcheck_with_a_mask_and_awkward_sizes(shape):
    network = LossImageNetwork(2, (2, 3), main=0, main_reduction="valid_mean", reduction="none")
    losses, phi, *_ = inputs(network, *shape)
    mask = normal(*losses.shape, seed=4) > -0.5
    given = losses.requires_grad_(), phi.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, p: loss_image(x, p, network, mask), given, fast_mode=True)


# ---------------------------------------------------------------------------------------------- what is computed at all


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the later passes that run, in order; with "+phi" where the second derivatives in phi are computed."""
    made: list[str] = []
    gradient, second = module._backward_phi, module._second_order
    monkeypatch.setattr(module, "_backward_phi", lambda *args: (made.append("gradient"), gradient(*args))[1])
    monkeypatch.setattr(
        module, "_second_order", lambda *args: (made.append("second+phi" if args[-1] else "second"), second(*args))[1]
    )
    return made


def _inner_loss(phi: Tensor) -> tuple[Tensor, Tensor]:
    """(w, value): an image of losses that depends on inner parameters w, and its combination."""
    w = normal(2, 1, 1, seed=8).requires_grad_()
    return w, loss_image((normal(3, 2, 5, 6, seed=9) * w).square(), phi, SMALL)


def _phi() -> Tensor:
    return inputs(SMALL, 1, 1, 1)[1].requires_grad_()


def test_only_what_is_asked_for_is_computed(calls):
    phi = _phi()
    w, value = _inner_loss(phi)
    torch.autograd.grad(value, w, retain_graph=True)
    (gradient,) = torch.autograd.grad(value, w, create_graph=True)
    assert calls == []
    torch.autograd.grad(value, phi, retain_graph=True)
    torch.autograd.grad(gradient, w, torch.ones_like(w), retain_graph=True)
    torch.autograd.grad(gradient, phi, torch.ones_like(w))
    assert calls == ["gradient", "second", "second+phi"]


def test_backward_fills_grad(calls):
    results = []
    for context in (torch.enable_grad, reference_kernels):
        phi = _phi()
        with context():
            w, value = _inner_loss(phi)
        (gradient,) = torch.autograd.grad(value, w, create_graph=True)
        (gradient.square().sum() + value).backward()
        results.append((w.grad, phi.grad))
    torch.testing.assert_close(*results)
    assert sorted(calls) == ["gradient", "second+phi"]


def test_nothing_to_differentiate():
    losses, phi, *_ = inputs(SMALL, 2, 5, 6)
    assert loss_image(losses, phi, SMALL).grad_fn is None
    with torch.no_grad():
        assert loss_image(losses, phi.requires_grad_(), SMALL).grad_fn is None


@pytest.mark.parametrize("changed", ["losses", "phi"])
@pytest.mark.parametrize("order", [1, 2])
def test_in_place_change_before_the_backward_raises(order, changed):
    losses, phi, *_ = (t.requires_grad_() for t in inputs(SMALL, 2, 5, 6))
    result = loss_image(losses, phi, SMALL)
    if order == 2:
        (result,) = torch.autograd.grad(result, losses, create_graph=True)
    with torch.no_grad():
        (losses if changed == "losses" else phi).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_a_graph_goes_with_its_last_reference():
    losses, phi, *_ = (t.requires_grad_() for t in inputs(SMALL, 2, 5, 6))
    node = loss_image(losses, phi, SMALL).grad_fn
    freed = []
    assert node is not None
    weakref.finalize(node, freed.append, True)
    del node
    assert freed == [True]


# ------------------------------------------------------------------------------------------------- beyond second order


def _second_order_with_graph(losses: Tensor, phi: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
    (gradient,) = torch.autograd.grad(loss_image(losses, phi, SMALL), losses, create_graph=True)
    return torch.autograd.grad(gradient, (losses, phi), tangent, create_graph=True)


@pytest.mark.parametrize("of", [0, 1], ids=["hessian product", "mixed product"])
@pytest.mark.parametrize("wrt", range(3), ids=["losses", "phi", "tangent"])
def test_third_order_raises_and_says_what_to_do(wrt, of):
    losses, phi, _, tangent = (t.requires_grad_() for t in inputs(SMALL, 2, 5, 6))
    second = _second_order_with_graph(losses, phi, tangent)[of]
    with pytest.raises(RuntimeError, match=r"(?s)loss image.*a third.*auxfast\.reference_kernels\(\)"):
        torch.autograd.grad(second.sum(), (losses, phi, tangent)[wrt])


def test_third_order_within_reference_kernels():
    losses, phi, _, tangent = (t.requires_grad_() for t in inputs(SMALL, 1, 3, 4))
    with reference_kernels():
        assert torch.autograd.gradcheck(_second_order_with_graph, (losses, phi, tangent), fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_in_phi_are_the_references(reduction):
    network = replace(SMALL, reduction=reduction)
    results = []
    for function in (loss_image, loss_image_reference):
        losses, phi, *_ = (t.requires_grad_() for t in inputs(network, 2, 5, 6))
        (gradient,) = torch.autograd.grad(function(losses, phi, network).sum(), phi, create_graph=True)
        direction = normal(network.num_parameters, seed=5)
        results.append((gradient, *torch.autograd.grad(gradient, (losses, phi), direction)))
    torch.testing.assert_close(*results)
