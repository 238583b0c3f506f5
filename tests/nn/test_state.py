"""What a combiner keeps: state_dict by layer names, copies, and moves between dtypes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from auxfast.nn import LinearCombiner, NonlinearCombiner, PolynomialCombiner

from .test_combiners import EVERY, MAKERS, disturbed, positive_losses

KEYS = {
    "linear": ["weight"],
    "polynomial": ["weight"],
    "deep linear": ["0.weight", "1.weight", "out.weight"],
    "deep linear, normalised": [f"{layer}.weight_{part}" for layer in ("0", "1", "out") for part in "vg"],
    "nonlinear": ["0.weight", "0.bias", "1.weight", "1.bias", "out.weight"],
    "nonlinear, normalised": [
        *["0.weight_v", "0.weight_g", "0.bias", "1.weight_v", "1.weight_g", "1.bias", "out.weight_v", "out.weight_g"]
    ],
    "nonlinear, no bias": ["0.weight", "out.weight"],
}


@pytest.mark.parametrize("kind", MAKERS)
def test_state_dict_holds_the_layers_by_name(kind):
    combiner = disturbed(MAKERS[kind](3))
    state, layers = combiner.state_dict(), combiner.layers()
    assert list(state) == list(layers) == KEYS[kind]
    for name, tensor in state.items():
        assert not tensor.requires_grad
        assert torch.equal(tensor, layers[name])
    assert sum(t.numel() for t in state.values()) == combiner.phi.numel()
    assert [name for name, _ in combiner.named_parameters()] == ["phi"]
    kept = combiner.state_dict(keep_vars=True)
    assert all(tensor.requires_grad for tensor in kept.values())


def test_layers_are_views_of_phi():
    combiner = NonlinearCombiner(3, (4, 2))
    layers = combiner.layers()
    assert [tuple(part.shape) for part in layers.values()] == [(4, 3), (4,), (2, 4), (2,), (2,)]
    with torch.no_grad():
        layers["1.bias"].fill_(7.0)
    assert combiner.phi.tolist().count(7.0) == 2
    layers["0.weight"].sum().backward()
    assert combiner.phi.grad.sum() == 12


@EVERY
def test_round_trip_through_a_file(make):
    combiner, other = disturbed(make(3)), make(3).double()
    file = io.BytesIO()
    torch.save(combiner.state_dict(), file)
    file.seek(0)
    assert str(other.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    assert torch.equal(other.phi, combiner.phi)
    assert isinstance(other.phi, nn.Parameter)
    losses = positive_losses(5)
    assert torch.equal(other(losses), combiner(losses))


def test_checkpoint_of_another_dtype_is_converted():
    combiner, other = disturbed(NonlinearCombiner(3, (4,))), NonlinearCombiner(3, (4,))
    other.load_state_dict(combiner.state_dict())
    assert other.phi.dtype == torch.float32
    assert torch.equal(other.phi, combiner.phi.float())


def test_part_of_a_larger_model():
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "combiner": NonlinearCombiner(3, (4,)), "other": LinearCombiner(2)})
    state = model.state_dict()
    assert list(state) == [
        *["net.weight", "net.bias", "combiner.0.weight", "combiner.0.bias", "combiner.out.weight", "other.weight"]
    ]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(state)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_missing_and_unexpected_keys():
    combiner = NonlinearCombiner(3, (4,))
    state = {**combiner.state_dict(), "1.weight": torch.zeros(1)}
    del state["0.bias"]
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"0\.bias".*Unexpected key.*"1\.weight"'):
        combiner.load_state_dict(state)
    state["0.weight"] = torch.full((4, 3), 2.0)
    bias = combiner.layers()["0.bias"].clone()
    result = combiner.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["0.bias"], ["1.weight"])
    assert (combiner.layers()["0.weight"] == 2).all()
    assert torch.equal(combiner.layers()["0.bias"], bias)
    wrapped = nn.ModuleDict({"c": combiner})
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"c\.0\.bias".*Unexpected key.*"c\.phi"'):
        wrapped.load_state_dict({"c.phi": torch.zeros(3), "c.0.weight": state["0.weight"]})


def test_shape_mismatch_names_the_part():
    combiner, wider = NonlinearCombiner(3, (4,)), NonlinearCombiner(3, (5,))
    before = combiner.phi.clone()
    with pytest.raises(RuntimeError, match=r"0\.weight is \(5, 3\) in the checkpoint and \(4, 3\) here"):
        combiner.load_state_dict(wider.state_dict())
    with pytest.raises(RuntimeError, match=r"m\.weight is \(9,\) in the checkpoint and \(3,\) here"):
        nn.ModuleDict({"m": LinearCombiner(3)}).load_state_dict({"m.weight": torch.zeros(9)})
    assert torch.equal(combiner.phi, before)


@EVERY
@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(make, how):
    combiner = disturbed(make(3, main=1))
    losses = positive_losses(5)
    value = combiner(losses).detach()
    twin = how(combiner)
    assert torch.equal(twin(losses), value)
    assert repr(twin) == repr(combiner)
    with torch.no_grad():
        twin.phi += 1
    assert torch.equal(combiner(losses), value)
    assert torch.equal(twin.layers()[next(iter(twin.layers()))].flatten()[0], twin.phi[0])


@EVERY
def test_moves_between_dtypes(make):
    combiner = make(3, main=1)
    phi = combiner.phi
    losses = positive_losses(5)
    single = combiner(losses.float())
    assert combiner.double() is combiner
    assert combiner.phi is phi
    double = combiner(losses)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)
    combiner.to(torch.float32)
    assert torch.equal(combiner(losses.float()), single)


def test_gradient_steps_move_phi():
    combiner = disturbed(PolynomialCombiner(2))
    optimizer = torch.optim.SGD(combiner.parameters(), lr=0.1)
    before = combiner.layers()["weight"].clone()
    combiner(positive_losses(5, 2)).backward()
    optimizer.step()
    assert (combiner.layers()["weight"] < before).all()
