"""The problem whose hypergradient is timed, cut into equal parts for ranks; and the networks whose products are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import auxfast
from auxfast import HypergradientResult
from auxfast.experiments.models.resnet import ResNet18
from auxfast.solvers import MINRES, Solver, SolverState

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks of pytest import their neighbours so
from networks import mlp

# A program of several processes that passes no group is searched for DistributedDataParallel, for some 10 ms. A call on
# a single rank stands for one process here, which is not.
sys.modules["auxfast.implicit.hypergradient"].refuse_params = lambda *_: None  # type: ignore[attr-defined]
STEPS = 10
SOLVER = MINRES(steps=STEPS, tol=None)


class Problem:
    """A multi-layer perceptron on random data, and a weight for each of its outputs as outer parameters.

    Args:
        widths: inputs and outputs included.
        batch: samples of each loss, over all ranks.
    """

    def __init__(self, widths: Sequence[int], batch: int) -> None:
        torch.manual_seed(0)
        self.net, self.x = mlp(*widths, batch=batch)
        self.y, self.held_out_y = torch.randn(2, batch, widths[-1]).unbind()
        self.held_out_x = torch.randn(batch, widths[0])
        self.phi = torch.zeros(widths[-1], requires_grad=True)
        self.params = list(self.net.parameters())

    def hypergradient(
        self, rank: int, size: int, batch: int, group: Any, solver: Solver = SOLVER, state: SolverState | None = None
    ) -> HypergradientResult:
        """That of `batch` samples, of which this rank of `size` has its part."""
        part = slice(rank * batch // size, (rank + 1) * batch // size)
        outer = (self.net(self.held_out_x[part]) - self.held_out_y[part]).square().mean()
        inner = ((self.net(self.x[part]) - self.y[part]).square() * self.phi.exp()).mean()
        return auxfast.hypergradient(
            outer, inner, self.params, [self.phi], solver=solver, state=state, process_group=group, warn=False
        )


@dataclass(frozen=True)
class Network:
    """A loss of one batch, computed anew, and the parameters of the network."""

    loss: Callable[[], Tensor]
    params: Sequence[Tensor]


def networks(smoke: bool) -> dict[str, Callable[[], Network]]:
    """Networks by name, made when they are called."""
    width, batch = (32, 8) if smoke else (1024, 1024)

    def perceptron() -> Network:
        net, x = mlp(width // 2, width, width, width // 2, batch=batch)
        return Network(lambda: net(x).square().mean(), list(net.parameters()))

    def resnet() -> Network:
        net, images = ResNet18(10, width=8 if smoke else 64), torch.randn(2 if smoke else 16, 3, 32, 32)
        labels = torch.arange(len(images)) % 10
        return Network(lambda: F.cross_entropy(net(images), labels), list(net.parameters()))

    def transformer() -> Network:
        model, layers, length = (16, 1, 8) if smoke else (512, 4, 128)
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "activation": "gelu", "norm_first": True}
        net = nn.ModuleList(nn.TransformerEncoderLayer(model, 4, 4 * model, **options) for _ in range(layers))
        tokens = torch.randn(4, length, model)

        def loss() -> Tensor:
            hidden = tokens
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivatives
                for layer in net:
                    hidden = layer(hidden)
            return hidden.tanh().square().mean()

        return Network(loss, list(net.parameters()))

    return {"MLP": perceptron, "ResNet-18": resnet, "transformer": transformer}
