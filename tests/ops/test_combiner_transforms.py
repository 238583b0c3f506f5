"""The combiner under what transforms it: batched products, torch.func, forward-mode AD and torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from auxfast import reference_kernels
from auxfast.ops import combiner as module
from auxfast.ops.combiner import CombinerNetwork, combiner, combiner_reference

from .combiner_cases import DEVICES, SMALL, inputs, normal

# Forward-mode AD and Dynamo, on their first use, touch what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")

NETWORKS = [SMALL, replace(SMALL, reduction="none"), CombinerNetwork(50, (6,), reduction="sum")]


@pytest.fixture
def no_kernels(monkeypatch):
    """Fails a test in which a kernel is called."""

    def fail(*args: object) -> None:
        raise AssertionError("a kernel was called")

    for op in ("_forward", "_backward_phi", "_second_order", "_hessian"):
        monkeypatch.setattr(module, op, fail)


# -------------------------------------------------------------------------------------------------- several at a time


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_phi", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_batched_hessian_products_are_each_alone(network, with_phi, device):
    losses, phi, grad, _ = inputs(network, 70, device=device)
    tangents = normal(4, 70, network.num_losses, seed=7, device=device)
    wrt = (losses.requires_grad_(), phi.requires_grad_())[: 1 + with_phi]
    (gradient,) = torch.autograd.grad(combiner(losses, phi, network), losses, grad, create_graph=True)
    together = torch.autograd.grad(gradient, wrt, tangents, is_grads_batched=True, retain_graph=True)
    for i, tangent in enumerate(tangents):
        alone = torch.autograd.grad(gradient, wrt, tangent, retain_graph=True)
        assert all(torch.equal(a[i], b) for a, b in zip(together, alone, strict=True))


def test_batched_gradients_are_each_alone():
    network = replace(SMALL, reduction="none")
    losses, phi, *_ = inputs(network, 5)
    given = losses.requires_grad_(), phi.requires_grad_()
    value = combiner(*given, network)
    together = torch.autograd.grad(value, given, torch.eye(5).double(), is_grads_batched=True, retain_graph=True)
    for i, unit in enumerate(torch.eye(5).double()):
        alone = torch.autograd.grad(value, given, unit, retain_graph=True)
        torch.testing.assert_close([t[i] for t in together], list(alone), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", [1, 2])
def test_batches_that_would_lose_their_graph_raise(order):
    losses, phi, _, tangent = (t.requires_grad_() for t in inputs(SMALL, 5))

    def batched(result: Tensor) -> Tensor:
        vector = torch.ones(()).double()
        if order == 2:
            (result,) = torch.autograd.grad(result, losses, create_graph=True)
            vector = tangent
        vectors = vector.expand(2, *vector.shape)
        return torch.autograd.grad(result, losses, vectors, is_grads_batched=True, create_graph=True)[0]

    with pytest.raises(NotImplementedError, match=r"(?s)batched gradients that have a graph.*reference_kernels\(\)"):
        batched(combiner(losses, phi, SMALL))
    with reference_kernels():
        assert batched(combiner(losses, phi, SMALL)).requires_grad


@pytest.mark.parametrize("batched", ["grad", "losses", "phi"])
def test_other_batches_of_second_order_raise(batched):
    losses, phi, grad, tangent = inputs(SMALL, 5)
    _, _, saved = torch.ops.auxfast.combiner_forward(losses, phi, SMALL.packed, True)
    given = {"tangents": tangent, "grad": grad, "losses": losses, "phi": phi}
    given[batched] = torch.stack([given[batched]] * 2)
    dims = [0 if key == batched else None for key in given]

    def second_order(*tensors: Tensor) -> Tensor:
        return torch.ops.auxfast.combiner_second_order(*tensors, saved, SMALL.packed)[0]

    with pytest.raises(NotImplementedError, match="over the tangents only"):
        torch.func.vmap(second_order, tuple(dims))(*given.values())


# ---------------------------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("network", NETWORKS)
def test_func_transforms_take_the_reference(network, no_kernels):
    losses, phi, grad, tangent = inputs(network, 4)

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

    torch.testing.assert_close(of(combiner), of(combiner_reference), rtol=1e-12, atol=1e-13)


def test_func_hessian(no_kernels):
    losses, phi, *_ = inputs(SMALL, 2)
    hessian = torch.func.hessian(lambda x, p: combiner(x, p, SMALL), argnums=(0, 1))(losses, phi)
    wanted = torch.autograd.functional.hessian(lambda x, p: combiner_reference(x, p, SMALL), (losses, phi))
    torch.testing.assert_close(hessian, wanted, rtol=1e-12, atol=1e-13)


# --------------------------------------------------------------------------------------------------- forward-mode AD


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("which", [0, 1], ids=["losses", "phi"])
def test_forward_mode_is_right_and_never_zero(which, requires_grad):
    losses, phi, *_ = inputs(SMALL, 4)
    given = [losses.requires_grad_(requires_grad), phi.requires_grad_(requires_grad)]
    direction = torch.ones_like(given[which])
    gradient = torch.func.grad(lambda x, p: combiner_reference(x, p, SMALL), argnums=which)(losses, phi)
    with forward_ad.dual_level():
        given[which] = forward_ad.make_dual(given[which], direction)
        tangent = forward_ad.unpack_dual(combiner(*given, SMALL)).tangent
    torch.testing.assert_close(tangent.detach(), gradient.detach().sum())


@pytest.mark.parametrize("order", [1, 2])
def test_forward_mode_through_a_recorded_backward_raises(order):
    losses, phi, grad, tangent = inputs(SMALL, 4)
    result, vector = combiner(losses.requires_grad_(), phi.requires_grad_(), SMALL), grad
    if order == 2:
        (result,) = torch.autograd.grad(result, losses, create_graph=True)
        vector = tangent
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode AD through their backward"):
        torch.autograd.grad(result, phi, forward_ad.make_dual(vector, torch.ones_like(vector)))


# ------------------------------------------------------------------------------------------------------- torch.compile


def _step(weight: Tensor, phi: Tensor, features: Tensor) -> Tensor:
    """A training step's loss: the losses depend on the inner parameters `weight`."""
    return combiner((features @ weight).square(), phi, SMALL)


