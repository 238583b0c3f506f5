"""loss_image_cuda.cu on the CPU, against the loss image's reference in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle, islice

import pytest
import torch
from ops.combiner_cases import assert_agree, derivatives, normal
from ops.loss_image_cases import TOLERANCES, inputs, name
from torch import Tensor

from auxfast.ops.loss_image import loss_image_reference
from auxfast.ops.network import LossImageNetwork

from .kernels import MODE, call, device, in_any_order, network_numbers, unwritten

DOUBLE = torch.float64


@dataclass(frozen=True)
class Case:
    network: LossImageNetwork
    batch: int
    image: tuple[int, int]
    dtype: torch.dtype = torch.float32
    num_tangents: int = 1
    device: int = 0

    def __str__(self) -> str:
        height, width = self.image
        return f"{self.batch}-{height}x{width}-{name(self.network)}-{str(self.dtype)[6:]}-{self.num_tangents}"


def of_kernels(
    case: Case, losses: Tensor, phi: Tensor, grad: Tensor, tangents: Tensor, main_weights: Tensor | None
) -> dict[str, Tensor]:
    """The results of all passes. tangents: (num_tangents, batch, num_losses, H, W)"""
    dtype, depth = case.dtype, len(case.network.channels)
    sizes, network = [*losses.shape, depth], network_numbers(case.network.packed)
    value_alone = unwritten(grad.numel(), dtype=dtype)
    call("loss_image_forward", dtype == DOUBLE, sizes, network, losses, phi, None, main_weights, value_alone, None)
    results = []
    for saved in (None, unwritten(case.network.saved_size(*losses.shape), dtype=dtype)):
        given = dtype == DOUBLE, sizes, network, losses, phi, saved
        value, weights = unwritten(grad.numel(), dtype=dtype), unwritten(*losses.shape, dtype=dtype)
        call("loss_image_forward", *given, main_weights, value, weights)
        assert saved is not None or torch.equal(value, value_alone)

        grad_phi = unwritten(*phi.shape, dtype=dtype)
        call("loss_image_backward_phi", *given, grad, grad_phi)

        without_phi, hessian = (unwritten(*tangents.shape, dtype=dtype) for _ in range(2))
        mixed = unwritten(len(tangents), *phi.shape, dtype=dtype)
        call("loss_image_second_order", *given, grad, len(tangents), tangents, without_phi, None)
        call("loss_image_second_order", *given, grad, len(tangents), tangents, hessian, mixed)
        assert torch.equal(hessian, without_phi)
        results.append((value, weights, grad_phi, hessian, mixed))
    for both in zip(*results, strict=True):  # with less memory the sums are of other chunks
        torch.testing.assert_close(*both, rtol=1e-11 if case.device else 0, atol=1e-13 if case.device else 0)
    value, weights, grad_phi, hessian, mixed = results[0]
    return {
        "value": value.view(grad.shape),
        "weights": grad.view(-1, 1, 1, 1) * weights,
        "phi": grad_phi,
        "hessian product": hessian,
        "mixed product": mixed,
    }


def assert_case(case: Case, orders: int) -> None:
    network = case.network
    losses, phi, grad, tangent = inputs(network, case.batch, *case.image, case.dtype)
    main_weights = None
    if network.main_reduction == "valid_mean":
        main_weights = normal(case.batch, seed=62).abs().to(case.dtype)
    factors = 0.5 + normal(case.num_tangents, 2, seed=60).abs()
    two = torch.stack([tangent.double(), 0.5 + normal(*tangent.shape, seed=61).abs()])
    tangents = torch.einsum("vi,ibkyx->vbkyx", factors, two).to(case.dtype)
    with device(case.device):
        actual = in_any_order(lambda: of_kernels(case, losses, phi, grad, tangents, main_weights), orders)

    given = [t.double() for t in (losses, phi, grad)]
    weights = None if main_weights is None else main_weights.double()
    first, second = (derivatives(lambda x, phi: loss_image_reference(x, phi, network, weights), *given, t) for t in two)
    wanted = {key: first[key] for key in ("value", "weights", "phi")}
    for key in ("hessian product", "mixed product"):
        wanted[key] = torch.einsum("vi,i...->v...", factors, torch.stack([first[key], second[key]]))
    assert_agree(actual, wanted, TOLERANCES[case.dtype])


# Every value of every axis, in chance combinations. Sizes around a pool and around a tile of 32 pixels.
COUNT = 28
AXES = {
    "batch": [1, 2, 3, 5],
    "image": [(1, 1), (1, 2), (2, 1), (1, 37), (67, 1), (2, 2), (3, 3), (5, 7), (16, 8), (31, 33), (33, 5), (34, 64)],
    "num_losses": [1, 2, 3, 4, 5, 16, 17],
    "channels": [(1,), (3,), (4, 5), (8, 16), (2, 5, 3, 4), (1, 9, 2)],
    "activation": ["softplus", "softplus", "identity"],
    "main": [None, "first", "last"],
    "main_reduction": ["mean", "sum", "valid_mean"],
    "reduction": ["mean", "sum", "none"],
    "dtype": [torch.float32, DOUBLE],
    "num_tangents": [1, 2, 3],
}


def _cases() -> list[Case]:
    columns = []
    for seed, values in enumerate(AXES.values()):
        column = list(islice(cycle(values), COUNT))
        random.Random(seed).shuffle(column)
        columns.append(column)
    cases = []
    for batch, image, num_losses, channels, activation, main, main_reduction, reduction, *rest in zip(
        *columns, strict=True
    ):
        main = {None: None, "first": 0, "last": num_losses - 1}[main]
        network = LossImageNetwork(num_losses, channels, activation, main, main_reduction, reduction)
        cases.append(Case(network, batch, image, *rest))
    return cases


# What loss_image_cuda_chunks.cuh makes special: an image that needs more than its share of the device's memory is cut
# into bands, a batch that needs more into chunks of images; few blocks share the gradient in the weights of many
# channels, and several the sums of a large plane; where there are enough blocks, a thread has many outputs. Device 10
# lends 64 KiB, device 7 512 KiB.
SPECIAL = {
    "bands": Case(LossImageNetwork(1, (4,), main=0), 1, (67, 66), DOUBLE, device=10),
    "bands of second order, depth 3": Case(
        LossImageNetwork(1, (4, 1, 2), main=0, main_reduction="sum"), 1, (205, 66), DOUBLE, 2, device=10
    ),
    "the same, depth 4": Case(
        LossImageNetwork(1, (4, 1, 2, 1), main=0, reduction="sum"), 1, (270, 66), DOUBLE, device=10
    ),
    "chunks of images": Case(LossImageNetwork(1, (4, 1), main=0, reduction="none"), 14, (33, 34), DOUBLE, device=7),
    "most channels": Case(LossImageNetwork(64, (64, 64), main=63), 1, (5, 6), DOUBLE),
    "many blocks, with many outputs a thread": Case(LossImageNetwork(1, (5, 6), main=0), 256, (4, 4)),
    "sums in parts": Case(LossImageNetwork(2, (1,), main=1), 2, (211, 201)),
}


CASES = {str(case): case for case in _cases()} | SPECIAL


def is_affordable(case: Case) -> bool:
    """ThreadSanitizer takes some 20 us a barrier and thread."""
    height, width = case.image
    tiles = case.batch * (height // 32 + 1) * (width // 32 + 1)
    return MODE != "tsan" or tiles * max(case.network.channels) * case.network.num_losses <= 64


@pytest.mark.slow
@pytest.mark.parametrize("which", [which for which, case in CASES.items() if is_affordable(case)])
def test_passes_are_the_reference(which):
    assert_case(CASES[which], orders=1 if which in SPECIAL else 3)
