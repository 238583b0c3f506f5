"""The loss image's kernels against the reference in float64: every size, option and memory layout that matters."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from auxfast.ops.loss_image import loss_image, loss_image_reference
from auxfast.ops.network import LossImageNetwork

from .combiner_cases import assert_agree, normal
from .loss_image_cases import TOLERANCES, inputs, name, of_kernels, of_reference

# Sizes around a pool, around a vector of 16 column pairs, around a tile of 288 columns and a band of 256 rows; primes.
IMAGES = [(1, 1), (1, 2), (2, 1), (1, 37), (37, 1), (2, 2), (3, 3), (5, 7), (8, 8), (13, 17), (31, 33), (16, 64)]
IMAGES += [(67, 5), (3, 131), (6, 288), (5, 577), (520, 6), (1031, 9)]
CHANNELS = [(8, 16), (8, 16, 32), (1,), (3,), (64, 5), (2, 5, 3, 4)]


def _options(height: int, width: int, channels: tuple[int, ...]) -> LossImageNetwork:
    """Some combination of the other options, another one for each size."""
    pick = random.Random(f"{height} {width} {channels}").choice
    num_losses = pick([1, 2, 3, 7, 16])
    main, main_reduction = pick([None, 0, num_losses - 1]), pick(["mean", "sum", "valid_mean"])
    activation, reduction = pick(["softplus", "softplus", "identity"]), pick(["mean", "sum", "none"])
    return LossImageNetwork(num_losses, channels, activation, main, main_reduction, reduction)  # type: ignore[arg-type]


SIZES = [(image, _options(*image, channels)) for image, channels in product(IMAGES, CHANNELS)]


def _assert_agrees_in_both_dtypes(network: LossImageNetwork, batch: int, height: int, width: int) -> None:
    given = inputs(network, batch, height, width, torch.float32)
    wanted = of_reference(network, *given)
    for dtype, tolerances in TOLERANCES.items():
        assert_agree(of_kernels(network, *(t.to(dtype) for t in given)), wanted, tolerances)


@pytest.mark.parametrize(("image", "network"), SIZES, ids=[f"{h}x{w}-{name(network)}" for (h, w), network in SIZES])
def test_agrees_with_the_reference_at_any_size(image, network):
    for batch in (1, 3, 37) if image[0] * image[1] < 300 else (1, 2):
        _assert_agrees_in_both_dtypes(network, batch, *image)


OPTIONS = [
    LossImageNetwork(3, channels, activation, main, main_reduction, reduction)  # type: ignore[arg-type]
    for channels, activation, main, main_reduction, reduction in product(
        [(8, 16), (5,)], ["softplus", "identity"], [None, 0, 2], ["mean", "sum"], ["mean", "sum", "none"]
    )
]


@pytest.mark.parametrize("network", OPTIONS, ids=map(name, OPTIONS))
def test_agrees_with_the_reference_for_any_options(network):
    given = inputs(network, 5, 14, 23)
    assert_agree(of_kernels(network, *given), of_reference(network, *given), TOLERANCES[torch.float64])


@pytest.mark.parametrize("shape", [(2, 288, 384), (1, 640, 65)])
def test_digits_of_large_images(shape):
    _assert_agrees_in_both_dtypes(LossImageNetwork(3, (8, 16), main=0), *shape)


def test_gradients_and_tangents_of_both_signs():
    network = LossImageNetwork(3, (8, 16), main=2, reduction="none")
    losses, phi, grad, tangent = inputs(network, 9, 20, 30)
    given = losses, phi, grad * normal(9, seed=1).sign(), tangent * normal(*tangent.shape, seed=2).sign()
    assert_agree(of_kernels(network, *given), of_reference(network, *given), TOLERANCES[torch.float64])


def test_value_alone_is_the_value_with_a_graph():
    for reduction in ("mean", "none"):
        network = LossImageNetwork(3, (8, 16), main=2, reduction=reduction)
        losses, phi, *_ = inputs(network, 5, 21, 18, torch.float32)
        value = loss_image(losses, phi, network)
        assert not value.requires_grad
        assert torch.equal(value, loss_image(losses.requires_grad_(), phi, network))
        with torch.no_grad():
            assert torch.equal(value, loss_image(losses, phi, network))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_reference_is_the_network_of_modules(depth):
    """Every pool leaves something at these sizes, some of which are odd."""
    network = LossImageNetwork(3, (8, 16, 32)[:depth], main=1)
    losses, phi, *_ = inputs(network, 2, 21, 30)
    modules: list[nn.Module] = []
    for inner, outer in zip((3, *network.channels), network.channels, strict=False):
        modules += [nn.Conv2d(inner, outer, 3, padding=1), nn.Softplus(threshold=40), nn.AvgPool2d(2)]
    eager = nn.Sequential(*modules, nn.Conv2d(network.channels[-1], 1, 1, bias=False)).double()
    for parameter, part in zip(eager.parameters(), network.split(phi).values(), strict=True):
        parameter.data = part.view(parameter.shape)
    wanted = eager(losses).mean() + losses[:, 1].mean()
    torch.testing.assert_close(loss_image_reference(losses, phi, network), wanted.detach(), rtol=1e-13, atol=0)


def test_pools_do_nothing_along_a_dimension_of_size_1():
    network = LossImageNetwork(1, (1, 1), "identity", reduction="sum")
    phi = torch.zeros(network.num_parameters, dtype=torch.float64)
    for part in ("0.weight", "1.weight"):
        network.split(phi)[part][0, 0, 1, 1] = 1  # the convolutions are identities
    network.split(phi)["out.weight"].fill_(1)
    column = torch.arange(1.0, 8.0).double().view(1, 1, 7, 1)
    value = loss_image(column, phi, network)
    assert value.item() == pytest.approx((1 + 2 + 3 + 4) / 4)  # 7 rows, then 3, then 1; the last of each is dropped
    assert torch.equal(value, loss_image(column.mT, phi, network))
    assert loss_image(column[:, :, 2:3], phi, network).item() == 3


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "sliced": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2] if t.dim() else t,
    "first image expanded": lambda t: t[:1].expand_as(t) if t.dim() else t,
    "one number expanded": lambda t: t.flatten()[0].expand_as(t),
    "off by one element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", range(4), ids=["losses", "phi", "grad", "tangent"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_inputs_of_any_layout(layout, which, dtype):
    network = LossImageNetwork(3, (4, 6), main=1, reduction="none")
    given = list(inputs(network, 3, 9, 14, dtype))
    given[which] = layout(given[which])
    dense = [t.contiguous() for t in given]
    assert_agree(of_kernels(network, *given), of_reference(network, *dense), TOLERANCES[dtype])


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 12, 33), (1, 530, 5)])
@pytest.mark.parametrize("num_tangents", [0, 1, 3])
def test_several_tangents_are_each_alone(num_tangents, shape):
    network = LossImageNetwork(3, (4, 6), main=0, reduction="none")
    losses, phi, grad, _ = inputs(network, *shape, torch.float32)
    tangents = normal(num_tangents, *losses.shape, seed=9, dtype=torch.float32)
    later = grad, losses, phi, losses.new_empty(0), network.packed
    grad_losses, grad_phi = torch.ops.auxfast.loss_image_second_order(tangents, *later)
    assert grad_losses.shape == tangents.shape
    assert grad_phi.shape == (num_tangents, network.num_parameters)
    assert torch.equal(torch.ops.auxfast.loss_image_hessian(tangents, *later), grad_losses)
    for i, tangent in enumerate(tangents):
        alone = torch.ops.auxfast.loss_image_second_order(tangent, *later)
        assert torch.equal(alone[0], grad_losses[i])
        assert torch.equal(alone[1], grad_phi[i])
        assert torch.equal(torch.ops.auxfast.loss_image_hessian(tangent, *later), grad_losses[i])


def test_network_describes_phi():
    network = LossImageNetwork(3, (4, 2))
    shapes = {"0.weight": (4, 3, 3, 3), "0.bias": (4,), "1.weight": (2, 4, 3, 3), "1.bias": (2,), "out.weight": (2,)}
    assert network.shapes == shapes
    assert network.num_parameters == 108 + 4 + 72 + 2 + 2
    phi = torch.arange(network.num_parameters)
    parts = network.split(phi)
    assert {part: tuple(t.shape) for part, t in parts.items()} == shapes
    assert torch.equal(torch.cat([t.flatten() for t in parts.values()]), phi)
    assert parts["0.weight"].data_ptr() == phi.data_ptr()


def test_only_kernels_for_cuda_save():
    network = LossImageNetwork(2, (3,))
    losses, phi, grad, tangent = inputs(network, 2, 5, 6)
    with pytest.raises(RuntimeError, match="only the kernels for CUDA can save"):
        torch.ops.auxfast.loss_image_forward(losses, phi, None, network.packed, True, True)
    with pytest.raises(RuntimeError, match="saved is not what loss_image_forward returned"):
        torch.ops.auxfast.loss_image_hessian(tangent, grad, losses, phi, losses.new_zeros(3), network.packed)
