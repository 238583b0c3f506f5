"""The CUDA kernels against their CPU twins at the sizes where work is divided in another way."""

from __future__ import annotations

import pytest
import torch
from ops import loss_image_cases
from ops.combiner_cases import TOLERANCES, assert_agree, inputs, normal, of_kernels, relative_error
from ops.test_neumann import assert_step, lists

from auxfast.ops.network import CombinerNetwork, LossImageNetwork

pytestmark = pytest.mark.cuda

FIVE = (10,) * 5
SIZES = {
    "tiles of 8": (2048, CombinerNetwork(4, FIVE, main=0)),
    "tiles of 16": (2049, CombinerNetwork(4, FIVE, main=0)),
    "tiles of 32": (4097, CombinerNetwork(4, FIVE, main=0, reduction="none")),
    "several tiles a block": (40_001, CombinerNetwork(3, (4, 2), main=2, reduction="sum")),
    "the most losses that are staged": (129, CombinerNetwork(32, (7, 3))),
    "one loss more": (129, CombinerNetwork(33, (7, 3))),
    "several tiles a block, in the workspace": (40_001, CombinerNetwork(35, (64, 64), reduction="none")),
    "sums of fewer blocks, for their size": (1000, CombinerNetwork(4000, (64, 3), bias=False)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "network"), SIZES.values(), ids=SIZES.keys())
def test_combiner(batch, network, dtype):
    given = inputs(network, batch, torch.float32)
    wanted = of_kernels(network, *(t.double() for t in given))
    actual = of_kernels(network, *(t.to("cuda", dtype) for t in given))
    assert_agree({key: tensor.cpu() for key, tensor in actual.items()}, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("batch", [70, 40_001])  # tangents side by side, or one after the other
def test_several_tangents(batch):
    network = CombinerNetwork(3, (4, 2), main=0, reduction="none")
    results = []
    for device in ("cpu", "cuda"):
        losses, phi, grad, _ = inputs(network, batch, device=device)
        tangents = normal(5, batch, 3, seed=7, device=device)
        nothing = losses.new_empty(0)
        results.append(torch.ops.auxfast.combiner_second_order(tangents, grad, losses, phi, nothing, network.packed))
    for exact, actual in zip(*results, strict=True):
        assert relative_error(actual.cpu(), exact) <= 1e-11


IMAGES = {
    "groups of images": ((20, 288, 384), LossImageNetwork(3, (8, 16), main=0)),
    "bands": ((1, 1031, 1027), LossImageNetwork(3, (8, 16, 32), main=2, reduction="none")),
    "the most channels": ((3, 101, 67), LossImageNetwork(64, (64, 64), main=63)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "network"), IMAGES.values(), ids=IMAGES.keys())
def test_loss_image(shape, network, dtype):
    given = loss_image_cases.inputs(network, *shape, torch.float32)
    wanted = loss_image_cases.of_kernels(network, *(t.double() for t in given))
    actual = loss_image_cases.of_kernels(network, *(t.to("cuda", dtype) for t in given))
    results = {key: tensor.cpu() for key, tensor in actual.items()}
    assert_agree(results, wanted, loss_image_cases.TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neumann_step(dtype):
    v, hv, p = lists([(3_000_001,), (5,), (2_097_152,)], dtype, "cuda")
    assert_step(v, hv, p, 1.2e-7 if dtype == torch.float32 else 4e-16)
