"""What the combiners compute: against plain torch.nn networks and formulas written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from math import comb, prod
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from auxfast import reference_kernels
from auxfast.nn import Combiner, ConvCombiner, DeepLinearCombiner, LinearCombiner, NonlinearCombiner, PolynomialCombiner

REDUCTIONS = ["mean", "sum", "none"]
MAKERS: dict[str, Callable[..., Combiner]] = {
    "linear": LinearCombiner,
    "deep linear": lambda *args, **options: DeepLinearCombiner(*args, hidden=(4, 2), **options),
    "deep linear, normalised": lambda *a, **o: DeepLinearCombiner(*a, hidden=(4, 2), weight_norm=True, **o),
    "nonlinear": lambda *args, **options: NonlinearCombiner(*args, hidden=(4, 2), **options),
    "nonlinear, normalised": lambda *a, **o: NonlinearCombiner(*a, hidden=(4, 2), weight_norm=True, **o),
    "nonlinear, no bias": lambda *args, **options: NonlinearCombiner(*args, hidden=(4,), bias=False, **options),
    "polynomial": PolynomialCombiner,
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def disturbed(combiner: Combiner, size: float = 0.3) -> Any:
    """The combiner in float64 and away from its initial values, biases and negative weights included."""
    combiner = combiner.double()
    with torch.no_grad():
        combiner.phi += size * normal(combiner.phi.numel(), seed=1)
    return combiner


def positive_losses(batch: int, num_losses: int = 3) -> Tensor:
    return normal(batch, num_losses, seed=2).exp()


def _reduced(values: Tensor, reduction: str) -> Tensor:
    return {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("main", [None, 0, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_nonlinear_is_a_plain_network(bias, main, reduction):
    combiner = disturbed(NonlinearCombiner(3, (4, 2), main, bias=bias, reduction=reduction))
    layers = combiner.layers()
    modules: list[nn.Module] = []
    for i, (inputs, width) in enumerate([(3, 4), (4, 2)]):
        modules += [nn.Linear(inputs, width, bias=bias), nn.Softplus(threshold=40)]
        modules[-2].weight = nn.Parameter(layers[f"{i}.weight"].detach())
        if bias:
            modules[-2].bias = nn.Parameter(layers[f"{i}.bias"].detach())
    losses = positive_losses(70)
    values = nn.Sequential(*modules)(losses) @ layers["out.weight"]
    if main is not None:
        values = values + losses[:, main]
    torch.testing.assert_close(combiner(losses), _reduced(values, reduction), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("main", [None, 1])
def test_linear_is_a_weighted_sum(main, reduction):
    combiner = disturbed(LinearCombiner(3, main, reduction=reduction))
    losses = positive_losses(5)
    values = (losses * combiner.phi).sum(1) + (0.0 if main is None else losses[:, main])
    torch.testing.assert_close(combiner(losses), _reduced(values, reduction))


@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize("main", [None, 2])
def test_deep_linear_is_linear_with_the_collapsed_weights(main, weight_norm):
    deep = disturbed(DeepLinearCombiner(3, (4, 5, 2), main, weight_norm=weight_norm))
    network = deep.network.split(deep.network_phi())
    assert list(network) == ["0.weight", "1.weight", "2.weight", "out.weight"]
    linear = LinearCombiner(3, main).double()
    with torch.no_grad():
        linear.phi.copy_(network["out.weight"] @ network["2.weight"] @ network["1.weight"] @ network["0.weight"])
    losses = positive_losses(70)
    torch.testing.assert_close(deep(losses), linear(losses))
    torch.testing.assert_close(deep.loss_weights(losses), linear.loss_weights(losses))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("main", [None, 1])
@pytest.mark.parametrize(("num_losses", "degree"), [(1, 3), (2, 1), (2, 2), (2, 3), (4, 3)])
def test_polynomial_is_the_sum_of_its_monomials(num_losses, degree, main, reduction):
    main = None if main is None else min(main, num_losses - 1)
    combiner = disturbed(PolynomialCombiner(num_losses, degree, main, reduction=reduction))
    assert len(set(combiner.monomials)) == combiner.phi.numel() == comb(num_losses + degree, degree) - 1
    losses = positive_losses(5, num_losses)
    terms = [w * prod(losses[:, j] for j in m) for w, m in zip(combiner.phi, combiner.monomials, strict=True)]
    values = sum(terms) + (0.0 if main is None else losses[:, main])
    torch.testing.assert_close(combiner(losses), _reduced(values, reduction))


def test_monomials_by_hand():
    assert PolynomialCombiner(2, 3).monomials == [
        *[(0,), (1,)],
        *[(0, 0), (0, 1), (1, 1)],
        *[(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)],
    ]
    combiner = PolynomialCombiner(2, 2, main=None, reduction="none").double()
    with torch.no_grad():
        combiner.phi.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert combiner(torch.tensor([[2.0, 3.0]], dtype=torch.float64)).tolist() == [2 + 6 + 12 + 24 + 45]


def test_initial_values():
    assert LinearCombiner(3, init_value=0.5).phi.tolist() == [0.5] * 3
    assert PolynomialCombiner(2, 2, init_value=0.5).phi.tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]
    torch.manual_seed(0)
    combiner = NonlinearCombiner(50, (40, 30))
    for name, part in combiner.layers().items():
        if name.endswith("bias"):
            assert not part.any()
        else:
            assert part.min() >= 0
            assert 1.5 / part.shape[-1] < part.max() <= 2 / part.shape[-1]
    with_norm = NonlinearCombiner(50, (40, 30), weight_norm=True)
    before = with_norm.network_phi().detach()
    assert torch.equal(before, with_norm.network_phi())
    torch.manual_seed(0)
    combiner.reset_parameters()
    torch.manual_seed(0)
    with_norm.reset_parameters()
    torch.testing.assert_close(with_norm.network_phi(), combiner.phi)  # length times direction is what was drawn


@pytest.mark.parametrize("cls", [Combiner, LinearCombiner, NonlinearCombiner, ConvCombiner])
def test_a_call_is_typed_as_a_tensor(cls):
    """nn.Module's is typed Any, so a type checker would not see `combiner(losses).backwards()`."""
    assert get_type_hints(cls)["__call__"] == Callable[..., Tensor]


