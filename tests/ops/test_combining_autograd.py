"""Derivatives of the combiner and the loss image: gradcheck and gradgradcheck, which of them are computed, and where
they end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from auxfast import reference_kernels
from auxfast.ops.network import CombinerNetwork, LossImageNetwork
from auxfast.ops.second_order import SavedForward

from .combiner_cases import normal
from .combining_cases import BOTH, BOTH_ON_DEVICE, COMBINER, LOSS_IMAGE, on_device_rows, readable

# Each of the options that both have comes with one of these, in turn.
ARCHITECTURES = {
    "combiner": [
        {"hidden": hidden, "bias": bias}
        for hidden, bias in [((3,), True), ((2, 3), False), ((1, 2, 2), True), ((2, 2), True)]
    ],
    "loss_image": [
        {"channels": channels, "main_reduction": main_reduction}
        for channels, main_reduction in [((2,), "mean"), ((2, 3), "sum"), ((1, 2, 2), "valid_mean"), ((2, 2), "mean")]
    ],
}
OPTIONS = list(enumerate(product(["softplus", "identity"], ["mean", "sum", "none"], [None, 1])))
WRT = {"losses": (True, False), "phi": (False, True), "both": (True, True)}


@BOTH_ON_DEVICE
@pytest.mark.parametrize("wrt", WRT.values(), ids=WRT.keys())
@pytest.mark.parametrize(("i", "options"), OPTIONS, ids=["{}-{}-main {}".format(*options) for _, options in OPTIONS])
def test_gradcheck_and_gradgradcheck(i, options, wrt, op):
    network = replace(
        op.small,
        num_losses=2,
        **dict(zip(("activation", "reduction", "main"), options, strict=True)),
        **ARCHITECTURES[op.name][i % 4],
    )
    losses, phi, *_ = op.inputs(network, op.few)
    given = losses.requires_grad_(wrt[0]), phi.requires_grad_(wrt[1])
    assert torch.autograd.gradcheck(lambda x, p: op(x, p, network), given)
    assert torch.autograd.gradgradcheck(lambda x, p: op(x, p, network), given)


ONE_LOSS = CombinerNetwork(1, (2,), main=0, reduction="none")
VALID_MEAN = LossImageNetwork(2, (2, 3), main=0, main_reduction="valid_mean", reduction="none")
AWKWARD = [(1, 1, 1), (3, 1, 6), (2, 7, 1), (20, 9, 34), (1, 516, 3)]
MASKED = [(COMBINER, ONE_LOSS, (67,)), *((LOSS_IMAGE, VALID_MEAN, shape) for shape in AWKWARD)]


@pytest.mark.parametrize(("op", "network", "shape"), on_device_rows(MASKED), ids=readable)
def test_gradgradcheck_with_a_mask_and_awkward_sizes(op, network, shape):
    losses, phi, *_ = op.inputs(network, shape)
    mask = normal(*losses.shape, seed=4, device=op.device) > -0.5
    given = losses.requires_grad_(), phi.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, p: op(x, p, network, mask), given, fast_mode=True)


# ---------------------------------------------------------------------------------------------- what is computed at all


@pytest.fixture
def calls(op, monkeypatch) -> list[str]:
    """What the later passes compute, in order: "gradient" in phi; "second" derivatives in the losses, or those and
    "second+phi"."""
    made: list[str] = []

    def record(kernel: str, function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object) -> object:
            result = function(*args)
            with_phi = isinstance(result, tuple) and result[1].numel() > 0
            made.append("gradient" if kernel == "_backward_phi" else "second+phi" if with_phi else "second")
            return result

        return wrapped

    for kernel in op.kernels:
        if kernel != "_forward":
            monkeypatch.setattr(op.module, kernel, record(kernel, getattr(op.module, kernel)))
    return made


def _inner_loss(op, phi: Tensor) -> tuple[Tensor, Tensor]:
    """(w, value): losses that depend on inner parameters w, one for each loss, and their combination."""
    shape = op.inputs(op.small, op.some)[0].shape
    w = normal(shape[1], *(1 for _ in shape[2:]), seed=8).requires_grad_()
    return w, op((normal(*shape, seed=9) * w).square(), phi, op.small)


def _leaf(op) -> tuple[Tensor, Tensor]:
    phi = op.inputs(op.small, op.some)[1].requires_grad_()
    return phi, phi


def _inner_node(op) -> tuple[Tensor, Tensor]:
    leaf, _ = _leaf(op)
    return leaf, leaf * 1.0


PHIS = pytest.mark.parametrize("make_phi", [_leaf, _inner_node], ids=["leaf", "inner node"])


@BOTH
@PHIS
def test_gradient_in_the_inner_parameters_computes_none_in_phi(make_phi, op, calls):
    leaf, phi = make_phi(op)
    w, value = _inner_loss(op, phi)
    torch.autograd.grad(value, w, retain_graph=True)
    assert calls == []
    torch.autograd.grad(value, leaf, retain_graph=True)
    torch.autograd.grad(value, phi)
    assert calls == ["gradient", "gradient"]


@BOTH
@PHIS
def test_hessian_product_computes_nothing_in_phi(make_phi, op, calls):
    leaf, phi = make_phi(op)
    w, value = _inner_loss(op, phi)
    (gradient,) = torch.autograd.grad(value, w, create_graph=True)
    assert calls == []
    torch.autograd.grad(gradient, w, torch.ones_like(w), retain_graph=True)
    assert calls == ["second"]
    torch.autograd.grad(gradient, leaf, torch.ones_like(w), retain_graph=True)
    torch.autograd.grad(gradient, (w, phi), torch.ones_like(w))
    assert calls == ["second", "second+phi", "second+phi"]


@BOTH
def test_hessian_product_computes_nothing_in_a_factor_of_the_value(op, monkeypatch):
    w, value = _inner_loss(op, _leaf(op)[0])
    leaf = torch.ones((), dtype=value.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(value * leaf.exp(), w, create_graph=True)
    made: list[str] = []
    grad_of_grad = SavedForward.grad_of_grad
    monkeypatch.setattr(SavedForward, "grad_of_grad", lambda *args: made.append("made") or grad_of_grad(*args))
    torch.autograd.grad(gradient, w, torch.ones_like(w), retain_graph=True)
    assert made == []
    (mixed,) = torch.autograd.grad(gradient, leaf, torch.ones_like(w))
    assert made == ["made"]
    torch.testing.assert_close(mixed, gradient.sum())


class Sums(TorchDispatchMode):
    """How many sums are taken, or put together."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.sum, torch.ops.aten.stack, torch.ops.aten.cat)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gpu_takes_the_sum_for_a_factor_of_the_value_at_once(reduction):
    """Tensors without numbers stand for those of a GPU: all that are not the CPU's are treated alike."""
    network, weights = CombinerNetwork(3, (2,), reduction=reduction), torch.empty(100_000, 3, device="meta")
    saved = COMBINER.module._Combination(network, weights.new_empty(()), weights, weights.new_empty(0))
    with Sums() as sums:
        sum_of_products = saved.grad_of_grad(weights)
    assert sums.count == 1
    assert sum_of_products.shape == ((100_000,) if reduction == "none" else ())


