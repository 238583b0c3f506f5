"""clamp() keeps networks monotone, and a row that it leaves without a direction alive."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auxfast.compat.auxilearn import hypernet
from compat import transcription
from compat.cases import CASES, LOSSES, MAIN, MONO


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", MONO)
def test_as_described(name, normalize):
    case = CASES[name]
    ours, theirs = case.pair(normalize)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.view(-1)[1::2] *= -1
    ours.load_state_dict(theirs.state_dict())
    ours.clamp()
    transcription.clamp(theirs)
    given = theirs.state_dict()
    assert all(torch.equal(value, given[key]) for key, value in ours.state_dict().items())
    losses = case.losses(dtype=torch.float32)
    (gradient,) = torch.autograd.grad(ours(losses), losses)
    assert (gradient >= 0).all()


@pytest.mark.parametrize("kind", [hypernet.MonoNonlinearHyperNet, hypernet.MonoNoFCCNNHyperNet])
def test_biases_with_clamp_bias(kind):
    net = kind(0, input_dim=3) if kind is hypernet.MonoNonlinearHyperNet else kind(0)
    bias = next(p for p in net.parameters() if p.dim() == 1)
    nn.init.constant_(bias, -1)
    net.clamp()
    assert (bias == -1).all()
    net.clamp_bias = True
    net.clamp()
    assert (bias == 0).all()


@pytest.mark.parametrize("name", [name for name in MONO if "tanh" not in name])
def test_rows_of_zeros_stay_finite_and_can_grow(name):
    case = CASES[name]
    ours, _ = case.pair(normalize=True)
    layer = next(module for module in ours.modules() if hasattr(module, "weight_v"))
    with torch.no_grad():
        layer.weight_v[0] = -1
    ours.clamp()
    assert (layer.weight[0] == 0).all()
    losses = case.losses(dtype=torch.float32)
    gradients = torch.autograd.grad(ours(losses), [losses, *ours.parameters()], create_graph=True)
    second = torch.autograd.grad(gradients[0].square().sum(), layer.weight_g)
    assert all(gradient.isfinite().all() for gradient in (*gradients, *second))
    (to_length,) = torch.autograd.grad(ours(losses), layer.weight_g)
    assert to_length[0].item() > 0  # the row can grow again
    others = layer.weight_v[1:]
    assert torch.equal(others, case.pair(normalize=True)[0].get_parameter(_name_of(ours, layer))[1:])


def _name_of(net, layer):
    return next(name for name, module in net.named_modules() if module is layer) + ".weight_v"


def test_weights_that_start_at_zero():
    net = hypernet.MonoLinearHyperNet(MAIN, LOSSES, skip_connection=True, init_value=0.0)
    losses = torch.rand(3, LOSSES, requires_grad=True)
    net(losses).backward()
    assert net.linear.weight_g.grad.isfinite().all()
    torch.testing.assert_close(net(losses), losses[:, MAIN].mean())


def test_zeros_loaded_and_clamped():
    net = hypernet.MonoLinearHyperNet(MAIN, LOSSES)
    net.load_state_dict({"linear.weight_g": torch.ones(1, 1), "linear.weight_v": torch.zeros(1, LOSSES)})
    net.clamp()
    assert (net.linear.weight == 0).all()