# ------------------------------------------------------------------------------------------------------- loss weights


@EVERY
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_weights_are_each_samples_own(make, reduction):
    combiner = disturbed(make(3, main=1, reduction=reduction))
    losses = positive_losses(7)
    weights = combiner.loss_weights(losses)
    assert weights.shape == losses.shape
    assert weights.grad_fn is None
    assert not weights.requires_grad
    assert combiner.phi.grad is None
    torch.testing.assert_close(weights[2:4], combiner.loss_weights(losses[2:4]))
    given = losses.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(combiner(given).sum(), given)
    torch.testing.assert_close(weights, gradient * (7 if reduction == "mean" else 1))
    with torch.no_grad():
        assert torch.equal(combiner.loss_weights(losses), weights)
    assert not losses.requires_grad


@EVERY
@pytest.mark.parametrize("missing", [float("nan"), float("inf")])
def test_masked_losses_play_no_part(make, missing):
    combiner = disturbed(make(3, main=1, reduction="none"))
    losses = positive_losses(7)
    mask = normal(7, 3, seed=3) > -0.3
    assert not mask.all()
    assert not mask[:, 1].all()
    given = losses.where(mask, missing)
    torch.testing.assert_close(combiner(given, mask), combiner(losses * mask))
    weights = combiner.loss_weights(given, mask)
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(weights, combiner.loss_weights(losses * mask) * mask)


@EVERY
def test_low_precision_losses_are_combined_in_float32(make):
    combiner = make(3, main=0, reduction="none")
    losses = positive_losses(5).half().requires_grad_()
    value = combiner(losses)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, combiner(losses.float()))
    assert torch.autograd.grad(value.sum(), losses)[0].dtype == torch.float16
    assert combiner.loss_weights(losses).dtype == torch.float16
    assert combiner.half()(losses).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ monotone


