"""Batches whose losses or gradients are not finite, too large or too small: no weighting remembers them."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from auxfast.weighting import WEIGHTINGS, Weighting, make_weighting

from .problems import made, network_losses, weights_of

NAMES = list(WEIGHTINGS)
EVERY = pytest.mark.parametrize("name", NAMES)
GRADIENTS = pytest.mark.parametrize("name", ["gradnorm", "gcs", "mgda"])
NAN, INF = float("nan"), float("inf")
BAD = pytest.mark.parametrize("bad", [(1, NAN, 1), (INF, 1, 1), (1, 1, -INF), (NAN, NAN, NAN), (0, NAN, 1)], ids=str)


def bad_batch(factors: tuple[float, ...], **options: Any) -> tuple[Tensor, list[torch.nn.Parameter]]:
    """Losses of a batch, times these factors."""
    losses, parameters = network_losses(3, seed=99, **options)
    return losses * torch.tensor(factors).to(losses), parameters


def without_gradient(loss: int) -> tuple[Tensor, list[Tensor]]:
    """Finite losses of which this one's gradient is NaN: the square root of 0, times 0."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    values = [w.square().sum(), (w - 3).square().sum(), (2 * w).sum()]
    values[loss] = values[loss] + ((w - w).square().sum() * 0).sqrt()
    return torch.stack(values), [w]


def state_of(weighting: Weighting) -> dict[str, Any]:
    return copy.deepcopy(weighting.state_dict())


def assert_equal_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key


@EVERY
@BAD
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_bad_batch_leaves_the_state_and_the_last_weights(name, bad, dtype, device):
    """Wherever in the training it comes; for dynamic weight average, at the end of a period too."""
    options = {"dtype": dtype, "device": device}
    weighting = made(name).to(device)
    for step in range(7):
        good = weighting(*network_losses(3, step, **options))
        before = state_of(weighting)
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = weighting(*bad_batch(bad, **options))
            assert torch.equal(found, good)
            assert (found.dtype, found.device.type) == (dtype, device)
            found += 1  # what is returned shares no memory with the state
        assert_equal_states(state_of(weighting), before)


@EVERY
@BAD
@pytest.mark.filterwarnings("ignore:A loss or its gradient is NaN or inf")
def test_good_batches_go_on_as_if_there_had_been_no_bad_one(name, bad):
    expected = weights_of(made(name), range(9))
    weighting = made(name)
    for step in range(9):
        weighting(*bad_batch(bad))
        (found,) = weights_of(weighting, range(step, step + 1))
        assert torch.equal(found, expected[step])


@EVERY
@pytest.mark.filterwarnings("ignore:A loss or its gradient is NaN or inf")
def test_before_the_first_good_batch_the_weights_are_those_for_the_start(name):
    starting = {"stl": [0, 1, 0], "mgda": [0, 1, 0]}
    assert made(name, main=1)(*bad_batch((1, 1, NAN))).tolist() == starting.get(name, [1, 1, 1])
    equal = make_weighting("equal", 3, main=1, auxiliary_weight=0.25)
    assert equal(*bad_batch((1, 1, NAN))).tolist() == [0.25, 1, 0.25]


@GRADIENTS
@pytest.mark.parametrize("loss", [0, 1, 2])
def test_a_gradient_that_is_not_finite_makes_a_bad_batch(name, loss):
    weighting = made(name)
    good = weighting(*network_losses(3, 0))
    before = state_of(weighting)
    losses, parameters = without_gradient(loss)
    assert losses.isfinite().all()
    with pytest.warns(RuntimeWarning, match="A loss or its gradient is NaN or inf"):
        assert torch.equal(weighting(losses, parameters), good)
    assert_equal_states(state_of(weighting), before)


@EVERY
def test_each_object_warns_once_of_the_line_that_calls_it(name):
    one, other = made(name), made(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for weighting in (one, one, other, one):
            weighting(*bad_batch((1, NAN, 1)))
    assert [str(warning.message).split(": ")[1].split()[0] for warning in caught] == [type(one).__name__] * 2
    assert {warning.filename for warning in caught} == {__file__}
    assert {warning.category for warning in caught} == {RuntimeWarning}


@EVERY
@pytest.mark.filterwarnings("ignore:A loss or its gradient is NaN or inf")
def test_the_last_weights_are_saved(name):
    weighting = made(name).double()
    (*_, last) = weights_of(weighting, range(5), dtype=torch.float64)
    file = io.BytesIO()
    torch.save(weighting.state_dict(), file)
    file.seek(0)
    resumed = made(name).double()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed(*bad_batch((1, 1, NAN), dtype=torch.float64)), last)


@EVERY
def test_state_dicts_of_before_0_2_load(name):
    """They have no last weights, in a larger module neither."""
    weighting = made(name)
    weights_of(weighting, range(5))
    old, new = (torch.nn.ModuleDict({"w": w}) for w in (weighting, made(name)))
    state = {key: value for key, value in old.state_dict().items() if not key.endswith("last_weights")}
    assert str(new.load_state_dict(state)) == "<All keys matched successfully>"
    for one, other in zip(weights_of(new["w"], range(5, 9)), weights_of(weighting, range(5, 9)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["uncertainty", "dwa", "gradnorm"])
def test_a_state_dict_that_holds_nan_is_refused_by_the_name_of_the_entry(name):
    model = torch.nn.ModuleDict({"w": made(name)})
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor):
            with pytest.raises(RuntimeError, match=rf"{key} holds NaN or inf in the checkpoint"):
                model.load_state_dict({**model.state_dict(), key: torch.full_like(value, NAN)})


SCALES = [
    (1, 1e37, 1),
    (1e36, 1e37, 1e36),
    (1, 1e-40, 1),
    (1e-40, 1e-42, 1e-41),
    (1e36, 1e-40, 0),
    (1e-15, 1e-18, 1e20),
]


@EVERY
@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite_losses_of_any_size_lead_to_finite_weights_and_states(name, scales, dtype):
    """Squares of float32 overflow from 1e19 and vanish from 1e-23 on. None of these batches is a bad one."""
    weighting = made(name)
    for step in range(12):
        losses, parameters = network_losses(3, step, dtype=dtype)
        if step in (1, 2, 5, 6, 7):
            losses = losses * torch.tensor(scales).to(losses)
        weights = weighting(losses, parameters)
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        assert all(buffer.isfinite().all() for buffer in weighting.buffers())
    assert weights.max() > 0


@EVERY
@pytest.mark.parametrize("present", [(), (0,), (1,), (0, 2)], ids=str)
def test_gradients_of_0_lead_to_finite_weights(name, present):
    """Losses that are not 0 while their gradients are, but for those present."""
    weighting = made(name)
    for _ in range(3):
        losses, parameters = network_losses(3, 0)
        flat = torch.stack([loss if i in present else 0 * loss + 3 for i, loss in enumerate(losses)])
        weights = weighting(flat, parameters)
        assert weights.isfinite().all()
        assert all(buffer.isfinite().all() for buffer in weighting.buffers())
