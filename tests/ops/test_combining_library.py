"""The raw ops of the combiner and the loss image as torch sees them (opcheck, fake tensors), and where their references
take over."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from auxfast.ops.network import CombinerNetwork, LossImageNetwork

from . import combiner_cases, loss_image_cases
from .combiner_cases import assert_agree, normal
from .combining_cases import BOTH, COMBINER, LOSS_IMAGE, OPS, readable

Calls = list[tuple[Any, tuple[Any, ...]]]  # an op and its arguments


def _combiner_calls(network: CombinerNetwork, batch: int, save: bool, dtype: torch.dtype, device: str = "cpu") -> Calls:
    losses, phi, grad, tangent = combiner_cases.inputs(network, batch, dtype, device)
    _, _, saved = OPS.combiner_forward(losses, phi, network.packed, save)
    several = normal(2, batch, network.num_losses, dtype=dtype, device=device)
    later = grad, losses, phi, saved, network.packed
    return [
        (OPS.combiner_forward.default, (losses, phi, network.packed, save)),
        (OPS.combiner_backward_phi.default, later),
        *((OPS.combiner_second_order.default, (some, *later)) for some in (tangent, several)),
        *((OPS.combiner_hessian.default, (some, *later)) for some in (tangent, several)),
    ]


def _loss_image_calls(network: LossImageNetwork, dtype: torch.dtype) -> Calls:
    losses, phi, grad, tangent = loss_image_cases.inputs(network, 3, 5, 18, dtype)
    several = normal(2, *losses.shape, dtype=dtype)
    later = grad, losses, phi, losses.new_empty(0), network.packed
    return [
        (OPS.loss_image_forward.default, (losses, phi, None, network.packed, True, False)),
        (OPS.loss_image_forward.default, (losses, phi, losses[:, 0, 0, 0], network.packed, False, False)),
        (OPS.loss_image_backward_phi.default, later),
        *((OPS.loss_image_second_order.default, (some, *later)) for some in (tangent, several)),
        *((OPS.loss_image_hessian.default, (some, *later)) for some in (tangent, several)),
    ]


def _opcheck(calls: Calls) -> None:
    """Every utility of opcheck. The ops have no autograd of their own (the Functions of second_order.py are that), so
    the inputs require no gradients."""
    for op, args in calls:
        torch.library.opcheck(op, args)


# 64 samples fill their tile. Behind the last sample `saved` holds whatever was there, and opcheck would compare it.
@pytest.mark.parametrize(
    ("reduction", "batch", "save", "dtype"), [("mean", 64, True, torch.float32), ("none", 5, False, torch.float64)]
)
def test_opcheck_of_the_combiner(reduction, batch, save, dtype, device):
    _opcheck(_combiner_calls(COMBINER.networks[reduction], batch, save, dtype, device))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_the_loss_image(reduction, dtype):
    _opcheck(_loss_image_calls(LOSS_IMAGE.networks[reduction], dtype))


def _assert_fake_tensors_have_the_shapes_of_real_ones(calls: Calls) -> None:
    for op, args in calls:
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        for one, other in zip(*((t,) if isinstance(t, Tensor) else t for t in (real, fake)), strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("network", [*COMBINER.networks.values(), CombinerNetwork(50, (10,) * 5)], ids=readable)
@pytest.mark.parametrize(("batch", "save"), [(1, True), (65, True), (65, False)])
def test_fake_tensors_of_the_combiner(batch, save, network):
    _assert_fake_tensors_have_the_shapes_of_real_ones(_combiner_calls(network, batch, save, torch.float32))


@pytest.mark.parametrize("network", LOSS_IMAGE.networks.values(), ids=readable)
def test_fake_tensors_of_the_loss_image(network):
    _assert_fake_tensors_have_the_shapes_of_real_ones(_loss_image_calls(network, torch.float32))


@BOTH
def test_meta_tensors(op):
    losses, phi, *_ = (t.to("meta") for t in op.inputs(op.small, op.some))
    assert op(losses, phi, op.small).shape == ()
    assert op(losses, phi, op.networks["none"]).shape == op.some[:1]


@BOTH
def test_raw_ops_are_not_differentiable_by_themselves(op):
    losses, phi, grad, tangent = (t.requires_grad_() for t in op.inputs(op.small, op.some))
    results = *op.raw_forward(losses, phi, op.small), *op.raw_second_order(tangent, grad, losses, phi, op.small)
    assert not any(t.requires_grad for t in results)


# --------------------------------------------------------------------------------------- where the reference takes over


@pytest.fixture
def kernel_calls(op, monkeypatch) -> list[int]:
    """Grows by one with every forward pass of the kernels."""
    made: list[int] = []
    original = op.module._forward
    monkeypatch.setattr(op.module, "_forward", lambda *args: (made.append(1), original(*args))[1])
    return made


HIDDENS = [((4,) * 8, True), ((64,), True), ((4,) * 9, False), ((3, 65), False)]
CHANNELS = [(3, (2,) * 4, True), (64, (64,), True), (3, (2,) * 5, False), (3, (65,), False), (65, (2,), False)]
LIMITS = [
    *((COMBINER, CombinerNetwork(3, hidden, main=0), (70,), fits) for hidden, fits in HIDDENS),
    *((LOSS_IMAGE, LossImageNetwork(n, channels, main=0), (2, 33, 34), fits) for n, channels, fits in CHANNELS),
]


@pytest.mark.parametrize(("op", "network", "shape", "fits"), LIMITS, ids=readable)
def test_larger_networks_run_on_the_reference(op, network, shape, fits, kernel_calls):
    given = op.inputs(network, shape)
    actual = op.derivatives(network, *given)
    assert len(kernel_calls) == fits
    assert_agree(actual, op.cases.of_reference(network, *given), op.cases.TOLERANCES[torch.float64])


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_empty_batch_runs_on_the_reference(reduction, op, kernel_calls):
    network = replace(op.small, reduction=reduction)
    losses, phi, *_ = (t.requires_grad_() for t in op.inputs(network, (0, *op.some[1:])))
    value = op(losses, phi, network)
    assert kernel_calls == []
    assert value.shape == ((0,) if reduction == "none" else ())
    assert value.isnan().item() if reduction == "mean" else value.sum() == 0
    grad_losses, grad_phi = torch.autograd.grad(value.sum(), (losses, phi))
    assert grad_losses.shape == losses.shape
    assert grad_phi.shape == phi.shape


# ---------------------------------------------------------------------------------------------------------- memory


def _bytes_in_use() -> int:
    """According to malloc."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = [("before", ctypes.c_size_t * 7), ("in_use", ctypes.c_size_t), ("behind", ctypes.c_size_t * 2)]

    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    return mallinfo2().in_use


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="mallinfo2 is glibc's")
@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(_combiner_calls(COMBINER.networks["mean"], 67, True, torch.float32), id="combiner"),
        pytest.param(_loss_image_calls(LOSS_IMAGE.networks["mean"], torch.float32), id="loss_image"),
    ],
)
def test_calls_leave_nothing_behind(calls):
    """torch's own conversion of `str` arguments loses some bytes at every call, and they pin the heap."""
    for op, args in calls:
        for _ in range(100):
            op(*args)
        before = _bytes_in_use()
        for _ in range(1000):
            op(*args)
        assert _bytes_in_use() - before < 8000, op
