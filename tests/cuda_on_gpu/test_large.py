"""The CUDA kernels at the sizes where work is divided in another way, and where indices need more than 32 bits."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ops import loss_image_cases
from ops.combiner_cases import TOLERANCES, assert_agree, inputs, normal, of_kernels, of_reference, relative_error
from ops.krylov_cases import DiagonalSystems, assert_same_solves, coefficients_for, rows
from ops.test_neumann import STEP, assert_step, lists, neumann_step_
from torch import Tensor

from auxfast.ops.krylov import (
    conjugate_gradient_step_,
    conjugate_gradient_step_reference_,
    linear_combination_,
    linear_combination_reference_,
    minres_step_,
    minres_step_reference_,
    row_dots,
    row_dots_reference,
)
from auxfast.ops.network import CombinerNetwork, LossImageNetwork
from auxfast.ops.neumann import neumann_step_reference_

pytestmark = pytest.mark.cuda

FIVE = (10,) * 5
SIZES = {
    "tiles of 8": (2048, CombinerNetwork(4, FIVE, main=0)),
    "tiles of 16": (2049, CombinerNetwork(4, FIVE, main=0)),
    "tiles of 32": (4097, CombinerNetwork(4, FIVE, main=0, reduction="none")),
    "several tiles a block": (40_001, CombinerNetwork(3, (4, 2), main=2, reduction="sum")),
    "a lane a sample, 10 units": (16_400, CombinerNetwork(11, FIVE, main=0)),
    "a lane a sample, 16 units": (16_400, CombinerNetwork(32, (16, 12), bias=False, reduction="none")),
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
    "chunks of images": ((20, 288, 384), LossImageNetwork(3, (64, 8), main=0)),
    "bands": ((1, 1031, 1027), LossImageNetwork(3, (64, 8, 4), main=2, reduction="none")),
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


# Beyond 2^31 numbers: zeros but for the ends, so that sums are those of the ends alone and the reference needs no more.
END, NUMBERS = 2048, 2**31 + 3 * 2048
DEVICE = "cuda"
LEFT_TO_OTHERS = 8  # GiB, for the small tests that other processes may run on the GPU


@pytest.fixture
def skip_unless_free() -> Iterator[Callable[[int], None]]:
    """The function that skips a test where the GiB it takes are not free. Of all processes on the machine one is in
    such a test at a time, and leaves the memory to the next."""

    def skip(gib: int) -> None:
        free = torch.cuda.mem_get_info()[0] >> 30
        if free < gib + LEFT_TO_OTHERS:
            pytest.skip(f"takes {gib} GiB of the GPU's memory and leaves {LEFT_TO_OTHERS}, and {free} are free")

    with Path(tempfile.gettempdir(), f"auxfast-large-tests-{os.getuid()}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        torch.cuda.empty_cache()
        yield skip
        torch.cuda.empty_cache()


def spread(compact: Tensor) -> Tensor:
    """A row (1, NUMBERS) that begins and ends with the halves of `compact`, (1, 2 * END)."""
    huge = torch.zeros(1, NUMBERS, dtype=compact.dtype, device=DEVICE)
    huge[:, :END], huge[:, -END:] = compact[:, :END], compact[:, END:]
    return huge


def ends(huge: Tensor) -> Tensor:
    return torch.cat([huge[:, :END], huge[:, -END:]], 1).cpu()


def test_neumann_step_behind_two_billion_numbers(skip_unless_free):
    skip_unless_free(45)
    compact = [normal(1, 2 * END, seed=i, dtype=torch.float32) for i in range(3)]
    v, hv, p = map(spread, compact)
    squares = neumann_step_([v], [hv], [p], STEP)
    wanted_v, wanted_hv, wanted_p = ([tensor.double()] for tensor in compact)
    wanted = neumann_step_reference_(wanted_v, wanted_hv, wanted_p, STEP)
    torch.testing.assert_close(ends(v).double(), wanted_v[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ends(p).double(), wanted_p[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares.cpu(), wanted, rtol=1e-6, atol=0)


def test_krylov_rows_of_two_billion_numbers(skip_unless_free):
    skip_unless_free(27)
    out, *terms = rows((1, 2 * END), 3, torch.float32, "cpu")
    coefficients = coefficients_for(out, 2)
    huge, huge_terms = spread(out), [spread(term) for term in terms]
    dots = row_dots(*huge_terms)
    torch.testing.assert_close(dots.cpu(), row_dots_reference(*terms), rtol=1e-12, atol=1e-10)
    squares = linear_combination_(huge, huge_terms, coefficients.to(DEVICE))
    wanted = out.double()
    wanted_squares = linear_combination_reference_(wanted, [term.double() for term in terms], coefficients)
    torch.testing.assert_close(ends(huge).double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares.cpu(), wanted_squares, rtol=1e-5, atol=0)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize(
    ("solver", "step_", "reference_", "gib"),
    [
        ("conjugate_gradients", conjugate_gradient_step_, conjugate_gradient_step_reference_, 50),
        ("minres", minres_step_, minres_step_reference_, 105),
    ],
    ids=["conjugate gradients", "minres"],
)
def test_steps_on_rows_of_two_billion_numbers(solver, step_, reference_, gib, preconditioned, skip_unless_free):
    skip_unless_free(gib)

    def step(*arguments: Tensor | int | None) -> None:
        """A step on the GPU, of vectors on the CPU."""
        part = arguments[-1:] if isinstance(arguments[-1], int) else ()
        *vectors, numbers = arguments[: len(arguments) - len(part)]
        on_gpu = {id(vector): spread(vector) for vector in vectors if vector is not None}
        numbers_on_gpu = numbers.to(DEVICE)
        step_(*(None if vector is None else on_gpu[id(vector)] for vector in vectors), numbers_on_gpu, *part)
        numbers.copy_(numbers_on_gpu)
        for vector in vectors:
            if vector is not None:
                vector.copy_(ends(on_gpu[id(vector)]))

    systems = DiagonalSystems.of((1, 2 * END), torch.float32, "cpu")
    solve = getattr(systems, solver)
    assert_same_solves(solve(step, 1, preconditioned), solve(reference_, 1, preconditioned), torch.float32)


def test_combiner_on_two_billion_losses(skip_unless_free):
    """The gradient and the tangent are those of the first and the last samples alone."""
    skip_unless_free(45)
    network, count = CombinerNetwork(32, (5,), main=31, reduction="none"), 64
    batch = NUMBERS // 32
    compact = inputs(network, 2 * count, torch.float32)
    given = compact[0], compact[2], compact[3]
    losses, grad, tangent = huge = [torch.zeros(batch, *tensor.shape[1:], device=DEVICE) for tensor in given]
    for tensor, some in zip(huge, given, strict=True):
        tensor[:count], tensor[-count:] = some[:count], some[count:]
    phi = compact[1].to(DEVICE)
    nothing, packed = losses.new_empty(0), network.packed
    value, weights, _ = torch.ops.auxfast.combiner_forward(losses, phi, packed, False)
    grad_phi = torch.ops.auxfast.combiner_backward_phi(grad, losses, phi, nothing, packed)
    hessian, mixed = torch.ops.auxfast.combiner_second_order(tangent, grad, losses, phi, nothing, packed)
    wanted = of_reference(network, *compact)

    def of(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:count], tensor[-count:]]).cpu()

    actual = {
        "value": of(value),
        "weights": compact[2].view(-1, 1) * of(weights),
        "phi": grad_phi.cpu(),
        "hessian product": of(hessian),
        "mixed product": mixed.cpu(),
    }
    assert_agree(actual, wanted, TOLERANCES[torch.float32])
