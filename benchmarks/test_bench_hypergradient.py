"""A whole hypergradient with its forward passes: fused kernels, their references, and the textbook loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from eager import EagerCombiner
from timing import interleaved
from torch import Tensor, nn

from auxfast._native import reference_kernels
from auxfast.implicit import hypergradient
from auxfast.nn import NonlinearCombiner
from auxfast.solvers import Neumann

BATCH, OUTPUTS, HIDDEN = 64, 10, (10,) * 5
STEPS, STEP_SIZE = 3, 0.01


def textbook(outer_loss: Tensor, inner_loss: Tensor, w: Sequence[Tensor], phi: Sequence[Tensor]) -> list[Tensor]:
    """The paper's Algorithm 2 with list comprehensions (and the factor `STEP_SIZE`)."""
    v = torch.autograd.grad(outer_loss, w)
    grads = torch.autograd.grad(inner_loss, w, create_graph=True)
    p = [t.clone() for t in v]
    for _ in range(STEPS):
        hv = torch.autograd.grad(grads, w, v, retain_graph=True)
        v = [a - STEP_SIZE * b for a, b in zip(v, hv, strict=True)]
        p = [a + b for a, b in zip(p, v, strict=True)]
    return [-STEP_SIZE * g for g in torch.autograd.grad(grads, phi, p)]


@pytest.mark.benchmark(group="hypergradient, MLP 64-128-128-10, batch 64, combiner 5 x 10, Neumann(3), one thread")
def test_hypergradient(benchmark: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, OUTPUTS))
    combiner = NonlinearCombiner(OUTPUTS, HIDDEN)
    eager = EagerCombiner(combiner)
    w = list(net.parameters())
    data = [(torch.randn(BATCH, 64), torch.randn(BATCH, OUTPUTS)) for _ in range(2)]
    solver = Neumann(STEPS, STEP_SIZE)

    def losses() -> tuple[Tensor, Tensor]:
        """The outer loss, (), and the inner losses, (batch, num_losses)."""
        (x, y), (outer_x, outer_y) = data
        return (net(outer_x) - outer_y)[:, 0].square().mean(), (net(x) - y).square()

    def native() -> Sequence[Tensor]:
        outer, inner = losses()
        return hypergradient(outer, combiner(inner), w, combiner.parameters(), solver=solver).grads

    def reference() -> Sequence[Tensor]:
        with reference_kernels():
            return native()

    def by_hand() -> Sequence[Tensor]:
        outer, inner = losses()
        return textbook(outer, eager(inner), w, list(eager.parameters()))

    flat = torch.cat([g.reshape(-1) for g in by_hand()])
    torch.testing.assert_close(native()[0].reshape(-1), flat, rtol=1e-3, atol=1e-5 * float(flat.abs().max()))
    seconds = interleaved(
        {"native": native, "reference": reference, "textbook": by_hand}, rounds=30 if benchmark.enabled else 1
    )
    benchmark(native)
    benchmark.extra_info |= {
        "native us": seconds["native"] * 1e6,
        "reference us": seconds["reference"] * 1e6,
        "textbook us": seconds["textbook"] * 1e6,
        "vs reference": seconds["reference"] / seconds["native"],
        "vs textbook": seconds["textbook"] / seconds["native"],
    }
