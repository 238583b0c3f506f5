"""The Krylov solvers' vector work, against what one writes in PyTorch, and against the memory.

One iteration of conjugate gradients takes three combinations of one term and one dot product; MINRES takes
combinations of two. Bandwidth counts the reads and writes per element that they cannot do without, and 3 for the
triad loop `a = b + s c`, which is measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing import interleaved
from torch import Tensor

from auxfast.ops.krylov import linear_combination_, row_dots

MLP, RESNET18 = 26_122, 11_689_512  # parameters of MLP 64-128-128-10 and of torchvision's ResNet-18
SHAPES = {
    "MLP": (1, MLP),
    "MLP, 8 rows": (8, MLP),
    "ResNet-18": (1, RESNET18),
    "ResNet-18, 8 rows": (8, RESNET18),
}


def torch_combination(out: Tensor, terms: list[Tensor], coefficients: Tensor) -> Callable[[], Any]:
    """The combination in PyTorch. It takes no pass over `out` alone, since all its coefficients are 1."""
    first, *others = coefficients[1:].to(out.dtype)[..., None]  # (k, 1) each

    def run() -> Tensor:
        out.addcmul_(first, terms[0])
        for coefficient, term in zip(others, terms[1:], strict=True):
            out.addcmul_(coefficient, term)
        return torch.linalg.vecdot(out, out)

    return run


def triad(like: Tensor) -> Callable[[], Any]:
    a, b, c = torch.empty_like(like), torch.randn_like(like), torch.randn_like(like)
    return lambda: torch.add(b, c, alpha=1.5, out=a)


def measure(benchmark: Any, native: Callable[[], Any], eager: Callable[[], Any], like: Tensor, streams: int) -> None:
    rounds = 1 if not benchmark.enabled else 30 if like.numel() < 1e7 else 5
    with torch.no_grad():
        seconds = interleaved({"native": native, "torch": eager, "triad": triad(like)}, rounds=rounds)
        benchmark(native)
    benchmark.extra_info |= {
        "native us": seconds["native"] * 1e6,
        "vs torch": seconds["torch"] / seconds["native"],
        "of the triad's bandwidth": (streams / seconds["native"]) / (3 / seconds["triad"]),
    }


@pytest.mark.benchmark(group="Linear combination and squared norms, float32, one thread")
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear_combination(benchmark: Any, shape: tuple[int, int], terms: int) -> None:
    out, *others = (torch.randn(shape) for _ in range(1 + terms))
    coefficients = torch.full((1 + terms, len(out)), 1e-9, dtype=torch.float64)
    coefficients[0] = 1
    eager = torch_combination(torch.randn(shape), others, coefficients)
    measure(benchmark, lambda: linear_combination_(out, others, coefficients), eager, out, 2 + terms)


@pytest.mark.benchmark(group="Row dot products, float32, one thread")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_row_dots(benchmark: Any, shape: tuple[int, int]) -> None:
    a, b = torch.randn(shape), torch.randn(shape)
    measure(benchmark, lambda: row_dots(a, b), lambda: torch.linalg.vecdot(a, b), a, 2)
