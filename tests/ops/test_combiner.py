"""The combiner's kernels against the reference in float64: every size, option and memory layout that matters."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from auxfast.ops.combiner import combiner, combiner_reference
from auxfast.ops.network import CombinerNetwork

from .combiner_cases import (
    HIDDENS,
    TOLERANCES,
    assert_agree,
    inputs,
    name,
    normal,
    of_kernels,
    of_reference,
    relative_error,
)

BATCHES = [1, 2, 31, 63, 64, 65, 513, 1300]  # around a tile of 64 and a chunk of 512
NUM_LOSSES = [1, 2, 4, 5, 11, 16, 17, 47, 48, 49, 313]  # around a vector, and around 48, where the CPU changes paths


def _options(num_losses: int, batch: int) -> CombinerNetwork:
    """Some combination of the options, another one for each size."""
    pick = random.Random(f"{num_losses} {batch}").choice
    hidden, activation, bias = pick(HIDDENS), pick(["softplus", "softplus", "identity"]), pick([True, False])
    main, reduction = pick([None, 0, num_losses - 1]), pick(["mean", "sum", "none"])
    return CombinerNetwork(num_losses, hidden, activation, bias, main, reduction)  # type: ignore[arg-type]


SIZES = [(batch, _options(num_losses, batch)) for batch, num_losses in product(BATCHES, NUM_LOSSES)]


def _assert_agrees_in_both_dtypes(network: CombinerNetwork, batch: int, device: str) -> None:
    given = inputs(network, batch, torch.float32, device)
    wanted = of_reference(network, *given)
    for dtype, tolerances in TOLERANCES.items():
        assert_agree(of_kernels(network, *(t.to(dtype) for t in given)), wanted, tolerances)


@pytest.mark.parametrize(("batch", "network"), SIZES, ids=[f"{batch}-{name(network)}" for batch, network in SIZES])
def test_agrees_with_the_reference_at_any_size(batch, network, device):
    _assert_agrees_in_both_dtypes(network, batch, device)


OPTIONS = [
    CombinerNetwork(num_losses, HIDDENS[i % len(HIDDENS)], activation, bias, main, reduction)  # type: ignore[arg-type]
    for i, (num_losses, activation, bias, main, reduction) in enumerate(
        product([5, 50], ["softplus", "identity"], [True, False], [None, 0, 4], ["mean", "sum", "none"])
    )
]


@pytest.mark.parametrize("network", OPTIONS, ids=map(name, OPTIONS))
def test_agrees_with_the_reference_for_any_options(network, device):
    given = inputs(network, 65, torch.float64, device)
    assert_agree(of_kernels(network, *given), of_reference(network, *given), TOLERANCES[torch.float64])


@pytest.mark.parametrize("num_losses", [4, 60])
def test_agrees_where_activations_are_recomputed(num_losses, device, monkeypatch):
    network, batch = CombinerNetwork(num_losses, (10,) * 5, main=1), 4096
    for limit in ("MOST_SAVED_BYTES", "MOST_SAVED_BYTES_ON_GPU"):
        monkeypatch.setattr(f"auxfast.ops.combiner.{limit}", 1 << 20)
    assert network.saved_size(batch) * 4 > 1 << 20
    _assert_agrees_in_both_dtypes(network, batch, device)


@pytest.mark.parametrize(
    ("batch", "on_cpu", "on_gpu"), [(64, True, True), (4096, False, True), (600_000, False, False)]
)
def test_activations_are_kept_as_long_as_that_pays_on_the_device(batch, on_cpu, on_gpu, device, monkeypatch):
    network, kept = CombinerNetwork(4, (64,) * 8), []

    def forward(losses: Tensor, phi: Tensor, packed: str, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        kept.append(save)
        return losses.sum(), losses, phi

    monkeypatch.setattr("auxfast.ops.combiner._forward", forward)
    losses, phi = torch.ones(batch, 4, device=device), torch.ones(network.phi_shape, device=device, requires_grad=True)
    combiner(losses, phi, network)
    assert kept == [on_gpu if losses.is_cuda else on_cpu]


@pytest.mark.parametrize("num_losses", [4, 60])
def test_gradients_and_tangents_of_both_signs(num_losses, device):
    network = CombinerNetwork(num_losses, (10, 10), main=2, reduction="none")
    losses, phi, grad, tangent = inputs(network, 700, torch.float64, device)
    signs = normal(700, num_losses, seed=1, device=device).sign()
    given = losses, phi, grad * signs[:, 0], tangent * signs
    assert_agree(of_kernels(network, *given), of_reference(network, *given), TOLERANCES[torch.float64])


def test_value_alone_is_the_value_with_a_graph():
    for network in (CombinerNetwork(4, (10, 10), main=2), CombinerNetwork(60, (10, 10), reduction="none")):
        losses, phi, *_ = inputs(network, 65, torch.float32)
        value = combiner(losses, phi, network)
        assert not value.requires_grad
        assert torch.equal(value, combiner(losses.requires_grad_(), phi, network))
        with torch.no_grad():
            assert torch.equal(value, combiner(losses, phi, network))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "sliced": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2] if t.dim() else t,
    "first sample expanded": lambda t: t[:1].expand_as(t) if t.dim() else t,
    "one number expanded": lambda t: t.flatten()[0].expand_as(t),
    "off by one element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", range(4), ids=["losses", "phi", "grad", "tangent"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_inputs_of_any_layout(layout, which, dtype, device):
    for num_losses in (5, 50):
        network = CombinerNetwork(num_losses, (10, 6), main=1, reduction="none")
        given = list(inputs(network, 65, dtype, device))
        given[which] = layout(given[which])
        dense = [t.contiguous() for t in given]
        assert_agree(of_kernels(network, *given), of_reference(network, *dense), TOLERANCES[dtype])


def _forward(losses: Tensor, phi: Tensor, network: CombinerNetwork, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.auxfast.combiner_forward(losses, phi, network.packed, save)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_losses", [5, 48, 49])
@pytest.mark.parametrize("batch", [1, 64, 1300])
def test_saved_activations_or_none_are_the_same_to_the_kernels(batch, num_losses, dtype, device):
    network = CombinerNetwork(num_losses, (7, 3, 64), main=0, reduction="mean")
    losses, phi, grad, tangent = inputs(network, batch, dtype, device)
    value, weights, saved = _forward(losses, phi, network, True)
    value2, weights2, nothing = _forward(losses, phi, network, False)
    assert torch.equal(value, value2)
    assert torch.equal(weights, weights2)
    assert (saved.numel(), nothing.numel()) == (network.saved_size(batch), 0)
    results = []
    for kept in (saved, nothing):
        gradient = torch.ops.auxfast.combiner_backward_phi(grad, losses, phi, kept, network.packed)
        second = torch.ops.auxfast.combiner_second_order(tangent, grad, losses, phi, kept, network.packed)
        results.append((gradient, *second))
    tolerance = 16 * torch.finfo(dtype).eps
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other.double()) <= tolerance


@pytest.mark.parametrize("num_losses", [5, 49])
@pytest.mark.parametrize("batch", [1, 65, 1300])
@pytest.mark.parametrize("num_tangents", [0, 1, 3])
def test_several_tangents_are_each_alone(num_tangents, batch, num_losses, device):
    network = CombinerNetwork(num_losses, (7, 3), main=0, reduction="none")
    losses, phi, grad, _ = inputs(network, batch, torch.float32, device)
    _, _, saved = _forward(losses, phi, network, True)
    tangents = normal(num_tangents, batch, num_losses, seed=9, dtype=torch.float32, device=device)
    later = grad, losses, phi, saved, network.packed
    grad_losses, grad_phi = torch.ops.auxfast.combiner_second_order(tangents, *later)
    assert grad_losses.shape == tangents.shape
    assert grad_phi.shape == (num_tangents, network.num_parameters)
    assert torch.equal(torch.ops.auxfast.combiner_hessian(tangents, *later), grad_losses)
    for i, tangent in enumerate(tangents):
        alone = torch.ops.auxfast.combiner_second_order(tangent, *later)
        assert torch.equal(alone[0], grad_losses[i])
        assert torch.equal(alone[1], grad_phi[i])
        assert torch.equal(torch.ops.auxfast.combiner_hessian(tangent, *later), alone[0])


def test_network_describes_phi():
    network = CombinerNetwork(3, (4, 2))
    shapes = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4), "1.bias": (2,), "out.weight": (2,)}
    assert network.shapes == shapes
    assert network.num_parameters == 12 + 4 + 8 + 2 + 2
    assert list(replace(network, bias=False).shapes) == ["0.weight", "1.weight", "out.weight"]
    phi = torch.arange(network.num_parameters)
    parts = network.split(phi)
    assert {part: tuple(t.shape) for part, t in parts.items()} == shapes
    assert torch.equal(torch.cat([t.flatten() for t in parts.values()]), phi)
    assert parts["0.weight"].data_ptr() == phi.data_ptr()


def test_reference_is_the_formula():
    network = CombinerNetwork(2, (2,), main=1, reduction="none")
    phi = torch.tensor([1.0, 2.0, 0.5, -1.0, 0.1, 0.2, 3.0, -2.0], dtype=torch.float64)
    losses = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    z = torch.tensor([0.3 + 2 * 0.7 + 0.1, 0.5 * 0.3 - 0.7 + 0.2], dtype=torch.float64)
    wanted = 3 * z[0].exp().log1p() - 2 * z[1].exp().log1p() + 0.7
    assert combiner_reference(losses, phi, network).item() == pytest.approx(wanted.item(), rel=1e-14)
