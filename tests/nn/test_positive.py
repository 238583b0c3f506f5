"""Weights kept positive by clipping, or by phi that holds their logarithms."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import auxfast
from auxfast import reference_kernels
from auxfast.nn import Combiner, LinearCombiner, NonlinearCombiner, PolynomialCombiner

from .every_combiner import ALL, losses_of, moved
from .test_combiners import disturbed, normal
from .test_state import by_layers

# Forward-mode AD and Dynamo, on their first use, touch what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")

MOST_ADDED = 2e-3  # of a value, by zeros that became logarithms


def with_zeros(combiner: Combiner) -> Combiner:
    """The combiner with a weight of 0 in every second place, as clipping leaves them."""
    combiner = moved(combiner)
    with torch.no_grad():
        for name, part in combiner.layers().items():
            if not name.endswith("bias") and part.dim():
                part[..., ::2] = 0
    return combiner


# -------------------------------------------------------------------------------------------------------- the two maps


@ALL
def test_phi_holds_logarithms_of_all_but_biases(make):
    combiner = disturbed(make(3, main=0, positive="exp"))
    twin = make(3, main=0).double()
    with torch.no_grad():
        for (name, part), weights in zip(combiner.layers().items(), twin.layers().values(), strict=True):
            weights.copy_(part if name.endswith("bias") else part.exp())
    losses = losses_of(combiner)
    torch.testing.assert_close(combiner(losses), twin(losses))
    torch.testing.assert_close(combiner.loss_weights(losses), twin.loss_weights(losses))
    assert combiner.loss_weights(losses).min() > 0


@ALL
def test_both_start_equal(make):
    torch.manual_seed(0)
    clip = make(3, main=0)
    torch.manual_seed(0)
    exp = make(3, main=0, positive="exp")
    rtol = MOST_ADDED if isinstance(clip, PolynomialCombiner) else 1e-5
    losses = losses_of(clip).float()
    torch.testing.assert_close(exp(losses), clip(losses), rtol=rtol, atol=0)
    torch.manual_seed(0)
    exp.reset_parameters()
    torch.testing.assert_close(exp(losses), clip(losses), rtol=rtol, atol=0)


@ALL
def test_conversion_keeps_the_function_both_ways(make):
    combiner = moved(make(3, main=0))
    losses, phi = losses_of(combiner), combiner.phi.detach().clone()
    value, weights = combiner(losses), combiner.loss_weights(losses)
    for positive in ("exp", "exp", "clip"):
        assert combiner.positive_(positive) is None
        assert combiner.positive == positive
        torch.testing.assert_close(combiner(losses), value)
        torch.testing.assert_close(combiner.loss_weights(losses), weights)
    torch.testing.assert_close(combiner.phi.detach(), phi)


@ALL
def test_zeros_become_small_weights(make):
    combiner = with_zeros(make(3, main=0))
    losses = losses_of(combiner)
    value = combiner(losses)
    before = {name: part.detach().clone() for name, part in combiner.layers().items()}
    combiner.positive_("exp")
    combiner.positive_("clip")
    for name, part in combiner.layers().items():
        was = before[name]
        torch.testing.assert_close(part[was != 0], was[was != 0])
        if not name.endswith("bias"):
            assert (part > 0).all()
            assert was.sum() <= part.sum() <= was.sum() * 1.001
    torch.testing.assert_close(combiner(losses), value, rtol=0.01, atol=0)


def test_a_combiner_of_nothing_but_zeros_has_small_weights():
    combiner = LinearCombiner(3, init_value=0.0, positive="exp")
    torch.testing.assert_close(combiner.phi.exp().detach(), torch.full((3,), 1e-3))


@ALL
def test_projection_leaves_logarithms(make):
    combiner = disturbed(make(3, main=0, positive="exp"), size=2.0)
    before = combiner.phi.clone()
    combiner.project_()
    assert torch.equal(combiner.phi, before)


def test_a_weight_that_was_clipped_to_0_may_be_lost_and_one_in_logarithms_is_not():
    gradients = {}
    for positive in ("clip", "exp"):
        combiner = NonlinearCombiner(1, (1, 1), positive=positive, bias=False).double()
        with torch.no_grad():
            combiner.phi.fill_(0.0 if positive == "clip" else -7.0)  # exp(-7) is 0.001
        combiner(torch.ones(4, 1).double()).backward()
        gradients[positive] = combiner.phi.grad
    assert not gradients["clip"][:-1].any()
    assert (gradients["exp"] > 0).all()


def test_nothing_projects_logarithms_and_no_warning_says_so():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        combiner = NonlinearCombiner(3, positive="exp")
        auxfast.HyperOptimizer(torch.optim.SGD(combiner.parameters(), lr=1.0))
    combiner.positive_("clip")
    with pytest.warns(RuntimeWarning, match="monotone NonlinearCombiner monotone"):
        auxfast.HyperOptimizer(torch.optim.SGD(combiner.parameters(), lr=1.0))


# --------------------------------------------------------------------------------------------------------- derivatives


@ALL
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_and_gradgradcheck(make, reduction):
    combiner = disturbed(make(2, main=0, reduction=reduction, positive="exp"))
    losses = losses_of(combiner, 2)
    mask = normal(*losses.shape, seed=3) > -0.5

    def function(losses: Tensor, phi: Tensor) -> Tensor:
        return functional_call(combiner, {"phi": phi}, (losses, mask))

    given = losses.requires_grad_(), combiner.phi.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@ALL
def test_kernels_and_reference_agree(make):
    combiner = disturbed(make(3, main=1, positive="exp"))
    results = []
    for context in (auxfast.engine_only, reference_kernels):
        losses = losses_of(combiner, 5).requires_grad_()
        wrt = losses, combiner.phi
        with context():
            value = combiner(losses)
        first = torch.autograd.grad(value, wrt, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), wrt, materialize_grads=True)
        results.append((value, *first, *second))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)


def test_a_huge_bias_makes_no_nan():
    combiner = NonlinearCombiner(3, (4, 2), positive="exp")
    with torch.no_grad():
        combiner.layers()["0.bias"].fill_(500.0)  # exp(500) is inf
    value = combiner(torch.rand(4, 3))
    value.backward()
    assert value.isfinite()
    assert combiner.phi.grad.isfinite().all()


@pytest.mark.slow
@ALL
def test_torch_compile(make):
    combiner = moved(make(3, main=0, positive="exp"))
    losses = losses_of(combiner)
    torch.compiler.reset()
    compiled = torch.compile(combiner, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(losses), combiner(losses))
    gradients = [torch.autograd.grad(f(losses), combiner.phi)[0] for f in (compiled, combiner)]
    torch.testing.assert_close(*gradients)


# -------------------------------------------------------------------------------------------------------------- state

PAIRS = pytest.mark.parametrize(("saved", "here"), [("clip", "exp"), ("exp", "clip"), ("exp", "exp")])


@ALL
@PAIRS
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_either_map_loads_into_either(make, saved, here, assign):
    combiner, other = moved(make(3, main=0, positive=saved)), make(3, main=0, positive=here).double()
    assert list(combiner.state_dict()) == ["phi"]
    other.load_state_dict(copy.deepcopy(combiner.state_dict()), assign=assign)
    assert other.positive == here
    torch.testing.assert_close(other(losses_of(other)), combiner(losses_of(combiner)))


@ALL
def test_logarithms_load_on_the_meta_device(make):
    combiner = moved(make(3, main=0, positive="exp"))
    with torch.device("meta"):
        other = make(3, main=0, positive="exp")
    other.load_state_dict(combiner.state_dict(), assign=True)
    assert torch.equal(other(losses_of(other)), combiner(losses_of(combiner)))
    with torch.device("meta"):
        other = make(3, main=0, positive="exp")
    other.to_empty(device="cpu").reset_parameters()
    assert other(losses_of(other).float()).isfinite()


@ALL
def test_a_checkpoint_of_an_earlier_version_holds_weights(make):
    combiner = moved(make(3, main=0))
    for state in (nn.ModuleDict({"c": combiner}).state_dict(), by_layers(nn.ModuleDict({"c": combiner}))):
        earlier = nn.ModuleDict({"c": combiner}).state_dict()
        metadata = {"": {"version": 1}, "c": {"version": 1}}
        if "c.phi" in state:
            metadata["c"]["layers"] = earlier._metadata["c"]["layers"]
        given = type(earlier)(state)
        given._metadata = metadata
        other = nn.ModuleDict({"c": make(3, main=0, positive="exp").double()})
        other.load_state_dict(given)
        torch.testing.assert_close(other["c"](losses_of(combiner)), combiner(losses_of(combiner)))


@ALL
def test_a_state_without_metadata_is_taken_as_it_is(make):
    combiner, other = moved(make(3, main=0, positive="exp")), make(3, main=0, positive="exp").double()
    for state in ({k: v.clone() for k, v in combiner.state_dict().items()}, get_model_state_dict(combiner)):
        other.reset_parameters()
        set_model_state_dict(other, state)
        assert torch.equal(other.phi, combiner.phi)


def test_negative_weights_have_no_logarithm():
    free, other = NonlinearCombiner(3, (4,), monotone=False), NonlinearCombiner(3, (4,), positive="exp")
    before = other.phi.detach().clone()
    with torch.no_grad():
        free.layers()["0.bias"].fill_(-1.0)
    other.load_state_dict(free.state_dict())
    with torch.no_grad():
        free.layers()["0.weight"][0, 0] = -1
        other.phi.copy_(before)
    with pytest.raises(RuntimeError, match=r"phi holds negative weights, .*: project_\(\) before saving, or p"):
        other.load_state_dict(free.state_dict())
    assert torch.equal(other.phi, before)


@ALL
@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies(make, how):
    combiner = moved(make(3, main=0, positive="exp"))
    twin = how(combiner)
    assert twin.positive == "exp"
    assert torch.equal(twin(losses_of(twin)), combiner(losses_of(combiner)))
    twin.float()
    torch.testing.assert_close(twin(losses_of(twin).float()), combiner(losses_of(combiner)).float())


@ALL
def test_averaged_models_average_logarithms(make):
    combiner = moved(make(3, main=0, positive="exp"))
    averaged = AveragedModel(combiner, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(combiner)
    torch.testing.assert_close(averaged(losses_of(combiner)), combiner(losses_of(combiner)))


def test_repr_says_so():
    assert "positive='exp'" in repr(NonlinearCombiner(3, positive="exp"))
    assert "positive" not in repr(NonlinearCombiner(3))


@ALL
def test_argument_errors(make):
    with pytest.raises(ValueError, match="positive must be one of clip, exp, got 'log'"):
        make(3, positive="log")
    with pytest.raises(ValueError, match="positive='exp' needs monotone=True: its weights are never negative"):
        make(3, positive="exp", monotone=False)
    combiner = make(3, monotone=False)
    with pytest.raises(ValueError, match="positive='exp' needs monotone=True"):
        combiner.positive_("exp")
    with pytest.raises(ValueError, match="positive must be one of clip, exp, got None"):
        combiner.positive_(None)


@pytest.mark.parametrize("make", [LinearCombiner, PolynomialCombiner])
def test_a_negative_start_has_no_logarithm(make):
    with pytest.raises(ValueError, match=r"init_value must be at least 0 with positive='exp', got -1\.0"):
        make(3, init_value=-1.0, positive="exp")


def test_a_state_without_metadata_that_would_be_mistaken_for_weights_is_refused():
    saved, other = NonlinearCombiner(3, (4,), positive="exp"), NonlinearCombiner(3, (4,))
    before = other.phi.detach().clone()
    with pytest.raises(RuntimeError, match=r"phi holds negative weights: .* call positive_\('exp'\) before loading it"):
        other.load_state_dict(dict(saved.state_dict()))
    assert torch.equal(other.phi, before)


def test_layers_of_an_earlier_version_are_weights_with_and_without_metadata():
    saved, other = NonlinearCombiner(3, (4,)), NonlinearCombiner(3, (4,), positive="exp")
    other.load_state_dict({name: part.detach() for name, part in saved.layers().items()})
    losses = torch.rand(5, 3)
    torch.testing.assert_close(other(losses), saved(losses))


@ALL
def test_a_parametrized_phi_cannot_be_written_to(make):
    combiner = torch.nn.utils.parametrize.register_parametrization(make(3), "phi", nn.Identity())
    for change in (lambda: combiner.positive_("exp"), lambda: combiner.scale_(2.0)):
        with pytest.raises(RuntimeError, match="phi is parametrized"):
            change()
    assert combiner.positive == "clip"


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("positive", ["clip", "exp"])
def test_a_factor_that_weights_cannot_be_scaled_by_is_refused(positive, factor):
    combiner = LinearCombiner(3, positive=positive)
    with pytest.raises(ValueError, match="factor must be above 0 and finite"):
        combiner.scale_(factor)
    assert combiner.loss_weights(torch.ones(1, 3)).tolist() == [[1.0, 1.0, 1.0]]
