"""A whole hypergradient with its forward passes: fused kernels, their references, and the textbook loop.

The textbook loop has no certificate, so it is compared with `Neumann(certify=False)`, which makes the same products;
"certified" is the default, with its one product more.

All Hessian products are autograd's own, by its engine called directly. On a quiet 2-core EPYC, in medians of
interleaved rounds (0.1 is noise): MLP 64-128-128-10 1.29 times faster than the textbook loop, 16-32-10 1.50,
512-1024-1024-10 1.28, CNN 1.06, with BatchNorm 1.04, no more than level with its floor; with the certificate 1.08,
1.29, 0.89, 0.88 and 0.89. What surrounds the first's
products is mostly code that has left the caches: after a product, a call that takes 2 us in a loop of its own takes 10,
so fewer and plainer calls count, not less arithmetic. Advice about the solve takes 100 us where it finds something and
there is no `state` to remember it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from eager import EagerCombiner, textbook_neumann
from networks import cnn, mlp
from timing import interleaved
from torch import Tensor, nn

from auxfast import reference_kernels
from auxfast.implicit import hypergradient
from auxfast.nn import NonlinearCombiner
from auxfast.solvers import Neumann

OUTPUTS, HIDDEN = 10, (10,) * 5
STEPS, STEP_SIZE = 3, 0.01


NETWORKS = {
    "MLP 64-128-128-10": lambda: mlp(64, 128, 128, OUTPUTS, batch=64),
    "MLP 16-32-10": lambda: mlp(16, 32, OUTPUTS, batch=16),
    "MLP 512-1024-1024-10": lambda: mlp(512, 1024, 1024, OUTPUTS, batch=16),
    "CNN 16-32": lambda: cnn(outputs=OUTPUTS),
    "CNN 16-32, BatchNorm": lambda: cnn(nn.BatchNorm2d(16), outputs=OUTPUTS),
}
FLOORS = {"MLP 64-128-128-10": 1.2}


@pytest.mark.benchmark(group="hypergradient, combiner 5 x 10, Neumann(3), one thread")
@pytest.mark.filterwarnings(
    "ignore:The hypergradient is little:RuntimeWarning", "ignore:The inner loss curves", "ignore:The solve of the"
)
@pytest.mark.parametrize("name", NETWORKS)
def test_hypergradient(benchmark: Any, name: str) -> None:
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    combiner = NonlinearCombiner(OUTPUTS, HIDDEN)
    eager = EagerCombiner(combiner)
    w = list(net.parameters())
    y, outer_x, outer_y = torch.randn(len(x), OUTPUTS), torch.randn_like(x), torch.randn(len(x), OUTPUTS)
    like_for_like, certified = Neumann(STEPS, STEP_SIZE, certify=False), Neumann(STEPS, STEP_SIZE)

    def losses() -> tuple[Tensor, Tensor]:
        """The outer loss, (), and the inner losses, (batch, num_losses)."""
        return (net(outer_x) - outer_y)[:, 0].square().mean(), (net(x) - y).square()

    def native(solver: Neumann = like_for_like) -> Sequence[Tensor]:
        outer, inner = losses()
        return hypergradient(outer, combiner(inner), w, combiner.parameters(), solver=solver).grads

    def reference() -> Sequence[Tensor]:
        with reference_kernels():
            return native()

    def by_hand() -> Sequence[Tensor]:
        outer, inner = losses()
        return textbook_neumann(outer, eager(inner), w, list(eager.parameters()), STEPS, STEP_SIZE)

    flat = torch.cat([g.reshape(-1) for g in by_hand()])
    torch.testing.assert_close(native()[0].reshape(-1), flat, rtol=1e-3, atol=1e-5 * float(flat.abs().max()))
    ways = {"native": native, "certified": lambda: native(certified), "reference": reference, "textbook": by_hand}
    seconds = interleaved(ways, rounds=30 if benchmark.enabled else 1)
    benchmark(native)
    benchmark.extra_info |= {
        "native us": seconds["native"] * 1e6,
        "certified us": seconds["certified"] * 1e6,
        "reference us": seconds["reference"] * 1e6,
        "textbook us": seconds["textbook"] * 1e6,
        "vs reference": seconds["reference"] / seconds["native"],
        "vs textbook": seconds["textbook"] / seconds["native"],
        "certified vs textbook": seconds["textbook"] / seconds["certified"],
        "floor": FLOORS.get(name, 1.0),
    }
