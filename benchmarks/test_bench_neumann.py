"""The Neumann update with its residual norm, against what one writes in PyTorch, and against the memory.

Bandwidth counts the 5 reads and writes per element that the update cannot do without, and 3 for the triad
loop `a = b + s c`, which is measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import resnet18_shapes
from timing import interleaved
from torch import Tensor

from auxfast.ops.neumann import NeumannSteps

STEP = 1e-9


LISTS: dict[str, list[tuple[int, ...]]] = {
    "ResNet-18": resnet18_shapes(),
    "MLP 64-128-128-10": [(128, 64), (128,), (128, 128), (128,), (10, 128), (10,)],
    "300 biases of 10": [(10,)] * 300,
    "one of 4 million": [(2000, 2000)],
}
FLOORS = {"ResNet-18": "1.3, 1.8, 0.8"}


def normal(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def foreach(shapes: list[tuple[int, ...]]) -> Callable[[], Any]:
    v, hv, p = normal(shapes), normal(shapes), normal(shapes)

    def run() -> Tensor:
        torch._foreach_add_(v, hv, alpha=-STEP)
        torch._foreach_add_(p, v)
        return torch.stack(torch._foreach_norm(v)).square().sum()

    return run


def textbook(shapes: list[tuple[int, ...]]) -> Callable[[], Any]:
    state = {"v": normal(shapes), "p": normal(shapes)}
    hv = normal(shapes)

    def run() -> Any:
        state["v"] = [a - STEP * b for a, b in zip(state["v"], hv, strict=True)]
        state["p"] = [a + b for a, b in zip(state["p"], state["v"], strict=True)]
        return sum(a.square().sum() for a in state["v"])

    return run


def triad(elements: int) -> Callable[[], Any]:
    a, b, c = torch.empty(elements), torch.randn(elements), torch.randn(elements)
    return lambda: torch.add(b, c, alpha=1.5, out=a)


@pytest.mark.benchmark(group="Neumann update and residual norm, float32, one thread")
@pytest.mark.parametrize("name", LISTS)
def test_neumann_step(benchmark: Any, name: str) -> None:
    shapes = LISTS[name]
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    steps, hv = NeumannSteps(normal(shapes), STEP), normal(shapes)

    def native() -> list[float]:
        steps.step(hv)
        return steps.read()

    with torch.no_grad():
        seconds = interleaved(
            {
                "native": native,
                "foreach": foreach(shapes),
                "textbook": textbook(shapes),
                "triad": triad(elements),
            },
            rounds=30 if benchmark.enabled else 1,
        )
        benchmark(native)
    benchmark.extra_info |= {
        "native us": seconds["native"] * 1e6,
        "vs foreach": seconds["foreach"] / seconds["native"],
        "vs textbook": seconds["textbook"] / seconds["native"],
        "of the triad's bandwidth": (5 / seconds["native"]) / (3 / seconds["triad"]),
        "floors": FLOORS.get(name, ""),
    }
