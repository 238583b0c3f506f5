"""The combiner and the loss image under what transforms them: batched products, torch.func, forward-mode AD and
torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from auxfast import reference_kernels

from .combiner_cases import normal
from .combining_cases import BOTH, BOTH_ON_DEVICE

# Forward-mode AD and Dynamo, on their first use, touch what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
ORDERS = pytest.mark.parametrize("order", [1, 2])


@pytest.fixture
def no_kernels(op, monkeypatch):
    """Fails a test in which a kernel is called."""

    def fail(*args: object) -> None:
        raise AssertionError("a kernel was called")

    for kernel in op.kernels:
        monkeypatch.setattr(op.module, kernel, fail)


# -------------------------------------------------------------------------------------------------- several at a time


@BOTH_ON_DEVICE
@pytest.mark.parametrize("with_phi", [True, False])
@REDUCTIONS
def test_batched_hessian_products_are_each_alone(reduction, with_phi, op):
    network = op.networks[reduction]
    losses, phi, grad, _ = op.inputs(network, op.many)
    tangents = normal(4, *losses.shape, seed=7, device=op.device)
    wrt = (losses.requires_grad_(), phi.requires_grad_())[: 1 + with_phi]
    (gradient,) = torch.autograd.grad(op(losses, phi, network), losses, grad, create_graph=True)
    together = torch.autograd.grad(gradient, wrt, tangents, is_grads_batched=True, retain_graph=True)
    for i, tangent in enumerate(tangents):
        alone = torch.autograd.grad(gradient, wrt, tangent, retain_graph=True)
        assert all(torch.equal(a[i], b) for a, b in zip(together, alone, strict=True))


@BOTH
def test_batched_gradients_are_each_alone(op):
    losses, phi, *_ = op.inputs(op.networks["none"], op.some)
    given = losses.requires_grad_(), phi.requires_grad_()
    value = op(*given, op.networks["none"])
    units = torch.eye(len(value)).double()
    together = torch.autograd.grad(value, given, units, is_grads_batched=True, retain_graph=True)
    for i, unit in enumerate(units):
        alone = torch.autograd.grad(value, given, unit, retain_graph=True)
        torch.testing.assert_close([t[i] for t in together], list(alone), rtol=1e-12, atol=1e-14)


@BOTH
@ORDERS
def test_batches_that_would_lose_their_graph_raise(order, op):
    losses, phi, _, tangent = (t.requires_grad_() for t in op.inputs(op.small, op.some))

    def batched(result: Tensor) -> Tensor:
        vector = torch.ones(()).double()
        if order == 2:
            (result,) = torch.autograd.grad(result, losses, create_graph=True)
            vector = tangent
        vectors = vector.expand(2, *vector.shape)
        return torch.autograd.grad(result, losses, vectors, is_grads_batched=True, create_graph=True)[0]

    message = rf"(?s)auxfast's {op.label} kernels.*batched gradients that have a graph.*reference_kernels\(\)"
    with pytest.raises(NotImplementedError, match=message):
        batched(op(losses, phi, op.small))
    with reference_kernels():
        assert batched(op(losses, phi, op.small)).requires_grad


@BOTH
@pytest.mark.parametrize("batched", ["grad", "losses", "phi"])
def test_other_batches_of_second_order_raise(batched, op):
    losses, phi, grad, tangent = op.inputs(op.small, op.some)
    given = {"tangents": tangent, "grad": grad, "losses": losses, "phi": phi}
    given[batched] = torch.stack([given[batched]] * 2)
    dims = tuple(0 if key == batched else None for key in given)
    with pytest.raises(NotImplementedError, match=f"{op.name} .* over the tangents only"):
        torch.func.vmap(lambda *tensors: op.raw_second_order(*tensors, op.small)[0], dims)(*given.values())


# ---------------------------------------------------------------------------------------------------------- torch.func


@BOTH
@REDUCTIONS
def test_func_transforms_take_the_reference(reduction, op, no_kernels):
    network = op.networks[reduction]
    losses, phi, grad, tangent = op.inputs(network, op.some)

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

    torch.testing.assert_close(of(op), of(op.reference), rtol=1e-12, atol=1e-13)


@BOTH
def test_func_hessian(op, no_kernels):
    losses, phi, *_ = op.inputs(op.small, op.few)
    hessian = torch.func.hessian(lambda x, p: op(x, p, op.small), argnums=(0, 1))(losses, phi)
    wanted = torch.autograd.functional.hessian(lambda x, p: op.reference(x, p, op.small), (losses, phi))
    torch.testing.assert_close(hessian, wanted, rtol=1e-12, atol=1e-13)


# --------------------------------------------------------------------------------------------------- forward-mode AD


@BOTH
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("which", [0, 1], ids=["losses", "phi"])
def test_forward_mode_is_right_and_never_zero(which, requires_grad, op):
    losses, phi, *_ = op.inputs(op.small, op.some)
    given = [losses.requires_grad_(requires_grad), phi.requires_grad_(requires_grad)]
    direction = torch.ones_like(given[which])
    gradient = torch.func.grad(lambda x, p: op.reference(x, p, op.small), argnums=which)(losses, phi)
    with forward_ad.dual_level():
        given[which] = forward_ad.make_dual(given[which], direction)
        tangent = forward_ad.unpack_dual(op(*given, op.small)).tangent
    torch.testing.assert_close(tangent.detach(), gradient.detach().sum())


@BOTH
@ORDERS
def test_forward_mode_through_a_recorded_backward_raises(order, op):
    losses, phi, grad, tangent = op.inputs(op.small, op.some)
    result, vector = op(losses.requires_grad_(), phi.requires_grad_(), op.small), grad
    if order == 2:
        (result,) = torch.autograd.grad(result, losses, create_graph=True)
        vector = tangent
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode AD through their backward"):
        torch.autograd.grad(result, phi, forward_ad.make_dual(vector, torch.ones_like(vector)))


# ------------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def step(op):
    """A training step's loss: the losses depend on the inner parameters `weight`."""

    def loss(weight: Tensor, phi: Tensor, features: Tensor) -> Tensor:
        return op((features * weight).square(), phi, op.small)

    return loss