@BOTH
@PHIS
def test_backward_fills_grad_of_what_it_should(make_phi, op, calls):
    leaf, phi = make_phi(op)
    w, value = _inner_loss(op, phi)
    wanted = torch.autograd.grad(value, (w, leaf), retain_graph=True)
    value.backward(inputs=[w], retain_graph=True)
    assert calls == ["gradient"]
    assert leaf.grad is None
    value.backward(inputs=[leaf], retain_graph=True)
    value.backward()
    torch.testing.assert_close(w.grad, 2 * wanted[0])
    torch.testing.assert_close(leaf.grad, 2 * wanted[1])


@BOTH
@PHIS
@pytest.mark.parametrize("with_value", [True, False])
def test_backward_of_second_order_fills_grad(with_value, make_phi, op, calls):
    results = []
    for context in (torch.enable_grad, reference_kernels):
        with context():
            leaf, phi = make_phi(op)
            w, value = _inner_loss(op, phi)
        (gradient,) = torch.autograd.grad(value, w, create_graph=True)
        total = gradient.square().sum()
        (total + value if with_value else total).backward()
        results.append((w.grad, leaf.grad))
    torch.testing.assert_close(*results)
    assert sorted(calls) == ["gradient", "second+phi"][not with_value :]


@BOTH
def test_frozen_phi(op, calls):
    phi = op.inputs(op.small, op.some)[1]
    w, value = _inner_loss(op, phi)
    (gradient,) = torch.autograd.grad(value, w, create_graph=True)
    gradient.sum().backward()
    assert phi.grad is None
    assert w.grad is not None
    assert calls == ["second"]


@BOTH
def test_frozen_losses(op, calls):
    losses, phi, *_ = op.inputs(op.small, op.some)
    phi.requires_grad_()
    op(losses, phi, op.small).backward()
    assert calls == ["gradient"]
    (wanted,) = torch.autograd.grad(op.reference(losses, phi, op.small), phi)
    torch.testing.assert_close(phi.grad, wanted)


@BOTH
def test_nothing_to_differentiate(op):
    losses, phi, *_ = op.inputs(op.small, op.some)
    assert op(losses, phi, op.small).grad_fn is None
    with torch.no_grad():
        assert op(losses, phi.requires_grad_(), op.small).grad_fn is None
