"""What holds for every weighting."""

from __future__ import annotations

import io

import pytest
import torch

from auxfast.weighting import WEIGHTINGS, make_weighting

from .problems import made, network_losses, weights_of

NAMES = list(WEIGHTINGS)
USE_GRADIENTS = ["gradnorm", "gcs", "mgda"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("main", [0, 2])
def test_weights_are_detached_finite_and_as_the_losses(name, dtype, main, device):
    for weights in weights_of(made(name, main=main).to(device), range(6), dtype=dtype, device=device):
        assert weights.shape == (3,)
        assert weights.dtype == dtype
        assert weights.device.type == device
        assert not weights.requires_grad
        assert weights.isfinite().all()
        assert (weights >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_float64_throughout(name):
    """The weights of float64 are those of float32 to its precision, and carry more digits."""
    single = weights_of(made(name), range(6), dtype=torch.float32)
    double = weights_of(made(name).double(), range(6), dtype=torch.float64)
    for one, two in zip(single, double, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=2e-4, atol=1e-5)
    if name in ("uncertainty", "dwa", "gradnorm", "mgda"):
        assert any((two != two.float()).any() for two in double)


@pytest.mark.parametrize("name", NAMES)
def test_graph_and_grad_are_left_alone(name):
    losses, parameters = network_losses(3, seed=0)
    kept = torch.full_like(parameters[0], 7.0)
    parameters[0].grad = kept
    weights = made(name)(losses, parameters)
    assert parameters[0].grad is kept
    assert (kept == 7).all()
    assert all(p.grad is None for p in parameters[1:])
    (weights * losses).sum().backward()  # the graph is still there
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize("name", NAMES)
def test_returned_weights_do_not_change_later(name):
    weighting = made(name)
    first = weighting(*network_losses(3, 0))
    before = first.clone()
    weights_of(weighting, range(1, 6))
    assert torch.equal(first, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("absent", [(1,), (0,), (0, 2), (0, 1, 2)], ids=str)
def test_absent_losses(name, absent):
    """Absent at first, later, or always: no NaN, nothing remembered of them that spoils later steps."""
    weighting = made(name)
    for step, gone in enumerate([absent, (), absent, absent, (), ()]):
        losses, parameters = network_losses(3, step, gone)
        weights = weighting(losses, parameters)
        assert weights.isfinite().all()
        total = (weights * losses).sum()
        if total.requires_grad:
            total.backward()
            assert all(p.grad.isfinite().all() for p in parameters)
    assert all(buffer.isfinite().all() for buffer in weighting.buffers())


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_absent_plays_no_part(name):
    """The other weights are in the same proportions as if there had only been the others."""
    three, two = made(name, 3), made(name, 2)
    for step in range(6):
        losses, parameters = network_losses(3, step, absent=(2,))
        found, expected = three(losses, parameters), two(losses[:2], parameters)
        torch.testing.assert_close(found[:2] / found[:2].sum(), expected / expected.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_resumes_to_the_bit(name):
    weighting = made(name)
    weights_of(weighting, range(7))
    file = io.BytesIO()
    torch.save(weighting.state_dict(), file)
    file.seek(0)
    uninterrupted = weights_of(weighting, range(7, 14))
    resumed = made(name)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for ours, theirs in zip(weights_of(resumed, range(7, 14)), uninterrupted, strict=True):
        assert torch.equal(ours, theirs)
    if name in ("uncertainty", "dwa", "gradnorm"):
        fresh = weights_of(made(name), range(7, 14))  # the state mattered
        assert not all(torch.equal(ours, theirs) for ours, theirs in zip(fresh, uninterrupted, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_one_loss(name):
    weighting = made(name, num_losses=1)
    for weights in [weighting(*network_losses(1, step)) for step in range(5)]:
        assert weights.item() > 0


@pytest.mark.parametrize("name", NAMES)
def test_learns_in_buffers(name):
    """What a rule learns is in buffers: an optimizer given all parameters would otherwise move it too."""
    assert not list(made(name).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_another_shape(name):
    _, parameters = network_losses(3, 0)
    with pytest.raises(ValueError, match=r"losses must have the shape \(3,\), got \(4, 3\)"):
        made(name)(torch.ones(4, 3), parameters)


def test_one_tensor_for_parameters():
    losses, parameters = network_losses(3, 0)
    with pytest.raises(TypeError, match="parameters must be a sequence of tensors"):
        made("gcs")(losses, parameters[0])


@pytest.mark.parametrize("name", USE_GRADIENTS)
def test_nothing_to_take_gradients_in(name):
    losses, parameters = network_losses(3, 0)
    with pytest.raises(ValueError, match="nothing that requires a gradient"):
        made(name)(losses, [])
    with pytest.raises(ValueError, match="losses has no graph"):
        made(name)(losses.detach(), parameters)


@pytest.mark.parametrize("name", NAMES)
def test_losses_that_are_no_tensor_of_numbers(name):
    losses, parameters = network_losses(3, 0)
    with pytest.raises(TypeError, match=r"losses must be one tensor, got a list: pass torch\.stack\(losses\)"):
        made(name)([*losses], parameters)
    with pytest.raises(TypeError, match=r"losses must be floating point, got torch\.int64"):
        made(name)(torch.tensor([1, 2, 3]), parameters)


@pytest.mark.parametrize("name", NAMES)
def test_num_losses_and_main(name):
    for num_losses in ("3", 2.0, True):
        with pytest.raises(TypeError, match=f"num_losses must be an int, got {num_losses!r}"):
            make_weighting(name, num_losses)
    with pytest.raises(TypeError, match="main must be an int, got None"):
        make_weighting(name, 3, main=None)
    with pytest.raises(ValueError, match="num_losses must be at least 1, got 0"):
        make_weighting(name, 0)
    with pytest.raises(ValueError, match="main must be an index 0 to 2, got 3"):
        make_weighting(name, 3, main=3)


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"weighting must be one of stl, equal, .*mgda, got 'pcgrad'"):
        make_weighting("pcgrad", 3)
    with pytest.raises(ValueError, match="dwa has no option 'beta'; its options: temperature, period"):
        make_weighting("dwa", 3, beta=1)
    with pytest.raises(ValueError, match="stl has no option 'lr'; its options: none"):
        make_weighting("stl", 3, lr=1)
