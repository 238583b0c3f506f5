"""The kernels at sizes and offsets beyond 2^31. Only the ends of each grid run, and only the pages that they touch
exist: numbers that a 32-bit index would look for elsewhere are missing in the results, or the process crashes."""

from __future__ import annotations

import pytest
import torch
from ops import combiner_cases, loss_image_cases
from ops.combiner_cases import assert_agree, normal
from ops.krylov_cases import DiagonalSystems, assert_same_solves, coefficients_for, rows
from torch import Tensor

from auxfast.ops.krylov import (
    WHOLE,
    conjugate_gradient_step_reference_,
    linear_combination_reference_,
    minres_step_reference_,
    row_dots_reference,
)
from auxfast.ops.network import TILE_SAMPLES, CombinerNetwork, LossImageNetwork
from auxfast.ops.neumann import CUDA_SUMS, neumann_step_reference_

from .kernels import MODE, call, network_numbers, sparse, unwritten, window

pytestmark = pytest.mark.skipif(
    MODE == "tsan", reason="ThreadSanitizer looks for races, and none of them depends on how large an index is"
)

PLAIN_ONLY = pytest.mark.skipif(MODE != "plain", reason="a sanitizer takes too long over hundreds of chunks and tiles")

SIGNED, UNSIGNED = 2**31, 2**32  # what an index of 32 bits counts up to


# ------------------------------------------------------------------------------------------------------------- Neumann


DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])


