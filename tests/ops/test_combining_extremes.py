"""The combiner and the loss image on what is not ordinary: infinities, losses that are missing, low precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from auxfast.ops.network import CombinerNetwork, LossImageNetwork

from .combiner_cases import assert_agree, derivatives, normal, relative_error
from .combining_cases import BOTH, BOTH_ON_DEVICE, COMBINER, LOSS_IMAGE, CombiningOp, on_device_rows, readable

INF, NAN = float("inf"), float("nan")

# ------------------------------------------------------------------------------------------ infinite, huge and NaN

EXTREMES = [
    *((COMBINER, CombinerNetwork(n, (4, 4), main=1, reduction="none"), (6,)) for n in (3, 60)),
    (LOSS_IMAGE, LossImageNetwork(2, (4, 4), main=1, reduction="none"), (6, 8, 9)),
]
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 1e-9, "atol": 1e-12}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", [INF, -INF, 1e30, -1e30])
@pytest.mark.parametrize(("op", "network", "shape"), on_device_rows(EXTREMES), ids=readable)
def test_extreme_losses_do_as_in_the_reference(op, network, shape, extreme, dtype):
    losses, phi, grad, tangent = op.inputs(network, shape, dtype)
    phi = phi.abs()
    losses[([2, 4], [0, 1], 4, 4)[: losses.dim()]] = extreme
    actual = op.derivatives(network, losses, phi, grad, tangent)
    wanted = derivatives(lambda x, p: op.reference(x, p, network), losses, phi, grad, tangent)
    if extreme == INF:
        assert actual["value"][[2, 4]].tolist() == [INF, INF]
    for key, reference in wanted.items():
        assert not (actual[key].isnan() & ~reference.isnan()).any(), key
        known = reference.isfinite()
        torch.testing.assert_close(actual[key][known], reference[known], **CLOSE[dtype], msg=key)
    torch.testing.assert_close(actual["value"], wanted["value"])


# Neighbours in the kernels' memory: samples in a tile, images side by side.
SPOILT = [
    *((COMBINER, CombinerNetwork(n, (4, 4), main=0, reduction="none"), (70,)) for n in (3, 60)),
    *((LOSS_IMAGE, LossImageNetwork(2, (4, 4), main=0, reduction="none"), (12, 6, width)) for width in (1, 5, 30)),
]


# A GPU's own NaN has all bits of its mantissa set, which integer arithmetic on an exponent must survive.
GPU_NAN = float(torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32))


@pytest.mark.parametrize("wrong", [NAN, GPU_NAN, INF], ids=["nan", "a GPU's nan", "inf"])
@pytest.mark.parametrize(("op", "network", "shape"), on_device_rows(SPOILT), ids=readable)
def test_nan_spoils_its_own_sample(op, network, shape, wrong):
    losses, phi, grad, tangent = op.inputs(network, shape, torch.float32)
    clean = op.derivatives(network, losses, phi, grad, tangent)
    sample = len(losses) - 4
    losses[sample, ..., [0, -1]] = wrong
    result = op.derivatives(network, losses, phi, grad, tangent)
    others = torch.arange(len(losses)) != sample
    for key in ("value", "weights", "hessian product"):
        assert torch.equal(result[key][others], clean[key][others]), key
        assert wrong == INF or result[key][sample].isnan().any(), key
    assert not result["value"][sample].isfinite()
    for reduction in ("mean", "sum"):
        assert not op(losses, phi, replace(network, reduction=reduction)).isfinite()


# ------------------------------------------------------------------------------------------------------------- masks


def _mask(op: CombiningOp, losses: Tensor) -> Tensor:
    """Some of everything, but nothing of sample 2."""
    mask = normal(*losses.shape, seed=3, device=op.device) > -0.5
    mask[2] = False
    return mask


@BOTH_ON_DEVICE
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.int64])
@pytest.mark.parametrize("masked", [NAN, INF, -INF, 7.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_losses_count_as_zero(reduction, masked, mask_dtype, op):
    network = op.networks[reduction]
    losses, phi, grad, tangent = op.inputs(network, op.many)
    mask = _mask(op, losses)
    losses = losses.where(mask, masked)
    actual = op.derivatives(network, losses, phi, grad, tangent, mask=mask.to(mask_dtype))
    wanted = op.cases.of_reference(network, losses.where(mask, 0), phi, grad, tangent * mask)
    for key in ("weights", "hessian product"):
        wanted[key] = wanted[key] * mask
        assert (actual[key][~mask] == 0).all(), key
    assert_agree(actual, wanted, op.cases.TOLERANCES[torch.float64])


@BOTH
def test_masked_main_loss(op):
    losses, phi, *_ = op.inputs(op.small, op.some)
    losses[:, 0] = NAN
    mask = torch.ones_like(losses)
    mask[:, 0] = 0
    losses.requires_grad_()
    value = op(losses, phi, op.small, mask)
    (weights,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(value.detach(), op.reference(losses.detach().nan_to_num(0.0), phi, op.small))
    assert (weights[:, 0] == 0).all()
    assert (weights[:, 1:] != 0).all()


@BOTH
def test_everything_masked(op):
    losses, phi, *_ = op.inputs(op.small, op.some)
    losses = torch.full_like(losses, NAN).requires_grad_()
    value = op(losses, phi, op.small, torch.zeros_like(losses, dtype=torch.bool))
    (weights,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(value.detach(), op.reference(torch.zeros_like(losses), phi, op.small).detach())
    assert torch.equal(weights, torch.zeros_like(weights))


# ----------------------------------------------------------------------------------------------------- low precision


@BOTH_ON_DEVICE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("phi_dtype", [torch.float32, None], ids=["phi float32", "phi as the losses"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_low_precision_losses_are_computed_in_float32(with_mask, phi_dtype, dtype, op):
    losses, phi, grad, tangent = op.inputs(op.small, op.many, torch.float32)
    losses, phi = losses.to(dtype), phi.to(phi_dtype or dtype)
    mask = _mask(op, losses) if with_mask else torch.ones_like(losses, dtype=torch.bool)
    losses = losses.where(mask, NAN)
    given = losses.requires_grad_(), phi.requires_grad_()
    value = op(*given, op.small, mask if with_mask else None)
    assert value.dtype == torch.float32
    first = torch.autograd.grad(value, given, grad, create_graph=True)
    second = torch.autograd.grad(first[0], given, tangent.to(dtype))
    exact = op.cases.of_reference(
        op.small, losses.detach().where(mask, 0), phi.detach(), grad, tangent.to(dtype) * mask
    )
    for key in ("weights", "hessian product"):
        exact[key] = exact[key] * mask
    assert relative_error(value.detach(), exact["value"]) <= 1e-6
    second_order = op.cases.TOLERANCES[torch.float32][1]
    for key, result in zip(("weights", "phi", "hessian product", "mixed product"), (*first, *second), strict=True):
        assert result.dtype == given[key in ("phi", "mixed product")].dtype, key
        assert relative_error(result.detach(), exact[key]) <= max(second_order, torch.finfo(result.dtype).eps), key
