"""The loss image under what transforms it: batched products, torch.func, forward-mode AD and torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from auxfast import reference_kernels
from auxfast.ops import loss_image as module
from auxfast.ops.loss_image import loss_image, loss_image_reference

from .combiner_cases import normal
from .loss_image_cases import SMALL, inputs

# Forward-mode AD and Dynamo, on their first use, touch what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")

NETWORKS = [SMALL, replace(SMALL, reduction="none"), replace(SMALL, channels=(4,), reduction="sum")]


@pytest.fixture
def no_kernels(monkeypatch):
    """Fails a test in which a kernel is called."""

    def fail(*args: object) -> None:
        raise AssertionError("a kernel was called")

    for op in ("_forward", "_backward_phi", "_second_order"):
        monkeypatch.setattr(module, op, fail)


@pytest.mark.parametrize("with_phi", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_batched_hessian_products_are_each_alone(network, with_phi):
    losses, phi, grad, _ = inputs(network, 3, 9, 20)
    tangents = normal(4, *losses.shape, seed=7)
    wrt = (losses.requires_grad_(), phi.requires_grad_())[: 1 + with_phi]
    (gradient,) = torch.autograd.grad(loss_image(losses, phi, network), losses, grad, create_graph=True)
    together = torch.autograd.grad(gradient, wrt, tangents, is_grads_batched=True, retain_graph=True)
    for i, tangent in enumerate(tangents):
        alone = torch.autograd.grad(gradient, wrt, tangent, retain_graph=True)
        assert all(torch.equal(a[i], b) for a, b in zip(together, alone, strict=True))


def test_batched_gradients_are_each_alone():
    network = replace(SMALL, reduction="none")
    losses, phi, *_ = inputs(network, 5, 6, 7)
    given = losses.requires_grad_(), phi.requires_grad_()
    value = loss_image(*given, network)
    together = torch.autograd.grad(value, given, torch.eye(5).double(), is_grads_batched=True, retain_graph=True)
    for i, unit in enumerate(torch.eye(5).double()):
        alone = torch.autograd.grad(value, given, unit, retain_graph=True)
        torch.testing.assert_close([t[i] for t in together], list(alone), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", [1, 2])
def test_batches_that_would_lose_their_graph_raise(order):
    losses, phi, _, tangent = (t.requires_grad_() for t in inputs(SMALL, 2, 5, 6))

    def batched(result: Tensor) -> Tensor:
        vector = torch.ones(()).double()
        if order == 2:
            (result,) = torch.autograd.grad(result, losses, create_graph=True)
            vector = tangent
        vectors = vector.expand(2, *vector.shape)
        return torch.autograd.grad(result, losses, vectors, is_grads_batched=True, create_graph=True)[0]

    with pytest.raises(NotImplementedError, match=r"(?s)loss image.*that have a graph.*reference_kernels\(\)"):
        batched(loss_image(losses, phi, SMALL))
    with reference_kernels():
        assert batched(loss_image(losses, phi, SMALL)).requires_grad


@pytest.mark.parametrize("batched", ["grad", "losses", "phi"])
def test_other_batches_of_second_order_raise(batched):
    losses, phi, grad, tangent = inputs(SMALL, 2, 5, 6)
    given = {"tangents": tangent, "grad": grad, "losses": losses, "phi": phi}
    given[batched] = torch.stack([given[batched]] * 2)
    dims = [0 if key == batched else None for key in given]

    def second_order(*tensors: Tensor) -> Tensor:
        return torch.ops.auxfast.loss_image_second_order(*tensors, SMALL.packed, True)[0]

    with pytest.raises(NotImplementedError, match=r"loss_image .* over the tangents only"):
        torch.func.vmap(second_order, tuple(dims))(*given.values())


@pytest.mark.parametrize("network", NETWORKS)
def test_func_transforms_take_the_reference(network, no_kernels):
    losses, phi, grad, tangent = inputs(network, 3, 5, 6)

    def of(function):
        def value(x: Tensor, p: Tensor) -> Tensor:
            return function(x, p, network)

        def total(x: Tensor, p: Tensor) -> Tensor:
            return value(x, p).sum()

        return (
            torch.func.grad(total, argnums=(0, 1))(losses, phi),
            torch.func.vjp(value, losses, phi)[1](grad),
            torch.func.jvp(value, (losses, phi), (tangent, torch.ones_like(phi))),
            torch.func.vmap(lambda x: value(x[None], phi))(losses),
            torch.func.jvp(torch.func.grad(total), (losses, phi), (tangent, torch.ones_like(phi)))[1],
        )

    torch.testing.assert_close(of(loss_image), of(loss_image_reference), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("which", [0, 1], ids=["losses", "phi"])
def test_forward_mode_is_right_and_never_zero(which):
    given = list(inputs(SMALL, 3, 5, 6)[:2])
    direction = torch.ones_like(given[which])
    gradient = torch.func.grad(lambda x, p: loss_image_reference(x, p, SMALL), argnums=which)(*given)
    with forward_ad.dual_level():
        given[which] = forward_ad.make_dual(given[which], direction)
        tangent = forward_ad.unpack_dual(loss_image(*given, SMALL)).tangent
    torch.testing.assert_close(tangent, gradient.sum())


@pytest.mark.parametrize("order", [1, 2])
def test_forward_mode_through_a_recorded_backward_raises(order):
    losses, phi, grad, tangent = inputs(SMALL, 2, 5, 6)
    result, vector = loss_image(losses.requires_grad_(), phi.requires_grad_(), SMALL), grad
    if order == 2:
        (result,) = torch.autograd.grad(result, losses, create_graph=True)
        vector = tangent
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode AD through their backward"):
        torch.autograd.grad(result, phi, forward_ad.make_dual(vector, torch.ones_like(vector)))


def _step(weight: Tensor, phi: Tensor, features: Tensor) -> Tensor:
    return loss_image((features * weight).square(), phi, SMALL)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training_step(backend):
    torch._dynamo.reset()
    compiled = torch.compile(_step, backend=backend, fullgraph=True)
    weight, phi = normal(2, 5, 6, seed=1).requires_grad_(), inputs(SMALL, 1, 1, 1)[1].requires_grad_()
    features = normal(3, 2, 5, 6, seed=2)
    gradients = torch.autograd.grad(compiled(weight, phi, features), (weight, phi))
    wanted = torch.autograd.grad(_step(weight, phi, features), (weight, phi))
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-13)
    torch._dynamo.reset()