@DEVICES
def test_neumann_step_behind_four_billion_elements(device):
    sizes, before = [130, UNSIGNED + 12_345], 2  # tiles of 128 elements
    tiles = before + -(-sizes[1] // 128)
    blocks = {"cuda": CUDA_SUMS, "cpu": -(-tiles // 256)}[device]
    first, last = {  # tiles of the first and the last block; on the CPU, chunk
        "cuda": (-(-tiles // blocks), tiles // blocks),
        "cpu": (256, tiles - (blocks - 1) * 256),
    }[device]
    first, last = (first - before) * 128, sizes[1] - (tiles - last - before) * 128
    huge = [[sparse(size) for size in sizes] for _ in range(3)]  # v, hv, p
    compact = []
    for i, tensors in enumerate(huge):
        some = normal(130, seed=i, dtype=torch.float32)
        ends = [some, *(some.repeat(-(-size // 130))[:size] for size in (first, last))]
        for part, end in zip(parts(tensors, first, last), ends, strict=True):
            part.copy_(end)
        compact.append([end.double() for end in ends])
    sums = torch.zeros(CUDA_SUMS, dtype=torch.float64)
    with window(1, device):
        call("neumann_step", False, 2, *huge, sizes, 0.3, sums)
    wanted = neumann_step_reference_(*compact, 0.3)
    for tensors, ends in zip((huge[0], huge[2]), (compact[0], compact[2]), strict=True):
        for part, end in zip(parts(tensors, first, last), ends, strict=True):
            torch.testing.assert_close(part.double(), end, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums.sum(), wanted, rtol=1e-6, atol=0)


def parts(tensors: list[Tensor], first: int, last: int) -> list[Tensor]:
    """What the first and the last block have of two tensors: all of the small one, and the ends of the other."""
    return [tensors[0], tensors[1][:first], tensors[1][-last:]]


# -------------------------------------------------------------------------------------------------------------- Krylov


def spread(compact: Tensor) -> Tensor:
    """Two rows of N elements, of which the first begins with the first row of `compact`, and the other ends with the
    second one."""
    huge = sparse(2, N, dtype=compact.dtype)
    ends(huge, compact.shape[1]).copy_(compact)
    return huge


def ends(huge: Tensor, count: int) -> Tensor:
    """The view of what `spread` filled with rows of `count` elements."""
    return huge.as_strided((2, count), (huge.numel() - count, 1))


N = UNSIGNED + 32_768  # so that the second row begins, and both end, beyond; whole chunks on each device
CHUNKS = {"cuda": 2048, "cpu": 32_768}


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_combination_of_rows_of_four_billion(dtype, device):
    out, *terms = rows((2, CHUNKS[device]), 3, dtype, "cpu")
    coefficients = coefficients_for(out, 2)
    huge, squares = spread(out), torch.empty(2, dtype=torch.float64)
    with window(1, device):
        call("linear_combination", dtype == torch.float64, 2, N, huge, 2, [spread(t) for t in terms], coefficients,
             squares)  # fmt: skip
    wanted = out.double()
    wanted_squares = linear_combination_reference_(wanted, [term.double() for term in terms], coefficients)
    torch.testing.assert_close(ends(huge, CHUNKS[device]).double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares, wanted_squares, rtol=1e-5, atol=0)


@DEVICES
def test_dots_of_rows_of_four_billion(device):
    a, b = rows((2, CHUNKS[device]), 2, torch.float32, "cpu")
    dots = torch.empty(2, dtype=torch.float64)
    with window(1, device):
        call("row_dots", False, 2, N, spread(a), spread(b), dots)
    torch.testing.assert_close(dots, row_dots_reference(a, b), rtol=1e-12, atol=1e-10)


def huge_step(device: str, function: str, *arguments: Tensor | int | None) -> None:
    *vectors, numbers, part = arguments if isinstance(arguments[-1], int) else (*arguments, WHOLE)
    huge = {id(vector): spread(vector) for vector in vectors if vector is not None}
    with window(1, device):
        call(function, False, 2, N, *(None if v is None else huge[id(v)] for v in vectors), numbers, part)
    for vector in vectors:
        if vector is not None:
            vector.copy_(ends(huge[id(vector)], vector.shape[1]))


@pytest.mark.slow
@DEVICES
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
def test_steps_on_rows_of_four_billion(preconditioned, device):
    systems = DiagonalSystems.of((2, CHUNKS[device]), torch.float32, "cpu")
    systems.diagonal = systems.diagonal.abs()  # both rows go on
    for solve, name, reference_ in (
        (systems.conjugate_gradients, "conjugate_gradient_step", conjugate_gradient_step_reference_),
        (systems.minres, "minres_step", minres_step_reference_),
    ):
        results = solve(lambda *arguments, name=name: huge_step(device, name, *arguments), 1, preconditioned)
        assert_same_solves(results, solve(reference_, 1, preconditioned), torch.float32)


@DEVICES
def test_as_many_rows_as_a_grid_has_blocks(device):
    count, n = SIGNED - 1, 3
    compact = rows((2, n), 3, torch.float32, "cpu")  # out and two terms
    coefficients = coefficients_for(compact[0], 2)
    out, *terms = huge = [sparse(count, n) for _ in compact]
    huge_coefficients = sparse(3, count, dtype=torch.float64)
    dots, squares = (sparse(count, dtype=torch.float64) for _ in range(2))
    for at, row in ((0, 0), (-1, 1)):
        huge_coefficients[:, at] = coefficients[:, row]
        for tensor, given in zip(huge, compact, strict=True):
            tensor[at] = given[row]
    with window(1, device):
        call("row_dots", False, count, n, *terms, dots)
        call("linear_combination", False, count, n, out, 2, terms, huge_coefficients, squares)
    torch.testing.assert_close(dots[[0, -1]], row_dots_reference(*compact[1:]))
    wanted = linear_combination_reference_(compact[0], compact[1:], coefficients)
    torch.testing.assert_close(out[[0, -1]], compact[0])
    torch.testing.assert_close(squares[[0, -1]], wanted)


@pytest.mark.parametrize("count", [SIGNED, UNSIGNED + 5])  # 2^32 + 5 is 5, in 32 bits
def test_more_rows_than_a_grid_has_blocks_are_refused(count):
    nothing = torch.zeros(1)
    for function, arguments in (
        ("linear_combination", (nothing, 1, [nothing], nothing, nothing)),
        ("row_dots", (nothing,) * 3),
        ("conjugate_gradient_step", (*(nothing,) * 7, WHOLE)),
        ("minres_step", (*(nothing,) * 10, WHOLE)),
    ):
        with pytest.raises(RuntimeError, match=r"more than 2\^31 - 1 blocks, of which each row takes one"):
            call(function, False, count, 1, *arguments)


# ------------------------------------------------------------------------------------------------------------ combiner

# With 1024 blocks, each of which has every 1024th tile of 32 samples, the last tile is the last block's. The first
# network runs with lanes along its losses, the others stage them, and their units take `saved` beyond 2^31 too. The last
# one is small: four tiles of 128 samples a block, but for phi.
COMBINERS = {
    "losses": (CombinerNetwork(4000, (2,), main=3999, reduction="none"), 33 * 1024 * 32 - 5, False, 1),
    "saved": (CombinerNetwork(32, (33,), main=31, reduction="none"), 2050 * 1024 * 32 - 5, True, 2),
    "small": (CombinerNetwork(32, (11,), main=31, reduction="none"), 2050 * 1024 * 32 - 5, True, 2),
}


@PLAIN_ONLY
@pytest.mark.slow
@pytest.mark.parametrize(("network", "batch", "saves", "num_tangents"), COMBINERS.values(), ids=COMBINERS.keys())
def test_combiner_behind_billions_of_numbers(network, batch, saves, num_tangents):
    first, last, num_losses = 32, 27, network.num_losses
    compact = combiner_cases.inputs(network, first + last, torch.float32)
    tangents = torch.stack([compact[3] + i for i in range(num_tangents)])
    losses, phi, grad = sparse(batch, num_losses), compact[1], sparse(batch)
    huge_tangents = sparse(num_tangents, batch, num_losses)

    def of(huge: Tensor) -> Tensor:
        """What the first and the last tile have of a tensor (batch, ...)."""
        return torch.cat([huge[:first], huge[-last:]])

    for huge, given in ((losses, compact[0]), (grad, compact[2]), *zip(huge_tangents, tangents, strict=True)):
        huge[:first], huge[-last:] = given[:first], given[first:]

    saved = sparse(network.saved_size(batch)) if saves else None
    given = False, [batch, num_losses, 1], network_numbers(network.packed), losses, phi, saved
    value, weights, hessian = sparse(batch), sparse(batch, num_losses), sparse(num_tangents, batch, num_losses)
    grad_phi, mixed = (unwritten(*shape, *network.phi_shape, dtype=torch.float32) for shape in ((), (num_tangents,)))
    with window(1):
        call("combiner_forward", *given, value, weights)
        if saved is not None:  # later passes would find again what is in a wrong place
            tiles = saved.view(-1, 3 * network.hidden[0], TILE_SAMPLES)
            assert tiles[0, :, :first].all()
            assert tiles[-1, :, 32 : 32 + last].all()
        call("combiner_backward_phi", *given, grad, grad_phi)
        call("combiner_second_order", *given, grad, num_tangents, huge_tangents, hessian, mixed)
    for i, tangent in enumerate(tangents):
        wanted = combiner_cases.of_reference(network, *compact[:3], tangent)
        actual = {
            "value": of(value),
            "weights": compact[2].view(-1, 1) * of(weights),
            "phi": grad_phi,
            "hessian product": of(hessian[i]),
            "mixed product": mixed[i],
        }
        for key in ("phi", "mixed product"):  # the sums' last launch has ends, too
            written = ~actual[key].isnan()
            assert written[0 if i == 0 else -1]
            actual[key], wanted[key] = actual[key][written], wanted[key][written]
        assert_agree(actual, wanted, combiner_cases.TOLERANCES[torch.float32])


def test_more_losses_than_a_tile_can_index_are_refused():
    network, nothing = CombinerNetwork(2**26 + 1, (1,)), torch.zeros(1)
    given = False, [1, network.num_losses, 1], network_numbers(network.packed), nothing, nothing, None
    with pytest.raises(RuntimeError, match=r"more than 2\^26 losses"):
        call("combiner_forward", *given, nothing, nothing)


# ---------------------------------------------------------------------------------------------------------- loss image


def images_of(network: LossImageNetwork, num_tangents: int) -> int:
    """Images of a tile each, more than 2^31 pixels or, where the work allows it, 2^32: whole chunks, of 64 MiB in the
    workspace, and eight images more, which are so few that each has a block of its own in the sums of its chunk."""
    z, h = (sum(side**2 >> 2 * layer for layer in range(len(network.channels))) for side in (32, 16))
    images = (64 << 20) // 4 // (3 * z + 2 * h if num_tangents else z + h)
    pixels = SIGNED if len(network.channels) == 1 else UNSIGNED
    return (pixels // (64 * 32 * 32) // images + 1) * images + 8


# A second convolution has its sums for phi where the first one had its own, and those of the blocks that do not run are
# still there: so phi's gradients are those of a network of one.
@PLAIN_ONLY
@pytest.mark.slow
@pytest.mark.parametrize(("channels", "num_tangents"), [((1,), 0), ((1,), 1), ((1, 1), 0), ((1, 1), 2)], ids=str)
def test_images_of_billions_of_pixels(channels, num_tangents):
    network = LossImageNetwork(63, channels, main=62, reduction="none")
    batch = images_of(network, num_tangents)
    shape = batch, 63, 32, 32
    compact = loss_image_cases.inputs(network, 2, 32, 32, torch.float32)
    wanted = loss_image_cases.of_reference(network, *compact)
    losses, grad = sparse(*shape), sparse(batch)
    losses[[0, -1]], grad[[0, -1]] = compact[0], compact[2]
    given = False, [*shape, len(channels)], network_numbers(network.packed), losses, compact[1], None
    with_phi = len(channels) == 1
    of_losses, of_phi = sparse(max(1, num_tangents), *shape), torch.zeros(max(1, num_tangents), *network.phi_shape)
    with window(1):
        if num_tangents:
            tangents = sparse(num_tangents, *shape)
            tangents[-1][[0, -1]] = compact[3]
            call(
                "loss_image_second_order", *given, grad, num_tangents, tangents, of_losses, of_phi if with_phi else None
            )
        elif with_phi:
            call("loss_image_backward_phi", *given, grad, of_phi)
        else:
            value = sparse(batch)
            call("loss_image_forward", *given, None, value, of_losses)
            assert_agree({"value": value[[0, -1]]}, wanted, loss_image_cases.TOLERANCES[torch.float32])
    names = ("hessian product", "mixed product") if num_tangents else ("weights", "phi")
    if with_phi:  # what the first and the last block add up, of the first and the last loss, and the output weight
        known = torch.tensor([*range(8), *range(560, *network.phi_shape)])
        actual, wanted_entries = of_phi[-1][known], wanted[names[1]][known]
    else:  # the first and the last panel of four losses
        known = torch.tensor([0, 1, 2, 3, 60, 61, 62])
        actual, wanted_entries = of_losses[-1][[0, -1]][:, known], wanted[names[0]][:, known]
        if not num_tangents:
            actual *= compact[2].view(-1, 1, 1, 1)
    assert_agree(
        {names[with_phi]: actual}, {names[with_phi]: wanted_entries}, loss_image_cases.TOLERANCES[torch.float32]
    )


@PLAIN_ONLY
@pytest.mark.slow
def test_image_of_two_billion_pixels():
    """The image goes in bands, of which the last two tiles run; the second channel lies beyond 2^31."""
    network, height = LossImageNetwork(2, (1,), reduction="none"), 2**26 + 64
    losses, weights, value = sparse(1, 2, height, 32), sparse(1, 2, height, 32), torch.empty(1)
    compact = loss_image_cases.inputs(network, 1, 64, 32, torch.float32)
    losses[:, :, -64:] = compact[0]
    with window(2):
        call("loss_image_forward", False, [*losses.shape, 1], network_numbers(network.packed), losses, compact[1],
             None, None, value, weights)  # fmt: skip
    wanted = loss_image_cases.of_reference(network, *compact)["weights"] / compact[2].double()
    known = slice(-32, None)  # rows that do not depend on those of other tiles
    actual = weights[:, :, known] * (height / 64)  # the output is the mean over positions
    assert_agree({"weights": actual}, {"weights": wanted[:, :, known]}, loss_image_cases.TOLERANCES[torch.float32])
