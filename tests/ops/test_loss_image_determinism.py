"""The loss image's bits for any number of threads, its instruction sets, and how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import auxfast
from auxfast.ops.loss_image_network import LossImageNetwork

from .combiner_cases import normal
from .loss_image_cases import inputs, name, of_kernels

NETWORKS = [
    LossImageNetwork(3, (8, 16), main=0),
    LossImageNetwork(2, (5,), "identity", main=1, main_reduction="sum", reduction="none"),
    LossImageNetwork(4, (4, 6, 8), reduction="sum"),
]


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 40, 50), (70, 9, 33), (2, 781, 20)])  # one item, many images, bands
@pytest.mark.parametrize("network", NETWORKS, ids=map(name, NETWORKS))
def test_same_bits_for_any_number_of_threads(network, shape, dtype, restore_threads):
    given = inputs(network, *shape, dtype)
    losses, phi, grad, _ = given
    tangents = normal(2, *losses.shape, dtype=dtype)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        several = torch.ops.auxfast.loss_image_second_order(tangents, grad, losses, phi, network.packed, True)
        results.append([*of_kernels(network, *given).values(), *several])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _run(script: str, **settings: str) -> Any:
    """What a script prints as JSON, in a process of its own."""
    places = [str(Path(auxfast.__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ".")]
    settings |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


_ON_THIS_INSTRUCTION_SET = """
import json
import torch
import auxfast
from auxfast.ops.loss_image_network import LossImageNetwork
from tests.ops.combiner_cases import assert_agree
from tests.ops.loss_image_cases import TOLERANCES, inputs, of_kernels, of_reference

for num_losses, channels in ((1, (8, 16)), (3, (3, 5, 7)), (5, (12,))):
    for shape in ((1, 1, 1), (7, 9, 33), (1, 20, 300), (2, 530, 3)):
        network = LossImageNetwork(num_losses, channels, "identity" if num_losses == 5 else "softplus", main=0)
        given = inputs(network, *shape, torch.float32)
        wanted = of_reference(network, *given)
        for dtype, tolerances in TOLERANCES.items():
            assert_agree(of_kernels(network, *(t.to(dtype) for t in given)), wanted, tolerances)
print(json.dumps([torch.backends.cpu.get_cpu_capability(), auxfast.build_info()["cpu_kernels_in_use"]]))
"""


@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_every_instruction_set_agrees_with_the_reference(limit):
    of_torch, in_use = _run(_ON_THIS_INSTRUCTION_SET, ATEN_CPU_CAPABILITY=limit)
    assert in_use == (of_torch.lower() if of_torch.lower() in auxfast.build_info()["cpu_kernels"] else "baseline")


# Peak memory in KiB beyond what the process had, of gradient and second order with parameters.
_MEMORY = """
import json
import resource
import torch
from auxfast.ops.loss_image import loss_image, loss_image_reference
from auxfast.ops.loss_image_network import LossImageNetwork

network = LossImageNetwork(3, (8, 16), main=0)
phi = torch.rand(network.num_parameters).requires_grad_()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth(function, height: int, width: int, batch: int) -> int:
    losses = torch.rand(batch, 3, height, width).requires_grad_()
    tangent = torch.rand_like(losses)
    before = peak()
    (gradient,) = torch.autograd.grad(function(losses, phi, network), losses, create_graph=True)
    torch.autograd.grad(gradient, (losses, phi), tangent)
    return peak() - before


growth(loss_image, 8, 8, 1)
growth(loss_image_reference, 8, 8, 1)
print(json.dumps([growth(*case) for case in CASES]))
"""


def test_memory_is_a_twelfth_of_eager():
    cases = "[(loss_image, 288, 384, 8), (loss_image_reference, 288, 384, 8)]"
    fused, eager = _run(_MEMORY.replace("CASES", cases))
    assert fused <= eager / 12


def test_memory_grows_with_the_row():
    """Beyond the three results of the size of the losses: the weights, the scaled weights, the Hessian product."""
    (tall,) = _run(_MEMORY.replace("CASES", "[(loss_image, 4096, 256, 1)]"))
    (wide,) = _run(_MEMORY.replace("CASES", "[(loss_image, 256, 4096, 1)]"))
    results = 3 * 3 * 4096 * 256 * 4 // 1024
    assert tall - results <= 3 * 1024
    assert wide - results <= 16 * 1024