@EVERY
def test_projection_makes_the_output_monotone(make):
    combiner = disturbed(make(3, main=0, reduction="none"), size=1.0)
    with torch.no_grad():
        combiner.phi[::2] *= -1
    before = {name: part.clone() for name, part in combiner.layers().items()}
    assert combiner.phi.min() < 0
    combiner.project_()
    for name, part in combiner.layers().items():
        if name.endswith("bias"):
            assert torch.equal(part, before[name])
        else:
            assert part.min() >= 0
    losses = positive_losses(20)
    value = combiner(losses)
    for column in range(3):
        step = torch.zeros(3).double().index_fill(0, torch.tensor(column), 0.1)
        assert (combiner(losses + step) >= value).all()
    assert combiner.loss_weights(losses).min() >= 0
    again = combiner.phi.clone()
    combiner.project_()
    assert torch.equal(combiner.phi, again)


@EVERY
def test_unconstrained_weights_stay_as_they_are(make):
    combiner = disturbed(make(3, monotone=False), size=1.0)
    before = combiner.phi.clone()
    combiner.project_()
    assert torch.equal(combiner.phi, before)
    assert combiner.phi.requires_grad


def test_projection_before_the_backward_raises():
    combiner = disturbed(NonlinearCombiner(3, (4, 2)))
    value = combiner(positive_losses(5))
    combiner.project_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# ------------------------------------------------------------------------------------------------------------ errors

ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no losses": (lambda: LinearCombiner(0), ValueError, "num_losses must be at least 1, got 0"),
    "negative": (lambda: LinearCombiner(-1), ValueError, "num_losses must be at least 1, got -1"),
    "polynomial of nothing": (lambda: PolynomialCombiner(0), ValueError, "num_losses must be at least 1, got 0"),
    "network of nothing": (lambda: NonlinearCombiner(0), ValueError, "num_losses must be at least 1, got 0"),
    "main": (lambda: LinearCombiner(3, 3), ValueError, "main must be None or a column 0 to 2, got 3"),
    "polynomial's main": (lambda: PolynomialCombiner(3, main=-1), ValueError, "main must be None .*, got -1"),
    "network's main": (lambda: DeepLinearCombiner(3, main=4), ValueError, "main must be None .*, got 4"),
    "degree": (lambda: PolynomialCombiner(3, 0), ValueError, "degree must be at least 1, got 0"),
    "hidden": (lambda: NonlinearCombiner(3, ()), ValueError, r"hidden must hold .*, got \(\)"),
    "width": (lambda: DeepLinearCombiner(3, (3, 0)), ValueError, r"hidden must hold .*, got \(3, 0\)"),
    "reduction": (lambda: LinearCombiner(3, reduction="max"), ValueError, "reduction must be one of .*, got 'max'"),
    "polynomial's": (lambda: PolynomialCombiner(3, reduction="x"), ValueError, "reduction must be one of .*'x'"),
    "network's": (lambda: NonlinearCombiner(3, reduction="max"), ValueError, "reduction must be one of .*'max'"),
    "text": (lambda: LinearCombiner("3"), TypeError, "num_losses must be an int, got '3'"),
    "number": (lambda: NonlinearCombiner(2.0), TypeError, "num_losses must be an int, got 2.0"),
    "flag": (lambda: PolynomialCombiner(True), TypeError, "num_losses must be an int, got True"),
    "nothing": (lambda: LinearCombiner(None), TypeError, "num_losses must be an int, got None"),
    "main's type": (lambda: LinearCombiner(3, 1.0), TypeError, "main must be None or an int, .* of a column, got 1.0"),
    "main's flag": (lambda: NonlinearCombiner(3, main=False), TypeError, "main must be None or an int, .*, got False"),
    "one width": (
        *(lambda: NonlinearCombiner(3, hidden=10), TypeError),
        r"hidden must be a sequence, one width for each hidden layer, like hidden=\(10,\), got 10",
    ),
    "no width": (lambda: NonlinearCombiner(3, hidden=None), TypeError, r"like hidden=\(10,\), got None"),
    "0": (lambda: DeepLinearCombiner(3, hidden=0), TypeError, r"like hidden=\(10,\), got 0"),
    "digits": (lambda: NonlinearCombiner(3, hidden="10"), TypeError, r"like hidden=\(10,\), got '10'"),
    "floats": (lambda: NonlinearCombiner(3, (10.0,)), TypeError, r"hidden must hold ints, got \(10\.0,\)"),
    "flags": (lambda: NonlinearCombiner(3, (True,)), TypeError, r"hidden must hold ints, got \(True,\)"),
    "negative width": (lambda: NonlinearCombiner(3, (4, -1)), ValueError, r"hidden must hold .*, got \(4, -1\)"),
    "degree's type": (lambda: PolynomialCombiner(3, 2.5), TypeError, "degree must be an int, got 2.5"),
    "degree's flag": (lambda: PolynomialCombiner(3, True), TypeError, "degree must be an int, got True"),
    "endless": (
        *(lambda: PolynomialCombiner(10, 50), ValueError),
        "degree 50 of 10 losses has 75394027565 monomials, 1000000 at most: lower degree",
    ),
    "NaN": (lambda: LinearCombiner(3, init_value=float("nan")), ValueError, "init_value must be a finite .*, got nan"),
    "inf": (lambda: PolynomialCombiner(3, init_value=float("inf")), ValueError, "init_value must be .*, got inf"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_argument_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@EVERY
def test_input_errors(make):
    combiner = make(3, main=0)
    with pytest.raises(ValueError, match=r"losses must be \(batch, 3\), got \(5, 2\)"):
        combiner(torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"losses must be \(batch, 3\), got \(3,\)"):
        combiner(torch.ones(3))
    with pytest.raises(ValueError, match=r"mask must have the losses' shape \(5, 3\), got \(3,\)"):
        combiner(torch.ones(5, 3), torch.ones(3))
    with pytest.raises(TypeError, match=r"losses must be floating point, got torch\.int64"):
        combiner(torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"losses are torch\.float64 and phi is torch\.float32"):
        combiner(torch.ones(5, 3).double())


NO_LOSSES: dict[str, tuple[Callable[[Tensor], object], type[Exception], str]] = {
    "a list": (lambda t: [*t.T], TypeError, r"one tensor, got a list: pass torch\.stack\(\[\.\.\.\], dim=1\)$"),
    "a tuple": (lambda t: (*t.T,), TypeError, r"one tensor, got a tuple: pass torch\.stack\(\[\.\.\.\], dim=1\)$"),
    "a list of scalars": (
        *(lambda t: [*t.mean(0)], TypeError),
        r"one tensor, got a list: pass torch\.stack\(.*\), of each sample's own losses, .*reduction='none'",
    ),
    "numbers": (Tensor.tolist, TypeError, "one tensor, got a list: pass .*, of each sample's own losses"),
    "an array": (Tensor.numpy, TypeError, "one tensor, got a ndarray"),
    "a number": (lambda t: 1.0, TypeError, "one tensor, got a float"),
    "nothing": (lambda t: None, TypeError, "one tensor, got a NoneType"),
    "a function": (lambda t: lambda: t, TypeError, "one tensor, got a function"),
    "a scalar": (Tensor.mean, ValueError, r"\(batch, 3\), got \(\), of each sample's own losses, .*reduction='none'"),
    "means": (lambda t: t.mean(0), ValueError, r"\(batch, 3\), got \(3,\), of each sample's own losses"),
    "sparse": (Tensor.to_sparse, TypeError, r"dense, got torch\.sparse_coo: pass losses\.to_dense\(\)"),
}


@EVERY
@pytest.mark.parametrize(("change", "error", "message"), NO_LOSSES.values(), ids=NO_LOSSES.keys())
def test_what_is_no_tensor_of_losses_is_refused(change, error, message, make):
    combiner = make(3, main=0)
    for call in (combiner, combiner.loss_weights):
        with pytest.raises(error, match=f"losses must be {message}"):
            call(change(torch.ones(5, 3)))


BAD_MASKS: dict[str, tuple[Callable[[Tensor], object], type[Exception], str]] = {
    "NaN": (lambda t: t.index_fill(1, torch.tensor(1), torch.nan), ValueError, "hold 1 where .* and 0 .*, got nan"),
    "fractions": (lambda t: 0.5 * t, ValueError, "hold 1 where a sample has a loss and 0 where it has not, got 0.5"),
    "counts": (lambda t: 2 * t.int(), ValueError, "hold 1 where .* and 0 .*, got 2"),
    "negative": (lambda t: -t, ValueError, "hold 1 where .* and 0 .*, got -1.0"),
    "complex": (lambda t: 1j * t, ValueError, "hold 1 where .* and 0 .*, got 1j"),
    "a list": (Tensor.tolist, TypeError, "be a dense tensor, got a list"),
    "a flag": (lambda t: True, TypeError, "be a dense tensor, got a bool"),
    "sparse": (Tensor.to_sparse, TypeError, "be a dense tensor, got torch.sparse_coo"),
    "one row": (lambda t: t[0], ValueError, r"have the losses' shape \(5, 3\), got \(3,\)"),
}


@EVERY
@pytest.mark.parametrize(("change", "error", "message"), BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_what_is_no_mask_is_refused(change, error, message, make):
    combiner = make(3, main=0)
    for call in (combiner, combiner.loss_weights):
        with pytest.raises(error, match=f"mask must {message}"):
            call(torch.ones(5, 3), change(torch.ones(5, 3)))


@EVERY
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.cfloat]
)
def test_a_mask_of_0_and_1_may_have_any_dtype(make, dtype):
    combiner, losses = disturbed(make(3, main=0)), positive_losses(7)
    mask = normal(7, 3, seed=3) > -0.3
    assert torch.equal(combiner(losses, mask.to(dtype)), combiner(losses, mask))


