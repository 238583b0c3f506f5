"""The combiners' derivatives in the losses and in phi, and weight normalisation against torch's own."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from auxfast import reference_kernels
from auxfast.nn import NonlinearCombiner

from .test_combiners import EVERY, disturbed, normal, positive_losses


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_and_gradgradcheck(make, reduction):
    combiner = disturbed(make(2, main=0, reduction=reduction))
    mask = torch.tensor([[1, 1], [0, 1], [1, 0]])

    def function(losses: Tensor, phi: Tensor) -> Tensor:
        return functional_call(combiner, {"phi": phi}, (losses, mask))

    given = positive_losses(3, 2).requires_grad_(), combiner.phi.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@EVERY
def test_kernels_and_reference_agree(make):
    combiner = disturbed(make(3, main=1))
    results = []
    for context in (nullcontext, reference_kernels):
        losses = positive_losses(70).requires_grad_()
        wrt = losses, combiner.phi
        with context():
            value = combiner(losses)
        first = torch.autograd.grad(value, wrt, retain_graph=True)
        (gradient,) = torch.autograd.grad(value, losses, create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), wrt, materialize_grads=True)
        results.append((value, *first, *second))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-14)


# ------------------------------------------------------------------------------------------------ weight normalisation


def _torchs(combiner: NonlinearCombiner) -> tuple[nn.Sequential, list[Tensor]]:
    """The same network from nn.Linear layers under torch's weight_norm, and its parameters in the order of phi."""
    parts, modules, parameters = combiner.layers(), [], []
    names = [name.removesuffix("_v") for name in parts if name.endswith("_v")]
    for name in names:
        direction = parts[f"{name}_v"].detach().view(-1, parts[f"{name}_v"].shape[-1])
        bias = parts.get(name.replace("weight", "bias"))
        linear = nn.Linear(direction.shape[1], direction.shape[0], bias=bias is not None).double()
        parametrizations.weight_norm(linear, dim=0)
        length, torchs_direction = linear.parametrizations.weight.original0, linear.parametrizations.weight.original1
        with torch.no_grad():
            torchs_direction.copy_(direction)
            length.copy_(parts[f"{name}_g"].view(-1, 1))
            if bias is not None:
                linear.bias.copy_(bias)
        parameters += [torchs_direction, length, *([linear.bias] if bias is not None else [])]
        modules += [linear, nn.Softplus(threshold=40)]
    return nn.Sequential(*modules[:-1]), parameters


def test_weight_norm_is_torchs():
    combiner = disturbed(NonlinearCombiner(3, (4, 2), main=None, weight_norm=True, reduction="none"))
    losses, tangent = positive_losses(70).requires_grad_(), normal(70, 3, seed=5)
    network, parameters = _torchs(combiner)
    results = []
    for value, wrt in ((combiner(losses), [combiner.phi]), (network(losses).squeeze(1), parameters)):
        first = torch.autograd.grad(value.sum(), [losses, *wrt], retain_graph=True)
        (gradient,) = torch.autograd.grad(value.sum(), losses, create_graph=True)
        second = torch.autograd.grad(gradient, [losses, *wrt], tangent, allow_unused=True, materialize_grads=True)
        flat = [torch.cat([t.flatten() for t in some[1:]]) for some in (first, second)]
        results.append((value, first[0], second[0], *flat))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def _with_zero_row() -> NonlinearCombiner:
    combiner = disturbed(NonlinearCombiner(3, (4, 2), weight_norm=True))
    with torch.no_grad():
        combiner.layers()["0.weight_v"][1] = 0
    return combiner


def test_zero_rows_are_zero_with_finite_derivatives():
    combiner = _with_zero_row()
    rows = combiner.network.split(combiner.network_phi())["0.weight"]
    assert not rows[1].any()
    assert rows[0].any()
    losses = positive_losses(5).requires_grad_()
    value = combiner(losses)
    first = torch.autograd.grad(value, (losses, combiner.phi), create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), (losses, combiner.phi))
    for tensor in (value, *first, *second):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("emptied", ["0.weight_v", "1.weight_v", "out.weight_v"])
def test_rows_that_projection_clips_to_nothing_can_grow_again(emptied):
    combiner = disturbed(NonlinearCombiner(3, (4, 2), weight_norm=True))
    parts = combiner.layers()
    row = parts[emptied] if emptied.startswith("out") else parts[emptied][1]
    length_name = emptied.replace("_v", "_g")
    with torch.no_grad():
        row.copy_(-row.abs() - 0.1)
        parts[length_name].abs_().add_(0.1)
    combiner.project_()
    effective = combiner.network.split(combiner.network_phi())[emptied.removesuffix("_v")]
    assert not (effective if emptied.startswith("out") else effective[1]).any()
    torch.testing.assert_close(row.norm().item(), 1.0)
    losses = positive_losses(5)
    value = combiner(losses)
    value.backward()
    gradients = dict(zip(parts, combiner.phi.grad.split([part.numel() for part in parts.values()]), strict=True))
    length, slope = parts[length_name].view(-1), gradients[length_name]
    place = 0 if emptied.startswith("out") else 1
    assert length[place] == 0
    assert slope[place] != 0
    with torch.no_grad():
        length[place] += 0.1
    assert combiner(losses) != value


def test_projection_leaves_zero_rows_of_unconstrained_combiners():
    combiner = NonlinearCombiner(3, (4, 2), monotone=False, weight_norm=True)
    with torch.no_grad():
        combiner.layers()["0.weight_v"][1] = 0
    combiner.project_()
    assert not combiner.layers()["0.weight_v"][1].any()
