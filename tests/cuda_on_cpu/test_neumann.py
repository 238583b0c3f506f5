"""neumann_cuda.cu on the CPU, against the step's reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auxfast.ops.neumann import neumann_step_reference_

from .kernels import call, in_any_order, unwritten

STEP = 0.3
SIZES = {
    "one": [1],
    "around a tile": [127, 128, 129],
    "around a block": [8191, 1, 8193],
    "prime": [100003, 7, 1009],
    "more tensors than a launch takes": [1 + i % 13 for i in range(200)],
    "exactly what a launch takes": [130] * 96,
    "small and large": [10] * 100 + [40009] + [3] * 50,
    "more blocks than threads add up": [2_200_001],
}


def tensors(sizes: list[int], dtype: torch.dtype, shift: int = 0) -> tuple[list[Tensor], ...]:
    """v, hv and p; `shift` elements off the alignment of an allocation."""
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(size + shift, generator=generator, dtype=torch.float64) for size in 3 * sizes)
    shifted = [t.to(dtype)[shift:] for t in noise]
    count = len(sizes)
    return shifted[:count], shifted[count : 2 * count], shifted[2 * count :]


def step(v: list[Tensor], hv: list[Tensor], p: list[Tensor]) -> Tensor:
    squares = unwritten(1, dtype=torch.float64)
    numel = [tensor.numel() for tensor in v]
    call("neumann_step", v[0].dtype == torch.float64, len(v), v, hv, p, numel, STEP, squares)
    return squares


def assert_step(v: list[Tensor], hv: list[Tensor], p: list[Tensor]) -> None:
    def run() -> dict[str, Tensor]:
        new_v, new_p = ([t.clone() for t in some] for some in (v, p))
        squares = step(new_v, new_v if hv is v else hv, new_p)
        return {"squares": squares, "v": torch.cat(new_v), "p": torch.cat(new_p)}

    result = in_any_order(run)
    wanted_v, wanted_hv, wanted_p = ([t.double() for t in some] for some in (v, hv, p))
    neumann_step_reference_(wanted_v, wanted_hv, wanted_p, STEP)
    eps = torch.finfo(v[0].dtype).eps
    torch.testing.assert_close(result["v"].double(), torch.cat(wanted_v), rtol=eps, atol=4 * eps)
    torch.testing.assert_close(result["p"].double(), torch.cat(wanted_p), rtol=eps, atol=8 * eps)
    torch.testing.assert_close(result["squares"], result["v"].double().square().sum()[None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_step_is_the_reference(sizes, dtype):
    assert_step(*tensors(sizes, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shifted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (2, 2, 2)])
def test_tensors_of_any_alignment(shifted, dtype):
    sizes = [1, 130, 1009]
    assert_step(*(tensors(sizes, dtype, shift)[which] for which, shift in enumerate(shifted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_may_be_v_itself(dtype):
    v, _, p = tensors([129, 1009], dtype)
    assert_step(v, v, p)
