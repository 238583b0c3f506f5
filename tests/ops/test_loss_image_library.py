"""The loss image's raw ops as torch sees them (opcheck, fake tensors), its errors, and where the reference serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from auxfast.ops import loss_image as module
from auxfast.ops.loss_image import loss_image
from auxfast.ops.loss_image_network import LossImageNetwork

from .combiner_cases import assert_agree, normal
from .loss_image_cases import SMALL, TOLERANCES, inputs, of_kernels, of_reference

OPS = torch.ops.auxfast
PER_IMAGE = replace(SMALL, reduction="none")


def _calls(network: LossImageNetwork, dtype: torch.dtype) -> list[tuple[Any, Any]]:
    """Sample calls of the three ops: (op, arguments)."""
    losses, phi, grad, tangent = inputs(network, 3, 5, 18, dtype)
    several = normal(2, *losses.shape, dtype=dtype)
    later = grad, losses, phi, network.packed
    return [
        (OPS.loss_image_forward.default, (losses, phi, None, network.packed, True)),
        (OPS.loss_image_forward.default, (losses, phi, losses[:, 0, 0, 0], network.packed, False)),
        (OPS.loss_image_backward_phi.default, later),
        (OPS.loss_image_second_order.default, (tangent, *later, True)),
        (OPS.loss_image_second_order.default, (several, *later, True)),
        (OPS.loss_image_second_order.default, (several, *later, False)),
    ]


@pytest.mark.parametrize("network", [SMALL, PER_IMAGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(network, dtype):
    """The ops have no autograd of their own (the Functions are that), so the inputs require no gradients."""
    for op, args in _calls(network, dtype):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("network", [SMALL, PER_IMAGE])
def test_fake_tensors_have_the_shapes_of_real_ones(network):
    for op, args in _calls(network, torch.float32):
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        for one, other in zip(*((t,) if isinstance(t, Tensor) else t for t in (real, fake)), strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_meta_tensors():
    losses, phi, *_ = (t.to("meta") for t in inputs(SMALL, 3, 5, 6))
    assert loss_image(losses, phi, SMALL).shape == ()
    assert loss_image(losses, phi, PER_IMAGE).shape == (3,)


# ------------------------------------------------------------------------------------------------------------- errors

NETWORK_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "num_losses": ({"num_losses": 0}, "num_losses must be at least 1, got 0"),
    "no channels": ({"channels": ()}, r"channels must hold one positive number .*, got \(\)"),
    "zero channels": ({"channels": (3, 0)}, r"channels must .*, got \(3, 0\)"),
    "activation": ({"activation": "relu"}, "activation must be one of identity, softplus, got 'relu'"),
    "reduction": ({"reduction": "max"}, "reduction must be one of none, sum, mean, got 'max'"),
    "main": ({"main": 3}, "main must be None or a channel 0 to 2, got 3"),
    "negative main": ({"main": -1}, "main must be None or a channel 0 to 2, got -1"),
    "main_reduction": ({"main_reduction": "none"}, "main_reduction must be one of mean, sum, valid_mean, got 'none'"),
}


@pytest.mark.parametrize(("changes", "message"), NETWORK_ERRORS.values(), ids=NETWORK_ERRORS.keys())
def test_network_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        LossImageNetwork(**{"num_losses": 3, **changes})


ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], type[Exception], str]] = {
    "channels": ("losses", lambda t: t[:, 1:], ValueError, r"losses must be \(batch, 2, H, W\), got \(3, 1, 5, 6\)"),
    "no batch": ("losses", lambda t: t[0], ValueError, r"losses must be \(batch, 2, H, W\), got \(2, 5, 6\)"),
    "integers": ("losses", Tensor.long, TypeError, r"losses must be floating point, got torch\.int64"),
    "float losses": ("losses", Tensor.float, TypeError, r"losses are torch\.float32 and phi is torch\.float64"),
    "losses' device": ("losses", lambda t: t.to("meta"), RuntimeError, "losses are on meta and mask is on cpu"),
    "phi's size": ("phi", lambda t: t[1:], ValueError, r"phi must be \(\d+,\), got \(\d+,\)"),
    "phi's rank": ("phi", lambda t: t[None], ValueError, r"phi must be \(\d+,\), got \(1, \d+\)"),
    "phi's dtype": ("phi", Tensor.float, TypeError, r"phi is torch\.float32: convert one"),
    "phi's device": ("phi", lambda t: t.to("meta"), RuntimeError, "losses are on cpu and phi is on meta"),
    "mask's shape": ("mask", lambda t: t[:, :1], ValueError, r"mask must have .* \(3, 2, 5, 6\), got \(3, 1, 5, 6\)"),
    "mask's device": ("mask", lambda t: t.to("meta"), RuntimeError, "losses are on cpu and mask is on meta"),
}


@pytest.mark.parametrize(("which", "change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(which, change, error, message):
    losses, phi, *_ = inputs(SMALL, 3, 5, 6)
    given = {"losses": losses, "phi": phi, "mask": torch.ones_like(losses)}
    given[which] = change(given[which])
    with pytest.raises(error, match=message):
        loss_image(given["losses"], given["phi"], SMALL, given["mask"] if which != "phi" else None)


def _raw(network: list[int] = SMALL.packed, **changes: Callable[[Tensor], Tensor]) -> list[Callable[[], object]]:
    """Calls of the three ops, with arguments changed."""
    losses, phi, grad, tangents = inputs(SMALL, 3, 5, 6)
    given = {"losses": losses, "phi": phi, "grad": grad, "tangents": tangents, "main_weights": losses[:, 0, 0, 0]}
    for key, change in changes.items():
        given[key] = change(given[key])
    losses, phi, grad, tangents, main_weights = given.values()
    return [
        lambda: OPS.loss_image_forward(losses, phi, main_weights, network, True),
        lambda: OPS.loss_image_backward_phi(grad, losses, phi, network),
        lambda: OPS.loss_image_second_order(tangents, grad, losses, phi, network, True),
    ]


EVERY, FIRST, LATER, LAST = slice(0, 3), slice(0, 1), slice(1, 3), slice(2, 3)
RAW_ERRORS: dict[str, tuple[slice, dict[str, Any], str]] = {
    "integers": (EVERY, {"losses": Tensor.long}, "losses must be float32 or float64"),
    "rank of losses": (EVERY, {"losses": lambda t: t[0]}, r"losses must be \(batch, num_losses, H, W\), got 3 dim"),
    "no images": (EVERY, {"losses": lambda t: t[:0]}, "losses must not be empty"),
    "no columns": (EVERY, {"losses": lambda t: t[..., :0]}, "losses must not be empty"),
    "65 losses": (FIRST, {"losses": lambda t: t[:, :1].expand(3, 65, 5, 6)}, "1 to 64 channels, got 65"),
    "size of phi": (EVERY, {"phi": lambda t: t[1:]}, "phi must have 115 elements, got 114"),
    "rank of phi": (EVERY, {"phi": lambda t: t[None]}, "phi must have 115 elements"),
    "dtype of phi": (EVERY, {"phi": Tensor.float}, "phi and losses must have one dtype"),
    "dtype of main_weights": (FIRST, {"main_weights": Tensor.float}, "main_weights and losses must have one dtype"),
    "size of main_weights": (FIRST, {"main_weights": lambda t: t[1:]}, "main_weights must have 3 elements, got 2"),
    "size of grad": (LATER, {"grad": lambda t: t.expand(3)}, "grad must have 1 elements, got 3"),
    "dtype of grad": (LATER, {"grad": Tensor.float}, "grad and losses must have one dtype"),
    "dtype of tangents": (LAST, {"tangents": Tensor.float}, "tangents and losses must have one dtype"),
    "rank of tangents": (LAST, {"tangents": lambda t: t[0]}, "tangents must have the shape of losses"),
    "rank 6": (LAST, {"tangents": lambda t: t[None, None]}, "tangents must have the shape of losses"),
    "width of tangents": (LAST, {"tangents": lambda t: t[..., 1:]}, "tangents must have the shape of losses"),
    "no convolutions": (EVERY, {"network": SMALL.packed[:4]}, "1 to 4 convolutions, got 0"),
    "no network": (EVERY, {"network": []}, "1 to 4 convolutions"),
    "5 convolutions": (EVERY, {"network": [1, 0, 1, 2] + [2] * 5}, "1 to 4 convolutions, got 5"),
    "65 channels": (FIRST, {"network": [1, 0, 1, 2, 65]}, "1 to 64 channels, got 65"),
    "no channels": (FIRST, {"network": [1, 0, 1, 2, 0]}, "1 to 64 channels, got 0"),
    "main": (EVERY, {"network": [1, 2, 1, 2, 3, 2]}, "main loss 2 of 2 losses"),
    "negative main": (EVERY, {"network": [1, -2, 1, 2, 3, 2]}, "main loss -2 of 2 losses"),
}


@pytest.mark.parametrize(("calls", "changes", "message"), RAW_ERRORS.values(), ids=RAW_ERRORS.keys())
def test_raw_ops_check_what_they_are_given(calls, changes, message):
    for call in _raw(**changes)[calls]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_raw_ops_are_not_differentiable_by_themselves():
    losses, phi, *_ = (t.requires_grad_() for t in inputs(SMALL, 3, 5, 6))
    assert not any(t.requires_grad for t in OPS.loss_image_forward(losses, phi, None, SMALL.packed, True))


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.fixture
def kernel_calls(monkeypatch) -> list[int]:
    made: list[int] = []
    original = module._forward
    monkeypatch.setattr(module, "_forward", lambda *args: (made.append(1), original(*args))[1])
    return made


@pytest.mark.parametrize(
    ("num_losses", "channels", "fits"),
    [(3, (2,) * 4, True), (64, (64,), True), (3, (2,) * 5, False), (3, (65,), False), (65, (2,), False)],
)
def test_larger_networks_run_on_the_reference(num_losses, channels, fits, kernel_calls):
    network = LossImageNetwork(num_losses, channels, main=0)
    given = inputs(network, 2, 33, 34)
    actual = of_kernels(network, *given)
    assert len(kernel_calls) == fits
    assert_agree(actual, of_reference(network, *given), TOLERANCES[torch.float64])


@pytest.mark.parametrize("network", [SMALL, PER_IMAGE, replace(SMALL, reduction="sum")])
def test_empty_batch_runs_on_the_reference(network, kernel_calls):
    phi = inputs(network, 1, 1, 1)[1].requires_grad_()
    losses = torch.empty(0, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    value = loss_image(losses, phi, network)
    assert kernel_calls == []
    assert value.shape == ((0,) if network.reduction == "none" else ())
    grad_losses, grad_phi = torch.autograd.grad(value.sum(), (losses, phi))
    assert grad_losses.shape == losses.shape
    assert grad_phi.shape == phi.shape
