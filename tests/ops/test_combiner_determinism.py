"""The combiner's bits for any number of threads, and its instruction sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import auxfast
from auxfast.ops.combiner import CombinerNetwork

from .combiner_cases import DEVICES, inputs, name, normal, of_kernels

NETWORKS = [
    CombinerNetwork(4, (10, 10), main=0),
    CombinerNetwork(5, (7,), "identity", bias=False, reduction="none"),
    CombinerNetwork(50, (10, 3), reduction="sum"),
]


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [64, 513, 3000, 70001])  # up to 122 chunks
@pytest.mark.parametrize("network", NETWORKS, ids=map(name, NETWORKS))
def test_same_bits_for_any_number_of_threads(network, batch, dtype, restore_threads):
    given = inputs(network, min(batch, 1_000_000 // network.num_losses), dtype)
    losses, phi, grad, _ = given
    tangents = normal(3, min(batch, 3000), network.num_losses, dtype=dtype)
    some = grad[:3000] if network.reduction == "none" else grad, losses[:3000], phi, losses.new_empty(0)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        several = torch.ops.auxfast.combiner_second_order(tangents, *some, network.packed)
        results.append([*of_kernels(network, *given).values(), *several])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", NETWORKS, ids=map(name, NETWORKS))
def test_same_bits_for_every_run(network, device):
    given = inputs(network, 3000, torch.float32, device)
    results = [list(of_kernels(network, *given).values()) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


_ON_THIS_INSTRUCTION_SET = """
import json
import torch
import auxfast
from auxfast.ops.combiner import CombinerNetwork
from combiner_cases import HIDDENS, TOLERANCES, assert_agree, inputs, of_kernels, of_reference

for i, num_losses in enumerate((1, 5, 16, 48, 49, 70)):
    for batch in (1, 65, 513):
        activation, reduction = ("identity" if i == 2 else "softplus"), ("mean", "none")[i % 2]
        network = CombinerNetwork(num_losses, HIDDENS[i % len(HIDDENS)], activation, main=0, reduction=reduction)
        given = inputs(network, batch, torch.float32)
        wanted = of_reference(network, *given)
        for dtype, tolerances in TOLERANCES.items():
            assert_agree(of_kernels(network, *(t.to(dtype) for t in given)), wanted, tolerances)
print(json.dumps([torch.backends.cpu.get_cpu_capability(), auxfast.build_info()["cpu_kernels_in_use"]]))
"""


@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_every_instruction_set_agrees_with_the_reference(limit):
    """The best one that this processor has is what all other tests run on. ATEN_CPU_CAPABILITY limits auxfast as it
    limits torch, so ask torch what the processor has below it."""
    places = [str(Path(auxfast.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", ".")]
    settings = {"ATEN_CPU_CAPABILITY": limit, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-W", "error", "-c", _ON_THIS_INSTRUCTION_SET]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_torch, in_use = json.loads(done.stdout)
    assert in_use == (of_torch.lower() if of_torch.lower() in auxfast.build_info()["cpu_kernels"] else "baseline")
