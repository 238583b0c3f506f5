"""Products with the curvature of the inner loss: one at a time, several together, and Gauss-Newton.

Goal: 8 vectors together at least 2.0 times faster than 8 single passes of autograd's engine on MLP 64-128-128-10.
Reached on a quiet machine (Xeon, AVX-512): 2.06, median of 6 runs, and 2.3 to 2.5 against `autograd.grad`; 170 to 185
us a vector, of which matrix products are 120 and a hand-written sequence of the same operations takes 143. Single
products are no longer the engine's: 235 us instead of 350 (182 by hand), 1.2 to 2 times faster than `autograd.grad`
except for convolutions, so that 8 together are 1.6 times faster than they. In the other networks 8 together are 8 times
faster than `autograd.grad` (MLPs of up to 32 units 6), GRU 4.7, norms 3, attention 1.8, CNNs 1.3 to 1.8, 512-1024-1024
1.5, where 8 separate single products are faster yet, by a seventh (if they are cut out of a block and put back, slower
by as much).

`torch.vmap` around autograd's engine, which the pass replaced, reached 1.04 to 1.11 on that MLP: copies of transposed
operands, and sums that are not in place. What did not help: the vectors on another axis, for larger matrix products;
nodes in depth-first order. What decides at this size is how much memory is touched: with every sum in new memory,
malloc gave 400 pages back and took them again in some processes: 1.1 to 1.9.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from timing import interleaved
from torch import Tensor, nn

from auxfast.autograd.engine import vjp
from auxfast.implicit.curvature import GaussNewton, Hessian
from auxfast.implicit.losses import LossGraph
from auxfast.nn import NonlinearCombiner

VECTORS, CLASSES = 8, 10


def mlp(*widths: int, batch: int) -> tuple[nn.Module, Tensor]:
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(batch, widths[0])


def normalised(norm: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(32, 64), norm, nn.GELU(), nn.Linear(64, CLASSES)), torch.randn(64, 32)


def cnn(*norms: nn.Module) -> tuple[nn.Module, Tensor]:
    first = [nn.Conv2d(3, 16, 3, padding=1), *norms, nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, CLASSES)), torch.randn(16, 3, 16, 16)


class Attention(nn.Module):
    """One block: embedding, layer norm, 4 heads by plain products, and a feed-forward layer."""

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
    "CNN": lambda: cnn(),
    "CNN, batch norm": lambda: cnn(nn.BatchNorm2d(16)),
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


@pytest.mark.benchmark(group=f"curvature products, {VECTORS} vectors, float32, one thread")
@pytest.mark.parametrize("name", NETWORKS)
def test_products(benchmark: Any, name: str) -> None:
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    params = list(net.parameters())
    outputs = net(x)
    loss = combined if name.endswith("combiner") else nn.functional.cross_entropy
    inner = LossGraph("inner_loss", loss(outputs, torch.randint(CLASSES, (len(x),))), outputs)
    hessian, gauss_newton = Hessian(inner, params), GaussNewton(inner, params)
    block = [torch.randn(VECTORS, *w.shape) for w in params]
    rows = [list(row) for row in zip(*block, strict=True)]
    grads = torch.autograd.grad(inner.loss, params, create_graph=True)
    seconds = interleaved(
        {
            "autograd.grad": lambda: [torch.autograd.grad(grads, params, row, retain_graph=True) for row in rows],
            "engine": lambda: [vjp(grads, params, row) for row in rows],
            "one by one": lambda: [hessian(row) for row in rows],
            "batched": lambda: hessian.batched(block),
            "GN one by one": lambda: [gauss_newton(row) for row in rows],
            "GN batched": lambda: gauss_newton.batched(block),
        },
        rounds=15 if benchmark.enabled else 1,
    )
    benchmark(hessian.batched, block)
    single = seconds["one by one"]
    benchmark.extra_info |= {
        "Hv us": single / VECTORS * 1e6,
        "vs autograd.grad": seconds["autograd.grad"] / single,
        "batched": single / seconds["batched"],
        "batched vs engine": seconds["engine"] / seconds["batched"],
        "batched vs autograd.grad": seconds["autograd.grad"] / seconds["batched"],
        "GN": single / seconds["GN one by one"],
        "GN batched": single / seconds["GN batched"],
    }
