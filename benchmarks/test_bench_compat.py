"""A whole outer step of an AuxiLearn program: the drop-in against its algorithm in plain torch.

The floor is 1.15 for MLPs, 1.0 for others. On a loaded 2-core EPYC, three runs, the three combiners in turn: 16-32 1.34
to 1.66; 64-128-128 1.19 to 1.23, 1.17 to 1.18, 1.40 to 1.42; 256-512-512, where memory decides, 1.21 to 1.49 in two
runs and 1.12 to 1.16 in one; CNN 1.07 to 1.15, pixel losses 1.47. Passes of our own for the single products, which
auxfast once had, gave the same figures in the same hour.

All products are those of autograd's engine, called directly, which saves 12% of each. Horner's scheme for the series
saves one of two copies. What did not help: the fused Neumann step in these small lists, flat vectors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import cnn, mlp
from timing import interleaved
from torch import Tensor, nn

from auxfast.compat.auxilearn import MetaOptimizer, MonoLinearHyperNet, MonoNoFCCNNHyperNet, MonoNonlinearHyperNet

ALPHA, NUM_LOSSES = 1e-4, 8


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


transcription = _load(Path(__file__).resolve().parents[1] / "tests" / "compat" / "transcription.py")


def per_pixel() -> tuple[nn.Module, Tensor]:
    """Two convolutions, with an output for each pixel and each of three tasks, and two images."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))
    return net, torch.randn(2, 3, 64, 64)


NETWORKS = {
    "MLP 16-32, batch 16": lambda: mlp(16, 32, NUM_LOSSES, batch=16),
    "MLP 64-128-128, batch 64": lambda: mlp(64, 128, 128, NUM_LOSSES, batch=64),
    "MLP 256-512-512, batch 32": lambda: mlp(256, 512, 512, NUM_LOSSES, batch=32),
    "CNN 16-32, batch 16": lambda: cnn(outputs=NUM_LOSSES),
}
HYPERNETS = {
    "linear": (lambda: MonoLinearHyperNet(0, NUM_LOSSES), lambda: transcription.Linear(NUM_LOSSES)),
    "nonlinear 1": (lambda: MonoNonlinearHyperNet(0, NUM_LOSSES), lambda: transcription.Nonlinear(NUM_LOSSES, [1])),
    "nonlinear 5 x 10": (
        lambda: MonoNonlinearHyperNet(0, NUM_LOSSES, [10] * 5, init_upper=0.2),
        lambda: transcription.Nonlinear(NUM_LOSSES, [10] * 5, init=(0.0, 0.2)),
    ),
}
CASES = [(network, hypernet) for network in NETWORKS for hypernet in HYPERNETS]


@pytest.mark.benchmark(group="AuxiLearn outer step, J = 3, momentum SGD, one thread")
@pytest.mark.parametrize(("network", "hypernet"), CASES, ids=[f"{n} {h}" for n, h in CASES])
def test_outer_step(benchmark: Any, network: str, hypernet: str) -> None:
    torch.manual_seed(0)
    ours, theirs = (make() for make in HYPERNETS[hypernet])
    _compare(benchmark, *NETWORKS[network](), ours, theirs, floor=1.15 if network.startswith("MLP") else 1.0)


@pytest.mark.benchmark(group="AuxiLearn outer step, J = 3, momentum SGD, one thread")
def test_outer_step_of_pixel_losses(benchmark: Any) -> None:
    torch.manual_seed(0)
    _compare(benchmark, *per_pixel(), MonoNoFCCNNHyperNet(0), transcription.Conv(3, (8, 16)), floor=1.0)


def _compare(benchmark: Any, net: nn.Module, x: Tensor, ours: nn.Module, theirs: nn.Module, floor: float) -> None:
    theirs.load_state_dict(ours.state_dict())
    w = list(net.parameters())
    y, outer_x, outer_y = torch.randn_like(net(x)), torch.randn_like(x), torch.randn_like(net(x))

    def losses() -> tuple[Tensor, Tensor]:
        """The outer loss, (), and the inner losses, (batch, NUM_LOSSES) or an image of them."""
        return (net(outer_x) - outer_y)[:, 0].square().mean(), (net(x) - y).square()

    def sgd(phi: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(phi, lr=1e-6, momentum=0.9)

    phi = list(ours.parameters())
    meta = MetaOptimizer(sgd(phi), ALPHA)

    def drop_in() -> None:
        outer, inner = losses()
        meta.step(ours(inner), outer, w, phi)

    their_phi = list(theirs.parameters())
    optimizer = sgd(their_phi)

    def plain() -> None:
        outer, inner = losses()
        transcription.outer_step(optimizer, theirs(inner), outer, w, their_phi, alpha=ALPHA)

    drop_in()
    plain()
    flat = [torch.cat([parameter.grad.flatten() for parameter in each]) for each in (phi, their_phi)]
    torch.testing.assert_close(*flat, rtol=1e-3, atol=1e-5 * float(flat[1].abs().max()))
    seconds = interleaved({"drop-in": drop_in, "plain": plain}, rounds=30 if benchmark.enabled else 1)
    benchmark(drop_in)
    benchmark.extra_info |= {
        "drop-in us": seconds["drop-in"] * 1e6,
        "plain torch us": seconds["plain"] * 1e6,
        "times faster": seconds["plain"] / seconds["drop-in"],
        "floor": floor,
    }
