"""The combiner of loss images: against the same network from torch.nn modules, and as a module."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from auxfast import reference_kernels
from auxfast.nn import ConvCombiner

from .test_combiners import disturbed, normal

NORMALISED = pytest.mark.parametrize("weight_norm", [False, True])
CHANNELS = (4, 2)


def images(batch: int = 3, num_losses: int = 3, height: int = 9, width: int = 12) -> Tensor:
    """Positive losses, of a size that pooling does not divide."""
    return normal(batch, num_losses, height, width, seed=2).exp()


def plain_network(combiner: ConvCombiner) -> tuple[nn.Sequential, list[Tensor]]:
    """The network without the main loss from torch.nn modules, and its parameters in the order of phi."""
    parts, modules, parameters = combiner.layers(), [], []
    suffix = "_v" if combiner.weight_norm else ""
    sizes = [combiner.num_losses, *combiner.network.channels, 1]
    for i, name in enumerate([*map(str, range(len(sizes) - 2)), "out"]):
        out = name == "out"
        conv = nn.Conv2d(sizes[i], sizes[i + 1], 1 if out else 3, padding=0 if out else 1, bias=not out).double()
        if combiner.weight_norm:
            parametrizations.weight_norm(conv, dim=0)
            length, weight = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
        else:
            length, weight = None, conv.weight
        with torch.no_grad():
            weight.copy_(parts[f"{name}.weight{suffix}"].view(weight.shape))
            if length is not None:
                length.copy_(parts[f"{name}.weight_g"].view(length.shape))
            if conv.bias is not None:
                conv.bias.copy_(parts[f"{name}.bias"])
        parameters += [tensor for tensor in (weight, length, conv.bias) if tensor is not None]
        modules += [conv] if out else [conv, nn.Softplus(threshold=40), nn.AvgPool2d(2)]
    return nn.Sequential(*modules), parameters


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("channels", [(4,), (4, 2), (3, 2, 2)])
@pytest.mark.parametrize(("main", "main_reduction"), [(None, "mean"), (0, "mean"), (2, "sum")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_a_plain_network(channels, main, main_reduction, reduction):
    combiner = disturbed(ConvCombiner(3, channels, main, main_reduction=main_reduction, reduction=reduction))
    losses = images()
    values = plain_network(combiner)[0](losses).mean((1, 2, 3))
    if main is not None:
        values = values + getattr(losses[:, main].flatten(1), main_reduction)(1)
    expected = {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]
    torch.testing.assert_close(combiner(losses), expected, rtol=1e-12, atol=0)


def test_the_main_loss_may_be_a_mean_over_valid_pixels():
    combiner = disturbed(ConvCombiner(2, (3,), main=1, main_reduction="valid_mean", reduction="none"))
    without = ConvCombiner(2, (3,), main=None, reduction="none").double()
    without.load_state_dict(combiner.state_dict())
    losses, mask = images(2, 2), torch.ones(2, 2, 9, 12)
    mask[0, 1, :5] = mask[1, 1] = 0  # the second image has no main loss at all
    expected = torch.stack([losses[0, 1, 5:].mean(), torch.zeros(()).double()])
    torch.testing.assert_close(combiner(losses, mask) - without(losses, mask), expected, atol=1e-12, rtol=1e-12)


@NORMALISED
def test_first_and_second_derivatives_are_the_plain_networks(weight_norm):
    combiner = disturbed(ConvCombiner(3, CHANNELS, None, weight_norm=weight_norm, reduction="none"))
    losses, tangent = images().requires_grad_(), normal(3, 3, 9, 12, seed=5)
    network, parameters = plain_network(combiner)
    results = []
    for values, wrt in ((combiner(losses), [combiner.phi]), (network(losses).mean((1, 2, 3)), parameters)):
        first = torch.autograd.grad(values.sum(), [losses, *wrt], retain_graph=True)
        (gradient,) = torch.autograd.grad(values.sum(), losses, create_graph=True)
        second = torch.autograd.grad(gradient, [losses, *wrt], tangent, allow_unused=True, materialize_grads=True)
        flat = [torch.cat([t.flatten() for t in some[1:]]) for some in (first, second)]
        results.append((values, first[0], second[0], *flat))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


@NORMALISED
def test_gradcheck_and_gradgradcheck(weight_norm):
    combiner = disturbed(ConvCombiner(2, (2, 1), weight_norm=weight_norm, main_reduction="valid_mean"))
    mask = normal(2, 2, 4, 5, seed=3) > -0.5

    def function(losses: Tensor, phi: Tensor) -> Tensor:
        return functional_call(combiner, {"phi": phi}, (losses, mask))

    given = images(2, 2, 4, 5).requires_grad_(), combiner.phi.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


# ------------------------------------------------------------------------------------------------------- loss weights


@NORMALISED
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_weights_are_each_images_own(reduction, weight_norm):
    combiner = disturbed(ConvCombiner(3, CHANNELS, main=1, weight_norm=weight_norm, reduction=reduction))
    losses = images(5)
    weights = combiner.loss_weights(losses)
    assert weights.shape == losses.shape
    assert not weights.requires_grad
    assert combiner.phi.grad is None
    torch.testing.assert_close(weights[2:4], combiner.loss_weights(losses[2:4]))
    given = losses.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(combiner(given).sum(), given)
    torch.testing.assert_close(weights, gradient * (5 if reduction == "mean" else 1))


def test_loss_weights_of_a_linear_network_by_hand():
    # Every pixel reaches the output through 9 places of each channel, but fewer at the border; with weights of 1 and
    # one channel: (places in range) / 4 of each pool, over 2 x 2 positions.
    combiner = ConvCombiner(1, (1,), main=None, activation="identity", init_range=(1.0, 1.0)).double()
    places = torch.tensor([2.0, 3.0, 3.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(combiner.loss_weights(images(1, 1, 4, 4))[0, 0], places.outer(places) / 16)


@NORMALISED
@pytest.mark.parametrize("missing", [float("nan"), float("inf")])
def test_masked_pixels_play_no_part(missing, weight_norm):
    combiner = disturbed(ConvCombiner(3, CHANNELS, main=1, weight_norm=weight_norm, reduction="none"))
    losses, mask = images(), normal(3, 3, 9, 12, seed=3) > -0.3
    given = losses.where(mask, missing)
    torch.testing.assert_close(combiner(given, mask), combiner(losses * mask))
    weights = combiner.loss_weights(given, mask)
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(weights, combiner.loss_weights(losses * mask) * mask)


def test_low_precision_losses_are_combined_in_float32():
    combiner = ConvCombiner(3, CHANNELS)
    losses = images().half().requires_grad_()
    value = combiner(losses)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, combiner(losses.float()))
    assert torch.autograd.grad(value, losses)[0].dtype == torch.float16
    assert combiner.loss_weights(losses).dtype == torch.float16
    assert combiner.half()(losses).dtype == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_autocast_does_not_touch_the_losses_digits(native):
    combiner, losses = ConvCombiner(3), images().float()
    with nullcontext() if native else reference_kernels():
        expected = combiner(losses)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(combiner(losses), expected)


# ------------------------------------------------------------------------------------- monotone, weight normalisation


@NORMALISED
def test_projection_makes_the_output_monotone(weight_norm):
    combiner = disturbed(ConvCombiner(3, CHANNELS, weight_norm=weight_norm), size=1.0)
    before = {name: part.clone() for name, part in combiner.layers().items()}
    losses = images()
    assert combiner.loss_weights(losses).min() < 0
    combiner.project_()
    for name, part in combiner.layers().items():
        assert torch.equal(part, before[name]) if name.endswith("bias") else part.min() >= 0
    assert combiner.loss_weights(losses).min() >= 0
    again = combiner.phi.clone()
    combiner.project_()
    assert torch.equal(combiner.phi, again)


def test_unconstrained_weights_stay_as_they_are():
    combiner = disturbed(ConvCombiner(3, CHANNELS, monotone=False), size=1.0)
    before = combiner.phi.clone()
    combiner.project_()
    assert torch.equal(combiner.phi, before)


def test_zero_rows_are_zero_with_finite_derivatives():
    combiner = disturbed(ConvCombiner(3, CHANNELS, weight_norm=True))
    with torch.no_grad():
        combiner.layers()["0.weight_v"][1] = 0
    rows = combiner.network.split(combiner.network_phi())["0.weight"]
    assert not rows[1].any()
    assert rows[0].any()
    losses = images().requires_grad_()
    value = combiner(losses)
    first = torch.autograd.grad(value, (losses, combiner.phi), create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), (losses, combiner.phi))
    for tensor in (value, *first, *second):
        assert tensor.isfinite().all()


def test_rows_that_projection_clips_to_nothing_can_grow_again():
    combiner = disturbed(ConvCombiner(3, CHANNELS, weight_norm=True))
    parts = combiner.layers()
    with torch.no_grad():
        parts["out.weight_v"].fill_(1.0)
        parts["out.weight_g"].fill_(1.0)
    direction, length = parts["1.weight_v"], parts["1.weight_g"]
    with torch.no_grad():
        direction[1] = -direction[1].abs() - 0.1
        length.abs_().add_(0.1)
    combiner.project_()
    assert length.tolist()[1] == 0
    assert length[0] > 0
    torch.testing.assert_close(direction[1].norm().item(), 1.0)
    combiner(images()).backward()
    slopes = dict(zip(parts, combiner.phi.grad.split([part.numel() for part in parts.values()]), strict=True))
    assert slopes["1.weight_g"][1] != 0


# ------------------------------------------------------------------------------------------------ initial values, state


def test_initial_values():
    torch.manual_seed(0)
    combiner = ConvCombiner(5, (16, 32))
    for name, part in combiner.layers().items():
        if name.endswith("bias"):
            assert not part.any()
        else:
            assert 0 <= part.min() < 0.02
            assert 0.08 < part.max() <= 0.1
    torch.manual_seed(0)
    with_norm = ConvCombiner(5, (16, 32), weight_norm=True)
    torch.testing.assert_close(with_norm.network_phi(), combiner.phi)  # length times direction is what was drawn
    wide = ConvCombiner(5, monotone=False, init_range=(-1.0, 2.0)).layers()["1.weight"]
    assert -1 <= wide.min() < -0.9
    assert 1.9 < wide.max() <= 2


def test_layers_name_the_parts_of_phi():
    combiner = ConvCombiner(3)
    assert {name: tuple(part.shape) for name, part in combiner.layers().items()} == {
        "0.weight": (8, 3, 3, 3),
        "0.bias": (8,),
        "1.weight": (16, 8, 3, 3),
        "1.bias": (16,),
        "out.weight": (16,),
    }
    normalised = ConvCombiner(3, weight_norm=True).layers()
    assert {name: tuple(normalised[name].shape) for name in normalised if name.endswith("_g")} == {
        "0.weight_g": (8,),
        "1.weight_g": (16,),
        "out.weight_g": (),
    }


@NORMALISED
@pytest.mark.parametrize("by_layers", [False, True], ids=["now", "earlier"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_checkpoints_load(device, by_layers, weight_norm):
    combiner = disturbed(ConvCombiner(3, CHANNELS, weight_norm=weight_norm))
    with torch.device(device):
        other = ConvCombiner(3, CHANNELS, weight_norm=weight_norm)
    assert list(combiner.state_dict()) == [name for name, _ in combiner.named_parameters()] == ["phi"]
    other.load_state_dict(combiner.layers() if by_layers else combiner.state_dict(), assign=True)
    assert torch.equal(other(images()), combiner(images()))


@NORMALISED
@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(how, weight_norm):
    combiner = disturbed(ConvCombiner(3, CHANNELS, weight_norm=weight_norm))
    value = combiner(images()).detach()
    twin = how(combiner)
    assert torch.equal(twin(images()), value)
    assert repr(twin) == repr(combiner)
    with torch.no_grad():
        twin.phi += 1
    assert torch.equal(combiner(images()), value)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_losses": 0}, "num_losses must be at least 1, got 0"),
        ({"main": 3}, "main must be None or a channel 0 to 2, got 3"),
        ({"channels": ()}, r"channels must hold .*, got \(\)"),
        ({"channels": (4, 0)}, r"channels must hold .*, got \(4, 0\)"),
        ({"reduction": "max"}, "reduction must be one of .*, got 'max'"),
        ({"main_reduction": "max"}, "main_reduction must be one of .*, got 'max'"),
        ({"activation": "relu"}, "activation must be one of .*, got 'relu'"),
        ({"init_range": (-0.1, 0.1)}, r"init_range must be finite .* 0 <= low <= high, got \(-0\.1, 0\.1\)"),
        ({"init_range": (0.2, 0.1), "monotone": False}, r"init_range must be .* with low <= high, got \(0\.2, 0\.1\)"),
        ({"init_range": (0.0, float("nan"))}, r"init_range must be finite .*, got \(0\.0, nan\)"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvCombiner(**{"num_losses": 3, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 8}, r"channels must be a sequence, one number for each convolution, like channels=\(8,\), got 8"),
        ({"channels": (8.0, 16)}, r"channels must hold ints, got \(8\.0, 16\)"),
        ({"num_losses": 2.0}, "num_losses must be an int, got 2.0"),
        ({"main": True}, "main must be None or an int, the index of a channel, got True"),
    ],
)
def test_arguments_of_another_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        ConvCombiner(**{"num_losses": 3, **arguments})


def test_a_network_too_large_for_the_kernels_is_warned_of():
    for arguments in ({"channels": (65,)}, {"channels": (2,) * 5}, {"num_losses": 65}):
        with pytest.warns(RuntimeWarning, match="slower PyTorch reference: the kernels take at most 4 conv"):
            ConvCombiner(**{"num_losses": 3, **arguments})


def test_input_errors():
    combiner = ConvCombiner(3)
    with pytest.raises(TypeError, match=r"losses must be one tensor, got a list: pass torch\.stack\(\[\.\.\.\]"):
        combiner([torch.ones(5, 4, 4)] * 3)
    with pytest.raises(ValueError, match=r"mask must hold 1 where a sample has a loss and 0 where it has not, got nan"):
        combiner(torch.ones(5, 3, 4, 4), torch.full((5, 3, 4, 4), torch.nan))
    with pytest.raises(ValueError, match=r"losses must be \(batch, 3, H, W\), got \(5, 3\)"):
        combiner(torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"losses must be \(batch, 3, H, W\), got \(5, 2, 4, 4\)"):
        combiner(torch.ones(5, 2, 4, 4))
    with pytest.raises(ValueError, match=r"mask must have the losses' shape \(5, 3, 4, 4\), got \(5, 1, 4, 4\)"):
        combiner(torch.ones(5, 3, 4, 4), torch.ones(5, 1, 4, 4))
    with pytest.raises(TypeError, match=r"losses are torch\.float64 and phi is torch\.float32"):
        combiner(torch.ones(5, 3, 4, 4).double())


def test_repr_says_what_it_is():
    shown = repr(ConvCombiner(3, [4, 2], monotone=False, main_reduction="sum", weight_norm=True))
    for part in ("num_losses=3", "main=0", "channels=(4, 2)", "activation='softplus'", "main_reduction='sum'"):
        assert part in shown
    assert "monotone=False" in shown
    assert "weight_norm=True" in shown
