"""The bits of the combiner and the loss image for any number of threads and any run, and their instruction sets."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import auxfast
from auxfast.ops.network import CombinerNetwork, LossImageNetwork

from .combiner_cases import normal
from .combining_cases import COMBINER, LOSS_IMAGE, on_device_rows, printed_json, readable

COMBINERS = [
    CombinerNetwork(4, (10, 10), main=0),
    CombinerNetwork(5, (7,), "identity", bias=False, reduction="none"),
    CombinerNetwork(50, (10, 3), reduction="sum"),
]
LOSS_IMAGES = [
    LossImageNetwork(3, (8, 16), main=0),
    LossImageNetwork(2, (5,), "identity", main=1, main_reduction="sum", reduction="none"),
    LossImageNetwork(4, (4, 6, 8), reduction="sum"),
]
# There are up to 122 chunks of samples; one tile, many images, several bands.
BATCHES, SHAPES = [64, 513, 3000, 70001], [(1, 40, 50), (70, 9, 33), (2, 781, 20)]
WORK = [
    *((COMBINER, net, (min(batch, 1_000_000 // net.num_losses),)) for net, batch in product(COMBINERS, BATCHES)),
    *product([LOSS_IMAGE], LOSS_IMAGES, SHAPES),
]
RUNS = [*product([COMBINER], COMBINERS, [(3000,)]), *product([LOSS_IMAGE], LOSS_IMAGES, SHAPES[1:2])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("op", "network", "shape"), WORK, ids=readable)
def test_same_bits_for_any_number_of_threads(op, network, shape, dtype):
    given = op.inputs(network, shape, dtype)
    losses, phi, grad, _ = given
    some = grad[:3000] if network.reduction == "none" else grad, losses[:3000], phi
    tangents = normal(3, *some[1].shape, dtype=dtype)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        several = op.raw_second_order(tangents, *some, network)
        results.append([*op.derivatives(network, *given).values(), *several])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("op", "network", "shape"), on_device_rows(RUNS), ids=readable)
def test_same_bits_for_every_run(op, network, shape):
    torch.set_num_threads(4)
    given = op.inputs(network, shape, torch.float32)
    results = [list(op.derivatives(network, *given).values()) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


_ON_THIS_INSTRUCTION_SET = """
import json
import torch
import auxfast
from auxfast.ops.network import CombinerNetwork, LossImageNetwork
from ops.combiner_cases import HIDDENS, assert_agree
from ops.combining_cases import COMBINER, LOSS_IMAGE

cases = []
for i, num_losses in enumerate((1, 5, 16, 48, 49, 70)):
    activation, reduction = ("identity" if i == 2 else "softplus"), ("mean", "none")[i % 2]
    network = CombinerNetwork(num_losses, HIDDENS[i % len(HIDDENS)], activation, main=0, reduction=reduction)
    cases += [(COMBINER, network, (batch,)) for batch in (1, 65, 513)]
for num_losses, channels in ((1, (8, 16)), (3, (3, 5, 7)), (5, (12,))):
    network = LossImageNetwork(num_losses, channels, "identity" if num_losses == 5 else "softplus", main=0)
    cases += [(LOSS_IMAGE, network, shape) for shape in ((1, 1, 1), (7, 9, 33), (1, 20, 300), (2, 530, 3))]
for op, network, shape in cases:
    given = op.inputs(network, shape, torch.float32)
    wanted = op.cases.of_reference(network, *given)
    for dtype, tolerances in op.cases.TOLERANCES.items():
        assert_agree(op.derivatives(network, *(t.to(dtype) for t in given)), wanted, tolerances)
print(json.dumps([torch.backends.cpu.get_cpu_capability(), auxfast.build_info()["cpu_kernels_in_use"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_every_instruction_set_agrees_with_the_reference(limit):
    """The best one that this processor has is what all other tests run on. ATEN_CPU_CAPABILITY limits auxfast as it
    limits torch, so ask torch what the processor has below it."""
    of_torch, in_use = printed_json(_ON_THIS_INSTRUCTION_SET, ATEN_CPU_CAPABILITY=limit)
    assert in_use == (of_torch.lower() if of_torch.lower() in auxfast.build_info()["cpu_kernels"] else "baseline")