@EVERY
def test_a_mask_without_values_is_not_read(make):
    with FakeTensorMode():
        combiner = make(3, main=0)
        assert combiner(torch.rand(4, 3), torch.ones(4, 3)).shape == ()


@pytest.mark.parametrize("make", [NonlinearCombiner, DeepLinearCombiner])
@pytest.mark.parametrize("hidden", [(65,), (4, 100, 4), (2,) * 9])
def test_a_network_too_large_for_the_kernels_is_warned_of(make, hidden):
    with pytest.warns(RuntimeWarning, match="reference: the kernels take at most 8 hidden layers of at most 64") as got:
        make(3, hidden)
    assert len(got) == 1
    assert got[0].filename == __file__


def test_the_largest_network_for_the_kernels_is_not_warned_of():
    NonlinearCombiner(300, (64,) * 8)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_combiners_compute_in_float32(make, dtype):
    """Also where weights are so large or so small that their squares leave the range of float16."""
    for size in (1e-3, 1.0, 300.0):
        combiner = disturbed(make(3, main=0)).to(dtype)
        with torch.no_grad():
            combiner.phi *= size
        twin, losses = copy.deepcopy(combiner).float(), positive_losses(5).to(dtype)
        torch.testing.assert_close(combiner(losses), twin(losses.float()))
        for function in (Combiner.project_, Combiner.reset_parameters):
            function(combiner)
            assert combiner(losses).isfinite()


def test_repr_says_what_it_is():
    assert repr(LinearCombiner(3)) == "LinearCombiner(num_losses=3, main=None, monotone=True, reduction='mean')"
    assert "degree=3" in repr(PolynomialCombiner(3, 3, main=1))
    nonlinear = repr(NonlinearCombiner(3, [4, 2], monotone=False, weight_norm=True, reduction="sum"))
    for part in ("main=0", "monotone=False", "reduction='sum'", "hidden=(4, 2)", "bias=True", "weight_norm=True"):
        assert part in nonlinear


@EVERY
@pytest.mark.parametrize("native", [True, False])
def test_autocast_does_not_touch_the_losses_digits(make, native):
    combiner, losses = make(4), torch.rand(16, 4)
    with nullcontext() if native else reference_kernels():
        expected = combiner(losses)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(combiner(losses), expected)
