"""neumann_cuda.cu on the CPU, against the references in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auxfast.ops.neumann import (
    CUDA_SUMS,
    GREW,
    GUARDED_NUMBERS,
    OF_PRODUCT,
    SMALLEST,
    SQUARE,
    TILE_ELEMENTS,
    neumann_guarded_step_reference_,
    neumann_step_reference_,
)

from .kernels import MODE, call, in_any_order, launches, unwritten

STEP = 0.3
WARPS, SLOTS = 8, {"step": CUDA_SUMS, "guarded step": 132 * 6}  # of a block; blocks that an H200 has at once
MANY = {"step": 816, "guarded step": 680}  # tensors that 32 KB of arguments tell of
SIZES = {
    "one": [1],
    "around a tile": [127, 128, 129],
    "around a block": [1023, 1, 1025],
    "prime": [10007, 7, 1009],
    "more tensors than 4 KB tell of": [1 + i % 13 for i in range(200)],
    "exactly what 4 KB tell of": [130] * 99,
    "small and large": [10] * 100 + [40009] + [3] * 50,
}
LARGE = {  # in one dtype, and one order of threads where there are most of them
    "more blocks than threads add up": [300_007],
    "more tiles than warps at once": [1_100_009, 5],
}
CASES = [(sizes, dtype) for sizes in SIZES.values() for dtype in (torch.float32, torch.float64)]
CASES += [(sizes, torch.float32) for sizes in LARGE.values()]
NAMES = [f"{name}, {dtype}" for name in SIZES for dtype in ("float32", "float64")] + [*LARGE]


def tensors(sizes: list[int], dtype: torch.dtype, shift: int = 0, lists: int = 3) -> tuple[list[Tensor], ...]:
    """Lists of tensors, `shift` elements off the alignment of an allocation."""
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(size + shift, generator=generator, dtype=torch.float64) for size in lists * sizes)
    shifted = [t.to(dtype)[shift:] for t in noise]
    return tuple(shifted[i * len(sizes) : (i + 1) * len(sizes)] for i in range(lists))


def clones(some: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in some]


def doubles(some: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in some]


def blocks(sizes: list[int], kernel: str) -> int:
    return min(-(-sum(-(-size // TILE_ELEMENTS) for size in sizes) // WARPS), SLOTS[kernel])


def step(v: list[Tensor], hv: list[Tensor], p: list[Tensor]) -> Tensor:
    """The squared norm; checks that what lies behind the sums of this list stays as it is."""
    sums, numel = unwritten(CUDA_SUMS, dtype=torch.float64), [tensor.numel() for tensor in v]
    call("neumann_step", v[0].dtype == torch.float64, len(v), v, hv, p, numel, STEP, sums)
    assert sums.isfinite().sum() == blocks(numel, "step")
    return sums.nansum()


def assert_step(v: list[Tensor], hv: list[Tensor], p: list[Tensor]) -> None:
    def run() -> dict[str, Tensor]:
        new_v, new_p = clones(v), clones(p)
        square = step(new_v, new_v if hv is v else hv, new_p)
        return {"square": square, "v": torch.cat(new_v), "p": torch.cat(new_p)}

    result = in_any_order(run, orders=3 if sum(map(len, v)) < 1_000_000 else 1)
    wanted_v, wanted_p = doubles(v), doubles(p)
    neumann_step_reference_(wanted_v, doubles(hv), wanted_p, STEP)
    eps = torch.finfo(v[0].dtype).eps
    torch.testing.assert_close(result["v"].double(), torch.cat(wanted_v), rtol=eps, atol=4 * eps)
    torch.testing.assert_close(result["p"].double(), torch.cat(wanted_p), rtol=eps, atol=8 * eps)
    torch.testing.assert_close(result["square"], result["v"].double().square().sum(), rtol=1e-12, atol=0)


def beginning(smallest: float, dtype: torch.dtype = torch.float64) -> Tensor:
    numbers = torch.zeros(GUARDED_NUMBERS, dtype=dtype)
    numbers[SMALLEST] = smallest
    return numbers


def assert_guarded_step(
    v: list[Tensor], v_before: list[Tensor], hv: list[Tensor], p: list[Tensor], numbers: Tensor
) -> Tensor:
    """The new numbers."""

    def run() -> dict[str, Tensor]:
        new_v, new_p, new_numbers = clones(v_before), clones(p), numbers.clone()
        numel = [tensor.numel() for tensor in v]
        call("neumann_guarded_step", v[0].dtype == torch.float64, len(v), v, new_v, hv, new_p, numel, STEP, new_numbers)
        return {"numbers": new_numbers, "v": torch.cat(new_v), "p": torch.cat(new_p)}

    result = in_any_order(run, orders=3 if sum(map(len, v)) < 1_000_000 else 1)
    wanted_v, wanted_p, wanted_numbers = doubles(v_before), doubles(p), numbers.clone()
    neumann_guarded_step_reference_(doubles(v), wanted_v, doubles(hv), wanted_p, wanted_numbers, STEP)
    eps = torch.finfo(v[0].dtype).eps
    torch.testing.assert_close(result["v"].double(), torch.cat(wanted_v), rtol=eps, atol=4 * eps)
    torch.testing.assert_close(result["p"].double(), torch.cat(wanted_p), rtol=eps, atol=4 * eps)
    torch.testing.assert_close(result["numbers"], wanted_numbers, rtol=max(4 * eps, 1e-12), atol=0)
    return result["numbers"]


@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=NAMES)
def test_step_is_the_reference(sizes, dtype):
    assert_step(*tensors(sizes, dtype))


@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=NAMES)
def test_guarded_step_is_the_reference(sizes, dtype):
    assert_guarded_step(*tensors(sizes, dtype, lists=4), beginning(float("inf")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shifted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1), (2, 2, 2, 2)]
)
def test_tensors_of_any_alignment(shifted, dtype):
    sizes = [1, 130, 1009]
    lists = [tensors(sizes, dtype, shift, lists=4)[which] for which, shift in enumerate(shifted)]
    assert_guarded_step(*lists, beginning(float("inf")))
    assert_step(*lists[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_may_be_v_itself(dtype):
    v, v_before, p = tensors([129, 1009], dtype)
    assert_step(v, v, p)
    assert_guarded_step(v, v_before, v, p, beginning(float("inf")))


@pytest.mark.parametrize("smallest", [0.0, float("inf")], ids=["grows", "shrinks"])
def test_guarded_step_stops_where_the_norm_grows(smallest):
    given = tensors([1009, 3], torch.float32, lists=4)
    numbers = assert_guarded_step(*given, beginning(smallest))
    assert numbers[GREW] == (smallest == 0)
    after = assert_guarded_step(*given, numbers)
    assert torch.equal(after, numbers) == (smallest == 0)


@pytest.mark.skipif(MODE == "tsan", reason="hundreds of tensors take it long, and their threads share nothing more")
@pytest.mark.parametrize("count", [99, 200, 817])
def test_hundreds_of_tensors_are_one_launch(count):
    v, v_before, hv, p = tensors([10] * count, torch.float32, lists=4)
    numbers, numel = beginning(float("inf")), [10] * count

    def guarded_step() -> None:
        call("neumann_guarded_step", False, count, v, v_before, hv, p, numel, STEP, numbers)

    assert launches(guarded_step) == -(-count // MANY["guarded step"]) + 1
    assert launches(lambda: step(v, hv, p)) == -(-count // MANY["step"])
    assert numbers[SQUARE] == pytest.approx(torch.cat(v_before).double().square().sum())
    assert numbers[OF_PRODUCT] == pytest.approx(torch.cat(hv).double().square().sum())


@pytest.mark.skipif(MODE == "tsan", reason="hundreds of tensors take it long, and their threads share nothing more")
def test_sums_of_several_launches_are_added():
    v, hv, p = tensors([10] * 817, torch.float32)
    assert step(v, hv, p) == pytest.approx(torch.cat(v).double().square().sum())