@pytest.fixture
def compiled(request):
    torch._dynamo.reset()
    yield torch.compile(_step, backend=request.param, fullgraph=True)
    torch._dynamo.reset()


def _parameters() -> tuple[Tensor, Tensor, Tensor]:
    weight, phi = normal(5, 3, seed=1).requires_grad_(), inputs(SMALL, 1)[1].requires_grad_()
    return weight, phi, normal(6, 5, seed=2)


@pytest.mark.parametrize("compiled", ["eager", "aot_eager"], indirect=True)
def test_compiled_training_step(compiled):
    weight, phi, features = _parameters()
    gradients = torch.autograd.grad(compiled(weight, phi, features), (weight, phi))
    wanted = torch.autograd.grad(_step(weight, phi, features), (weight, phi))
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("compiled", ["eager"], indirect=True)
def test_second_order_of_a_step_that_dynamo_only_captured(compiled):
    weight, phi, features = _parameters()
    results = []
    for function in (compiled, _step):
        (gradient,) = torch.autograd.grad(function(weight, phi, features), weight, create_graph=True)
        results.append(torch.autograd.grad(gradient, (weight, phi), torch.ones_like(weight)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("compiled", ["aot_eager"], indirect=True)
def test_second_order_of_a_compiled_step_is_refused_by_torch(compiled):
    """AOTAutograd, which is under every real backend, has no double backward (pytorch#91469): what it compiles cannot
    be part of a hypergradient. Some versions of torch say so, others call the gradient unconnected to parameters."""
    weight, phi, features = _parameters()
    (gradient,) = torch.autograd.grad(compiled(weight, phi, features), weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|not have been used in the graph"):
        torch.autograd.grad(gradient, weight, torch.ones_like(weight))
