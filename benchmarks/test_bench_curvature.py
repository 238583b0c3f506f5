"""Products with the curvature of the inner loss: one at a time, several together, and Gauss-Newton.

The goal of 2.0 for 8 vectors is reached with small tensors (MLPs of up to 32 units, layer norm, GRU: 2.1 to 3.1 with
cross entropy), and not on MLP 64-128-128-10: 335 to 370 us a vector against 355 to 385 singly and 415 to 450 with
`autograd.grad` (Xeon, AVX-512, shared), so 1.04 to 1.11 and 1.2; 1.07 to 1.16 over single ones through a combiner. 4
vectors and 8 together fit 530 us a block and 280 a vector, of which matrix products are 100 (16 MFLOP at 155 GFLOP/s):
no number of vectors would make it 2.0. In a profile the rest is copies of transposed operands, which vmap's folding of
`mm` makes, sums and masks, on tensors of 256 to 512 KiB.
What does not help: 4 vectors at once (405 us), a block with the vectors on another axis or in rows of one flat matrix
(0 to 4%), a malloc that keeps its memory (3%). `is_grads_batched` instead of `torch.vmap` takes 335 to 350 us, but 1.3
to 1.4 times as long on the CNN and with layer norm. A combiner costs about 200 us a block more under `torch.vmap` than
under `is_grads_batched` in most networks: the op's batching rule goes through pytrees in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from timing import interleaved
from torch import Tensor, nn

from auxfast.implicit.curvature import GaussNewton, Hessian
from auxfast.implicit.losses import Evaluation

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


@pytest.mark.benchmark(group=f"curvature products, {VECTORS} vectors, float32, one thread")
@pytest.mark.parametrize("name", NETWORKS)
def test_products(benchmark: Any, name: str) -> None:
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    params = list(net.parameters())
    outputs = net(x)
    inner = Evaluation("inner_loss", nn.functional.cross_entropy(outputs, torch.randint(CLASSES, (len(x),))), outputs)
    hessian, gauss_newton = Hessian(inner, params), GaussNewton(inner, params)
    block = [torch.randn(VECTORS, *w.shape) for w in params]
    rows = [list(row) for row in zip(*block, strict=True)]
    grads = torch.autograd.grad(inner.loss, params, create_graph=True)
    seconds = interleaved(
        {
            "autograd.grad": lambda: [torch.autograd.grad(grads, params, row, retain_graph=True) for row in rows],
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
        "batched vs autograd.grad": seconds["autograd.grad"] / seconds["batched"],
        "GN": single / seconds["GN one by one"],
        "GN batched": single / seconds["GN batched"],
    }
