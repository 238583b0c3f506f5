"""The loss-image op against the same network as torch.nn modules, in first and second order.

"full" is what one hypergradient asks of the op besides the Hessian products: the gradient in the losses, and the vjp of
that in losses and phi. "Hessian" is one Hessian product through a retained graph; "gradient" is value and gradient.

Two baselines: eager as it comes, and the best eager: channels_last, and malloc told to keep the memory that it is given
back, for default eager spends a fifth of its time in page faults. ATEN_CPU_CAPABILITY=avx2 restricts both sides.

Images of 32 x 32 had 12.5% of empty columns between them, now masks at their edges: -5 to -10%, and with AVX2 3.9
becomes 4.2 to 4.6. There, a selection for the masks is slower than an AND; one image a tile, or two, is slower.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from eager import derivatives, eager_loss_image
from timing import interleaved

from auxfast.ops.loss_image import loss_image
from auxfast.ops.network import LossImageNetwork

CASES = [
    ((2, 3, 288, 384), (8, 16)),
    ((8, 3, 128, 256), (8, 16)),
    ((64, 3, 32, 32), (8, 16)),
    ((2, 3, 288, 384), (8, 16, 32)),
    ((4, 16, 64, 64), (64, 64)),
]


def ratios(shape: tuple[int, ...], channels: tuple[int, ...], rounds: int, channels_last: bool) -> dict[str, float]:
    """Milliseconds of the op, and how many times longer eager takes."""
    torch.manual_seed(0)
    network = LossImageNetwork(shape[1], channels, main=0)
    losses, tangent = torch.rand(shape), torch.randn(shape)
    phi = (torch.randn(network.num_parameters) / 9).requires_grad_()
    eager = eager_loss_image(network, phi)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    eager = eager.to(memory_format=layout)
    ours = derivatives(lambda x: loss_image(x, phi, network), losses, tangent, [phi])
    theirs = derivatives(
        lambda x: eager(x).mean() + x[:, 0].mean(),
        losses.clone(memory_format=layout),
        tangent.clone(memory_format=layout),
        list(eager.parameters()),
    )
    one, other = ours["full"](), theirs["full"]()
    torch.testing.assert_close(one[0], other[0], rtol=1e-3, atol=1e-5 * float(one[0].abs().max()))
    named = {**ours, **{f"{name}, eager": function for name, function in theirs.items()}}
    seconds = interleaved(named, rounds=rounds, inner=1 if rounds == 1 or shape[-1] > 100 else None)
    result = {}
    for name in ours:
        result[f"{name} ms"] = seconds[name] * 1e3
        result[f"{name}, ratio"] = seconds[f"{name}, eager"] / seconds[name]
    return result


def keep_freed_memory() -> None:
    """malloc neither maps large blocks one by one nor gives the top of its heap back (glibc's mallopt)."""
    m_trim_threshold, m_mmap_threshold, most = -1, -3, (1 << 31) - 1
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, most)
    torch.set_num_threads(1)


def _name(value: Any) -> str:
    return "x".join(map(str, value))


@pytest.mark.benchmark(group="loss image, softplus, float32, one thread; ratio: times faster than torch.nn")
@pytest.mark.parametrize(("shape", "channels"), CASES, ids=_name)
def test_loss_image(benchmark: Any, shape: tuple[int, ...], channels: tuple[int, ...]) -> None:
    rounds = 9 if benchmark.enabled else 1
    benchmark.extra_info |= benchmark.pedantic(ratios, args=(shape, channels, rounds, False))


@pytest.mark.benchmark(group="loss image against the best eager: channels_last, memory kept")
@pytest.mark.parametrize(("shape", "channels"), CASES, ids=_name)
def test_loss_image_and_best_eager(benchmark: Any, shape: tuple[int, ...], channels: tuple[int, ...]) -> None:
    rounds = 9 if benchmark.enabled else 1
    with ProcessPoolExecutor(1, get_context("spawn"), keep_freed_memory) as process:  # malloc is the process's
        measure = process.submit(ratios, shape, channels, rounds, True).result
        benchmark.extra_info |= benchmark.pedantic(measure)
