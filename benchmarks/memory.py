"""Peak memory and time of a hypergradient by each order of differentiation, on a transformer of 12 layers.

    python benchmarks/memory.py

prints the table of docs/memory.md. Memory is what torch's allocators hand out: torch's profiler records every block
that they allocate and free, so that the peak is exact, the same in every run, and free of what else the process holds.
What is there before a call (parameters, data) does not count. Times are those of one thread of the CPU in another call,
without the profiler.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import auxfast
from auxfast.implicit.derivatives import CurvatureName
from auxfast.solvers import Neumann

LAYERS, WIDTH, HEADS, LENGTH, SAMPLES, CLASSES = 12, 64, 4, 128, 4, 10
SOLVER = Neumann(steps=2, step_size=0.1, certify=False)  # three vectors: what it holds is small beside activations


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that torch's allocators have handed out at a time during `call`, above what there was before."""
    with profile(profile_memory=True) as record:
        result = call()
    del result
    events = record.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        most = max(most, held)
    return most


class Block(nn.Module):
    """A layer of a transformer, with attention written out: it has second derivatives in every order."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind()
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.out((attention @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self, layers: int = LAYERS, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.head(x.mean(1))


@dataclass
class Problem:
    """Data reweighting: one outer parameter for each class."""

    batches: int
    checkpointed: bool
    layers: int = LAYERS

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.net = Transformer(self.layers, self.checkpointed)
        self.phi = torch.zeros(CLASSES, requires_grad=True)
        xs, ys = torch.randn(self.batches, SAMPLES, LENGTH, WIDTH), torch.randint(CLASSES, (self.batches, SAMPLES))
        self.data = [*zip(xs, ys, strict=True)]

    def outer(self) -> Tensor:
        x, y = self.data[0]
        return F.cross_entropy(self.net(x), y)

    def inner(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        return (self.phi[y].exp() * losses).mean() + 0.01 * sum(w.square().sum() for w in self.net.parameters())

    def hypergradient(self, curvature: CurvatureName) -> auxfast.HypergradientResult:
        return auxfast.hypergradient(
            self.outer,
            auxfast.MicroBatches(self.inner, self.data),
            self.net.parameters(),
            [self.phi],
            solver=SOLVER,
            curvature=curvature,
            warn=False,
        )


def gradient(problem: Problem) -> None:
    torch.autograd.grad(problem.inner(problem.data[0]), [*problem.net.parameters()])


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {sum(w.numel() for w in Transformer().parameters()) / 1e6:.2f} M parameters")
    print("| batches | curvature | checkpoints | peak (MB) | CPU seconds |\n|---|---|---|---|---|")
    for batches, checkpointed in product((1, 8), (False, True)):
        problem = Problem(batches, checkpointed)
        calls: dict[str, Callable[[], object]] = (
            {"(one gradient)": lambda p=problem: gradient(p)} if batches == 1 else {}
        )
        for curvature in ("hessian", "hessian-jvp"):
            calls[curvature] = lambda p=problem, c=curvature: p.hypergradient(c)
        for name, call in calls.items():
            call()  # what is loaded and cached once is not measured
            peak, took = peak_bytes(call), seconds(call)
            print(f"| {batches} | {name} | {'yes' if checkpointed else 'no'} | {peak / 1e6:.0f} | {took:.1f} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
