"""combiner_cuda.cu on the CPU, against the combiner's reference in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle, islice

import pytest
import torch
from ops.combiner_cases import TOLERANCES, assert_agree, inputs, name, normal, of_reference
from torch import Tensor

from auxfast.ops.network import TILE_SAMPLES, CombinerNetwork

from .kernels import MODE, call, in_any_order, network_numbers, unwritten

DOUBLE = torch.float64
UNTOUCHED = 12345.0  # what `saved` holds for samples beyond the batch


@dataclass(frozen=True)
class Case:
    network: CombinerNetwork
    batch: int
    dtype: torch.dtype = torch.float32
    saves: bool = True
    num_tangents: int = 1

    def __str__(self) -> str:
        saved = "saved" if self.saves else "not saved"
        return f"{self.batch}-{name(self.network)}-{str(self.dtype)[6:]}-{saved}-{self.num_tangents}"


def of_kernels(case: Case, losses: Tensor, phi: Tensor, grad: Tensor, tangents: Tensor) -> dict[str, Tensor]:
    """The results of all passes. tangents: (num_tangents, batch, num_losses)"""
    network, batch, dtype = case.network, case.batch, case.dtype
    units = sum(network.hidden)
    saved = torch.full((network.saved_size(batch),), UNTOUCHED, dtype=dtype) if case.saves else None
    sizes, numbers = [batch, network.num_losses, len(network.hidden)], network_numbers(network.packed)
    given = dtype == torch.float64, sizes, numbers, losses, phi, saved
    value, weights = unwritten(grad.numel(), dtype=dtype), unwritten(*losses.shape, dtype=dtype)
    call("combiner_forward", *given, value, weights)
    if saved is not None and batch % TILE_SAMPLES:
        beyond = saved.view(-1, 3 * units, TILE_SAMPLES)[-1, :, batch % TILE_SAMPLES :]
        assert (beyond == UNTOUCHED).all()

    grad_phi = unwritten(*phi.shape, dtype=dtype)
    call("combiner_backward_phi", *given, grad, grad_phi)

    without_phi, hessian = (unwritten(*tangents.shape, dtype=dtype) for _ in range(2))
    mixed = unwritten(len(tangents), *phi.shape, dtype=dtype)
    call("combiner_second_order", *given, grad, len(tangents), tangents, without_phi, None)
    call("combiner_second_order", *given, grad, len(tangents), tangents, hessian, mixed)
    return {
        "value": value.view(grad.shape),
        "weights": grad.view(-1, 1) * weights,
        "phi": grad_phi,
        "hessian product without phi": without_phi,
        "hessian product": hessian,
        "mixed product": mixed,
    }


def assert_case(case: Case, orders: int = 3) -> None:
    losses, phi, grad, tangent = inputs(case.network, case.batch, case.dtype)
    factors = 0.5 + normal(case.num_tangents, 2, seed=60).abs()
    two = torch.stack([tangent.double(), 0.5 + normal(*tangent.shape, seed=61).abs()])
    tangents = torch.einsum("vi,ibk->vbk", factors, two).to(case.dtype)
    actual = in_any_order(lambda: of_kernels(case, losses, phi, grad, tangents), orders)

    first, second = (of_reference(case.network, losses, phi, grad, t) for t in two)
    wanted = {key: first[key] for key in ("value", "weights", "phi")}
    for key in ("hessian product", "mixed product"):
        wanted[key] = torch.einsum("vi,i...->v...", factors, torch.stack([first[key], second[key]]))
    wanted["hessian product without phi"] = wanted["hessian product"]
    assert_agree(actual, wanted, TOLERANCES[case.dtype])


# Every value of every axis, in chance combinations.
COUNT = 48
AXES = {
    "batch": [1, 2, 7, 8, 9, 31, 63, 64, 65, 127, 200],
    "num_losses": [1, 2, 3, 4, 11, 31, 32, 33, 40, 101, 313],
    "hidden": [(1,), (64,), (10,) * 5, (7, 3, 64), (64, 64), (13, 1, 6), (2, 3, 4, 5), (5,) * 6, (9,) * 7, (5,) * 8],
    "activation": ["softplus", "softplus", "identity"],
    "bias": [True, False],
    "main": [None, "first", "last"],
    "reduction": ["mean", "sum", "none"],
    "dtype": [torch.float32, torch.float64],
    "saves": [True, False],
    "num_tangents": [1, 2, 3],
}


def _cases() -> list[Case]:
    columns = []
    for seed, values in enumerate(AXES.values()):
        column = list(islice(cycle(values), COUNT))
        random.Random(seed).shuffle(column)
        columns.append(column)
    cases = []
    for batch, num_losses, hidden, activation, bias, main, reduction, *rest in zip(*columns, strict=True):
        main = {None: None, "first": 0, "last": num_losses - 1}[main]
        cases.append(Case(CombinerNetwork(num_losses, hidden, activation, bias, main, reduction), batch, *rest))
    return cases


# What make_launch in combiner_cuda.cu makes special. (64, 1) * 4 has many units and few parameters.
SPECIAL = {
    "several tiles a block, 32 samples a tile": Case(CombinerNetwork(2, (2,), main=0), 33000, DOUBLE),
    "several tiles a block, not saved": Case(
        CombinerNetwork(2, (2,), bias=False, reduction="sum"), 33000, DOUBLE, saves=False
    ),
    "16 samples a tile": Case(CombinerNetwork(3, (4, 3), reduction="none"), 2049, DOUBLE, num_tangents=2),
    "tiles shrink for phi": Case(CombinerNetwork(3, (64, 1, 20), reduction="none"), 4100),
    "tiles in the workspace": Case(CombinerNetwork(5, (64, 1) * 4, main=1), 70, DOUBLE, saves=False, num_tangents=2),
    "tiles in the workspace, wide": Case(CombinerNetwork(40, (64, 1) * 4, main=1), 70, DOUBLE),
    "several of these, and of tangents, a block": Case(CombinerNetwork(2, (1, 64) * 4), 10_500, DOUBLE, True, 2),
    "the same, wide": Case(CombinerNetwork(33, (1, 64) * 4), 5300, DOUBLE, False, 2),
    "several tangents a block": Case(CombinerNetwork(2, (2,), main=1), 64, DOUBLE, num_tangents=130),
    "several tangents a block, wide": Case(CombinerNetwork(34, (1,), main=1), 64, saves=False, num_tangents=130),
    "sums for phi limit the blocks": Case(CombinerNetwork(520, (64,), main=7), 2048, DOUBLE),
}

# What make_small_launch makes special, for networks of at most 32 losses and units a layer in float32. Beyond 16384
# samples a lane has one to itself, but for phi.
SMALL = {
    "four lanes a sample": Case(CombinerNetwork(11, (10,) * 5, main=2), 70, saves=False, num_tangents=2),
    "four lanes a sample, one panel of losses too few": Case(CombinerNetwork(17, (16, 15), main=16), 33),
    "eight lanes a sample": Case(CombinerNetwork(31, (32, 17), main=0, reduction="none"), 45, num_tangents=2),
    "64 threads a block for phi": Case(CombinerNetwork(8, (16,) * 5, "identity"), 45, saves=False),
    "small without phi alone": Case(CombinerNetwork(4, (14,) * 8, main=1), 66),
    "several tangents a block": Case(CombinerNetwork(2, (2,), main=1), 64, num_tangents=1100),
    "several tiles a block for phi, 4 units a lane": Case(CombinerNetwork(2, (2,), main=0), 32_900, saves=False),
    "10 units a lane": Case(CombinerNetwork(11, (10, 7), main=1, reduction="none"), 16_400, num_tangents=2),
    "several tiles a block, 16 units a lane": Case(CombinerNetwork(3, (16,) * 6, bias=False), 33_000, saves=False),
}


def is_affordable(case: Case) -> bool:
    """ThreadSanitizer takes some 20 us a barrier and thread: no thousand blocks, and few of the sums for phi."""
    few_blocks = case.batch < 16_000 and case.num_tangents < 100
    return MODE != "tsan" or (few_blocks and case.network.num_parameters * case.num_tangents < 1500)


@pytest.mark.parametrize("case", [case for case in _cases() if is_affordable(case)], ids=str)
def test_passes_are_the_reference(case):
    assert_case(case)


@pytest.mark.parametrize("launch", [launch for launch, case in SPECIAL.items() if is_affordable(case)])
def test_passes_are_the_reference_for_any_launch(launch):
    assert_case(SPECIAL[launch], orders=2)


@pytest.mark.parametrize("launch", [launch for launch, case in SMALL.items() if is_affordable(case)])
def test_passes_are_the_reference_for_any_launch_of_a_small_network(launch):
    assert_case(SMALL[launch], orders=2 if SMALL[launch].batch < 10_000 else 1)
