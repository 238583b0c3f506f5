"""What a combiner keeps: state_dict, layers, checkpoints of earlier versions, copies, and moves between dtypes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from auxfast.nn import Combiner, LinearCombiner, NonlinearCombiner, PolynomialCombiner

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


def by_layers(module: nn.Module) -> dict[str, Tensor]:
    """The state_dict of earlier versions: a combiner's layers in place of its `phi`."""
    state = {key: value for key, value in module.state_dict().items() if not key.endswith("phi")}
    for prefix, part in module.named_modules():
        if isinstance(part, Combiner):
            dot = f"{prefix}." if prefix else ""
            state |= {dot + name: layer.detach().clone() for name, layer in part.layers().items()}
    return state


@pytest.mark.parametrize("kind", MAKERS)
def test_state_dict_holds_phi_and_layers_name_its_parts(kind):
    combiner = disturbed(MAKERS[kind](3))
    state, layers = combiner.state_dict(), combiner.layers()
    assert list(state) == [name for name, _ in combiner.named_parameters()] == ["phi"]
    assert torch.equal(state["phi"], combiner.phi)
    assert list(layers) == KEYS[kind]
    assert torch.equal(torch.cat([part.flatten() for part in layers.values()]), combiner.phi)
    assert combiner.state_dict(keep_vars=True)["phi"] is combiner.phi


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


def larger_model() -> nn.ModuleDict:
    return nn.ModuleDict({"net": nn.Linear(2, 2), "combiner": NonlinearCombiner(3, (4,)), "other": LinearCombiner(2)})


@pytest.mark.parametrize("state_of", [nn.Module.state_dict, by_layers], ids=["now", "earlier"])
def test_part_of_a_larger_model(state_of):
    model = larger_model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert str(twin.load_state_dict(state_of(model))) == "<All keys matched successfully>"
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


@EVERY
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_by_layers_load(make, assign):
    combiner, other = disturbed(make(3)), make(3)
    state = by_layers(combiner)
    given = dict(state)
    other.load_state_dict(state, assign=assign)
    assert state.keys() == given.keys()  # the caller's stays as it is
    assert other.phi.dtype == (torch.float64 if assign else torch.float32)
    assert torch.equal(other.phi, combiner.phi.to(other.phi.dtype))


def test_missing_and_unexpected_keys():
    combiner = NonlinearCombiner(3, (4,))
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"phi".*Unexpected key.*"1\.weight"'):
        combiner.load_state_dict({"1.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.bias"'):
        combiner.load_state_dict({**combiner.state_dict(), "0.bias": torch.zeros(4)})


def test_missing_and_unexpected_layers():
    combiner = NonlinearCombiner(3, (4,))
    state = {**by_layers(combiner), "1.weight": torch.zeros(1)}
    del state["0.bias"]
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"0\.bias".*Unexpected key.*"1\.weight"'):
        combiner.load_state_dict(state)
    state["0.weight"] = torch.full((4, 3), 2.0)
    with torch.no_grad():
        combiner.layers()["0.bias"].fill_(7.0)
    result = combiner.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["0.bias"], ["1.weight"])
    assert (combiner.layers()["0.weight"] == 2).all()
    assert (combiner.layers()["0.bias"] == 7).all()
    wrapped = nn.ModuleDict({"c": combiner})
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"c\.0\.bias"'):
        wrapped.load_state_dict({f"c.{name}": value for name, value in state.items()})


def test_shape_mismatch_names_the_part():
    combiner, wider = NonlinearCombiner(3, (4,)), NonlinearCombiner(3, (5,))
    before = combiner.phi.clone()
    with pytest.raises(RuntimeError, match=r"phi: 0\.weight is \(5, 3\) in the checkpoint and \(4, 3\) here"):
        combiner.load_state_dict(wider.state_dict())
    with pytest.raises(RuntimeError, match=r"phi is \(25,\) in the checkpoint and \(20,\) here \(0\.weight \(4, 3\),"):
        combiner.load_state_dict(dict(wider.state_dict()))  # without the metadata that torch's own has
    with pytest.raises(RuntimeError, match=r"0\.weight is \(5, 3\) in the checkpoint and \(4, 3\) here"):
        combiner.load_state_dict(by_layers(wider))
    with pytest.raises(RuntimeError, match=r"m\.weight is \(9,\) in the checkpoint and \(3,\) here"):
        nn.ModuleDict({"m": LinearCombiner(3)}).load_state_dict({"m.weight": torch.zeros(9)})
    assert torch.equal(combiner.phi, before)


def test_another_network_of_as_many_values_is_refused():
    combiner, other = NonlinearCombiner(3, (2, 4), bias=False), LinearCombiner(18)
    assert combiner.phi.shape == other.phi.shape
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"c": combiner}).state_dict(), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match=r"c\.phi: 0\.weight is \(2, 3\) in the checkpoint and absent here"):
        nn.ModuleDict({"c": other}).load_state_dict(torch.load(file))


