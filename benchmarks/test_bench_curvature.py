"""Products with the curvature of the inner loss: one at a time, in batches, and Gauss-Newton.

Goal: 8 vectors in a batch 2.0 times faster than 8 of `autograd.grad` on MLP 64-128-128-10, 20 vectors 2.4 times, and no
network below 1.0, with the engine's product that each batch is compared with. "first batch" plans its pass besides, and
"unchecked" is the pass alone.

Last word, over two runs on a quiet 2-core EPYC: small networks reach 1.7 to 2.7 with 8 vectors and 3 to 6 with 20,
attention 1.2 and 1.6, but the MLP has 1.04 to 1.17 with 8 (unchecked 1.81 to 1.87) and 1.5 with 20, through a combiner
1.1 to 1.2 and 1.5 to 1.7. Two kinds of cells are below 1.0: a first batch of 8 on these two, and with 1024 samples,
0.85 to 0.97; and 512-1024-1024 with 8, 0.85 to 0.89, whose vectors go one by one, but whose products are written into
one batch of 50 MB, which `autograd.grad` leaves to the caller. The goal is out of reach there: of the pass's 1450 us
for 8 vectors nearly all are matrix products at the core's 104 GFLOP/s, so that no pass can be more than 1.96 times
faster than `autograd.grad`. The comparison costs the engine's 310 us, and 400 more because its code and data have left
the caches and two gradients are combined, so that a pass which gives one vector's result to all of them is found out.
To compare only a graph's first batch would gain nothing where most batches are: a Nystrom preconditioner has one for
each graph.

What did not help: the vectors on another axis, for larger matrix products; nodes in depth-first order; each node in a
loop over the vectors instead of under vmap (layer norm 1.7 instead of 3.6, GRU 3.4 instead of 4.9).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import cnn, mlp
from timing import interleaved
from torch import Tensor, nn

from auxfast.autograd.batched_backward import BatchedBackward
from auxfast.autograd.pullback import Pullback
from auxfast.implicit.curvature import GaussNewton, Hessian
from auxfast.implicit.losses import LossGraph
from auxfast.nn import NonlinearCombiner

CLASSES = 10


def normalised(norm: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(32, 64), norm, nn.GELU(), nn.Linear(64, CLASSES)), torch.randn(64, 32)


class Attention(nn.Module):
    """One transformer block: embedding, layer norm, 4 heads by plain products, and a feed-forward layer."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.norm, self.norm2 = nn.Embedding(50, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, CLASSES)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2)
        return self.out((x + self.feed(self.norm2(x))).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(8, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 32)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.out(h)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "MLP 64-128-128-10": lambda: mlp(64, 128, 128, CLASSES, batch=64),
    "MLP 64-128-128-10, combiner": lambda: mlp(64, 128, 128, CLASSES, batch=64),
    "MLP 4-8-10": lambda: mlp(4, 8, CLASSES, batch=8),
    "MLP 9 x 32": lambda: mlp(*[32] * 10, CLASSES, batch=32),
    "MLP 64-128-128-10, batch 1024": lambda: mlp(64, 128, 128, CLASSES, batch=1024),
    "MLP 512-1024-1024-10": lambda: mlp(512, 1024, 1024, CLASSES, batch=16),
    "layer norm": lambda: normalised(nn.LayerNorm(64)),
    "batch norm": lambda: normalised(nn.BatchNorm1d(64)),
    "CNN": lambda: cnn(outputs=CLASSES),
    "CNN, batch norm": lambda: cnn(nn.BatchNorm2d(16), outputs=CLASSES),
    "attention": lambda: (Attention(), torch.randint(50, (16, 12))),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(100, 16), nn.Flatten(), nn.Linear(96, CLASSES)),
        torch.randint(100, (32, 6)),
    ),
    "GRU cell": lambda: (Recurrent(), torch.randn(16, 6, 8)),
}


def combined(outputs: Tensor, labels: Tensor) -> Tensor:
    cross_entropy = nn.functional.cross_entropy(outputs, labels, reduction="none")
    losses = torch.stack([cross_entropy, outputs.square().mean(1), outputs.abs().sum(1)], dim=1)
    return NonlinearCombiner(3, (10,) * 5)(losses)


@pytest.mark.benchmark(group="curvature products, float32, one thread; times faster than autograd.grad for each vector")
@pytest.mark.parametrize("vectors", [8, 20])
@pytest.mark.parametrize("name", NETWORKS)
def test_products(benchmark: Any, name: str, vectors: int) -> None:
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    params = list(net.parameters())
    outputs = net(x)
    loss = combined if name.endswith("combiner") else nn.functional.cross_entropy
    inner = LossGraph("inner_loss", loss(outputs, torch.randint(CLASSES, (len(x),))), outputs)
    hessian, gauss_newton = Hessian(inner, params), GaussNewton(inner, params)
    batch = [torch.randn(vectors, *w.shape) for w in params]
    rows = [list(row) for row in zip(*batch, strict=True)]
    grads = torch.autograd.grad(inner.loss, params, create_graph=True)
    unchecked = BatchedBackward(grads, params)
    seconds = interleaved(
        {
            "autograd.grad": lambda: [torch.autograd.grad(grads, params, row, retain_graph=True) for row in rows],
            "one by one": lambda: [hessian(row) for row in rows],
            "first batch": lambda: Pullback(grads, params).batched(batch),
            "batch": lambda: hessian.batched(batch),
            "unchecked": lambda: unchecked(batch),
            "GN one by one": lambda: [gauss_newton(row) for row in rows],
            "GN batch": lambda: gauss_newton.batched(batch),
        },
        rounds=15 if benchmark.enabled else 1,
    )
    benchmark(hessian.batched, batch)
    benchmark.extra_info |= {
        "Hv us": seconds["one by one"] / vectors * 1e6,
        **{f"{key} x": seconds["autograd.grad"] / value for key, value in seconds.items() if key != "autograd.grad"},
    }
