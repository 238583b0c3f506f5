"""Combiner and loss image against the same network as torch.nn modules, eager and by Inductor, in first and second
order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor
from torch.backends import cudnn
from torch.func import functional_call, grad, jvp

from auxfast.nn import NonlinearCombiner
from auxfast.ops.loss_image import loss_image
from auxfast.ops.network import LossImageNetwork
from benchmarks.eager import EagerCombiner, derivatives, eager_loss_image
from benchmarks.gpu.section import Call, Section

KINDS = ("full", "Hessian", "gradient")
HIDDEN = (10,) * 5
_CHANNELS_LAST = "torch.nn, channels_last"


def combiner_calls(way: str, batch: int, num_losses: int, device: torch.device, seed: int) -> dict[str, Call]:
    """Calls of one way by kind, on inputs of their own."""
    torch.manual_seed(seed)
    combiner = NonlinearCombiner(num_losses, HIDDEN).to(device)
    module = combiner if way == "auxfast" else EagerCombiner(combiner).to(device)
    losses = torch.rand(batch, num_losses, device=device)
    return derivatives(module, losses, torch.randn_like(losses), list(module.parameters()))


def combiners(section: Section) -> None:
    sizes = [(64, 4)] if section.small else [(64, 4), (1024, 11), (65536, 4), (1 << 20, 11), (16384, 2048)]
    for size, kind in product(sizes, KINDS):

        def make(way: str, size: tuple[int, int] = size, kind: str = kind) -> Callable[[int], Call]:
            return lambda seed: combiner_calls(way, *size, section.device, seed)[kind]

        ways = {way: make(way) for way in ("auxfast", "torch.nn")}
        set_bytes, counted = 3 * 4 * size[0] * size[1], kind != "gradient"
        section.compare(f"{size[0]} x {size[1]}, {kind}", ways, launches=counted, set_bytes=set_bytes)


def loss_image_calls(way: str, shape: tuple[int, ...], device: torch.device) -> dict[str, Call]:
    """Calls of one way by kind. shape: (batch, num_losses, H, W)."""
    torch.manual_seed(0)
    network = LossImageNetwork(shape[1], (8, 16), main=0)
    losses, tangent = torch.rand(shape).to(device), torch.randn(shape).to(device)
    phi = (torch.randn(network.num_parameters) / 9).to(device).requires_grad_()
    if way == "auxfast":
        return derivatives(lambda x: loss_image(x, phi, network), losses, tangent, [phi])
    layout = torch.channels_last if way == _CHANNELS_LAST else torch.contiguous_format
    eager = eager_loss_image(network, phi).to(device, memory_format=layout)
    given = losses.clone(memory_format=layout), tangent.clone(memory_format=layout), list(eager.parameters())
    return derivatives(lambda x: eager(x).mean() + x[:, 0].mean(), *given)


@contextmanager
def _convolutions(tf32: bool, benchmark: bool) -> Iterator[None]:
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = tf32, benchmark
    yield
    cudnn.allow_tf32, cudnn.benchmark = before


def loss_images(section: Section) -> None:
    """Against torch.nn as it comes, with TF32 in convolutions; in float32; and at its best: channels_last, and the
    convolutions that cuDNN has found to be the fastest."""
    shapes = [(2, 3, 8, 16)] if section.small else [(2, 3, 288, 384), (8, 3, 1024, 2048)]
    for shape, kind in product(shapes, KINDS):

        def make(way: str, shape: tuple[int, ...] = shape, kind: str = kind) -> Callable[[int], Call]:
            return lambda _: loss_image_calls(way, shape, section.device)[kind]

        contexts = {
            "torch.nn": _convolutions(tf32=True, benchmark=False),
            "torch.nn, float32": _convolutions(tf32=False, benchmark=False),
            _CHANNELS_LAST: _convolutions(tf32=True, benchmark=True),
        }
        ways = {way: make(way) for way in ("auxfast", *contexts)}
        section.compare(f"{' x '.join(map(str, shape))}, {kind}", ways, launches=kind == "full", contexts=contexts)


def compiled(section: Section) -> None:
    """The Hessian product of the combiner as Inductor compiles it, forward over reverse, which takes no graph of a
    gradient along."""
    for batch, num_losses in [(64, 4)] if section.small else [(64, 4), (65536, 4)]:

        def inductor(seed: int, size: tuple[int, int] = (batch, num_losses)) -> Call:
            torch.manual_seed(seed)
            eager = EagerCombiner(NonlinearCombiner(size[1], HIDDEN)).to(section.device)
            phi = {name: parameter.detach() for name, parameter in eager.named_parameters()}
            losses, tangent = torch.rand(size, device=section.device), torch.randn(size, device=section.device)

            def hessian(x: Tensor, t: Tensor) -> Tensor:
                gradient = grad(lambda x: functional_call(eager, phi, (x,)))
                return jvp(gradient, (x,), (t,))[1]

            backend = "aot_eager" if section.small else "inductor"  # a dry run compiles nothing
            call = torch.compile(hessian, backend=backend)
            return lambda: call(losses, tangent)

        def ours(seed: int, size: tuple[int, int] = (batch, num_losses)) -> Call:
            return combiner_calls("auxfast", *size, section.device, seed)["Hessian"]

        section.compare(f"{batch} x {num_losses}, Hessian", {"auxfast": ours, "Inductor": inductor})