BROKEN = {
    "NaN": (lambda t: t.fill_(float("nan")), "holds NaN or inf in the checkpoint"),
    "inf": (lambda t: t.fill_(-float("inf")), "holds NaN or inf in the checkpoint"),
    "a string": (lambda t: "lost", "is a str in the checkpoint, must be a tensor"),
    "a number": (lambda t: 3, "is a int in the checkpoint, must be a tensor"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_checkpoints_are_refused_by_the_name_of_the_entry(change, message):
    model = larger_model()
    before = model["combiner"].phi.detach().clone()
    for state_of, key in ((nn.Module.state_dict, "combiner.phi"), (by_layers, "combiner.0.bias")):
        state = copy.deepcopy(dict(state_of(model)))
        state[key] = change(state[key])
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=rf"\s{key} {message}"):
                model.load_state_dict(state, strict=strict)
    assert torch.equal(model["combiner"].phi, before)


# -------------------------------------------------------------------------------------------------- tools of torch's


@EVERY
@pytest.mark.parametrize("state_of", [nn.Module.state_dict, by_layers], ids=["now", "earlier"])
def test_a_combiner_on_the_meta_device_is_assigned(make, state_of):
    saved = disturbed(make(3, main=1))
    with torch.device("meta"):
        combiner = make(3, main=1)
    assert combiner.phi.is_meta
    assert str(combiner.load_state_dict(state_of(saved), assign=True)) == "<All keys matched successfully>"
    assert (combiner.phi.device.type, combiner.phi.dtype) == ("cpu", torch.float64)
    losses = positive_losses(5)
    assert torch.equal(combiner(losses), saved(losses))


@EVERY
def test_a_combiner_on_the_meta_device_is_made_by_reset_parameters(make):
    torch.manual_seed(0)
    expected = make(3, main=1)
    with torch.device("meta"):
        combiner = make(3, main=1)
    combiner.to_empty(device="cpu")
    torch.manual_seed(0)
    combiner.reset_parameters()
    losses = positive_losses(5).float()
    assert torch.equal(combiner.phi, expected.phi)
    assert torch.equal(combiner(losses), expected(losses))


@EVERY
def test_an_emptied_combiner_is_loaded(make):
    """What no state_dict holds comes back too."""
    saved, combiner = make(3, main=1), make(3, main=1)
    for buffer in combiner.to_empty(device="cpu").buffers():
        buffer.zero_()
    combiner.load_state_dict(saved.state_dict())
    losses = positive_losses(5).float()
    assert torch.equal(combiner(losses), saved(losses))


@EVERY
def test_functional_call_takes_the_state_dict(make):
    combiner, losses = disturbed(make(3, main=None)), positive_losses(5)
    for other in (disturbed(make(3, main=None), 1.0), make(3, main=None).double()):
        assert torch.equal(functional_call(combiner, other.state_dict(), (losses,)), other(losses))


def test_functional_call_with_zeros_is_zero():
    combiner = LinearCombiner(3)
    zeros = {key: torch.zeros_like(value) for key, value in combiner.state_dict().items()}
    assert functional_call(combiner, zeros, (torch.ones(4, 3),)) == 0


@EVERY
def test_distributed_checkpoints_know_its_keys(make):
    combiner, other = disturbed(make(3)), make(3).double()
    state = get_model_state_dict(combiner)
    assert list(state) == ["phi"]
    set_model_state_dict(other, state)
    assert torch.equal(other.phi, combiner.phi)


@EVERY
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_average_phi(make, use_buffers):
    combiner = disturbed(make(3, main=0))
    first = combiner.phi.detach().clone()
    averaged = AveragedModel(combiner, use_buffers=use_buffers)
    averaged.update_parameters(combiner)
    with torch.no_grad():
        combiner.phi += 2
    averaged.update_parameters(combiner)
    torch.testing.assert_close(averaged.module.phi.detach(), first + 1)
    assert list(averaged.state_dict()) == ["n_averaged", "module.phi"]
    with torch.no_grad():
        combiner.phi.copy_(averaged.module.phi)
    assert torch.equal(averaged(positive_losses(5)), combiner(positive_losses(5)))


@EVERY
def test_no_two_entries_share_memory(make):
    """What safetensors asks."""
    state = nn.ModuleDict({"one": make(3), "two": make(3)}).state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state) == 2
    assert all(tensor.is_contiguous() for tensor in state.values())


# -------------------------------------------------------------------------------------------------- copies and moves


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
