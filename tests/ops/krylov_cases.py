"""Rows, coefficients and shapes for the tests of the Krylov solvers' vector work."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64]
SHAPES = {
    "one": (1, 1),
    "no rows": (0, 5),
    "empty rows": (3, 0),
    "around a vector": (4, 17),
    "around a block of vectors": (3, 65),
    "around a GPU's block": (2, 2049),
    "one row of a chunk": (1, 32768),
    "rows just above a chunk": (3, 32769),
    "long": (1, 200_003),
    "long rows, several": (5, 70_001),
    "thousands of rows": (4099, 3),
    "many rows of one": (70_000, 1),
    "chunks of several rows": (37, 5000),
}


def rows(shape: tuple[int, int], count: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(count)]


def coefficients_for(out: Tensor, terms: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1 + terms, len(out), generator=generator, dtype=torch.float64).to(out.device)