@pytest.fixture
def compiled(step, request):
    torch.compiler.reset()
    yield torch.compile(step, backend=request.param, fullgraph=True)
    torch.compiler.reset()


@pytest.fixture
def parameters(op) -> tuple[Tensor, Tensor, Tensor]:
    """weight, phi and features of a step."""
    losses, phi, *_ = op.inputs(op.small, op.some)
    weight = normal(*losses.shape[1:], seed=1).requires_grad_()
    return weight, phi.requires_grad_(), normal(*losses.shape, seed=2)


@BOTH
@pytest.mark.parametrize("compiled", ["eager", "aot_eager"], indirect=True)
def test_compiled_training_step(compiled, step, parameters):
    gradients, wanted = (torch.autograd.grad(loss(*parameters), parameters[:2]) for loss in (compiled, step))
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-13)


@BOTH
@pytest.mark.parametrize("compiled", ["eager"], indirect=True)
def test_second_order_of_a_step_that_dynamo_only_captured(compiled, step, parameters):
    weight, phi, _ = parameters
    results = []
    for loss in (compiled, step):
        (gradient,) = torch.autograd.grad(loss(*parameters), weight, create_graph=True)
        results.append(torch.autograd.grad(gradient, (weight, phi), torch.ones_like(weight)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@BOTH
@pytest.mark.parametrize("compiled", ["aot_eager"], indirect=True)
def test_second_order_of_a_compiled_step_is_refused_by_torch(compiled, parameters):
    """AOTAutograd, which is under every real backend, has no double backward (pytorch#91469): what it compiles cannot
    be part of a hypergradient. Some versions of torch say so, others call the gradient unconnected to parameters."""
    weight = parameters[0]
    (gradient,) = torch.autograd.grad(compiled(*parameters), weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|not have been used in the graph"):
        torch.autograd.grad(gradient, weight, torch.ones_like(weight))
