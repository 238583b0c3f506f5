"""The total of the loss weights that a combiner keeps, whatever its phi."""

from __future__ import annotations

import copy
import io
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import auxfast
from auxfast import reference_kernels
from auxfast.nn import Combiner, ConvCombiner, DeepLinearCombiner, LinearCombiner, NonlinearCombiner, PolynomialCombiner

from .test_combiners import EVERY, MAKERS, normal, positive_losses
from .test_conv_combiner import images

CONV = {
    "conv": lambda *args, **options: ConvCombiner(*args, channels=(4, 2), **options),
    "conv, normalised": lambda *args, **options: ConvCombiner(*args, channels=(4, 2), weight_norm=True, **options),
}
ALL_MAKERS = MAKERS | CONV
ALL = pytest.mark.parametrize("make", ALL_MAKERS.values(), ids=ALL_MAKERS.keys())
MAPS = pytest.mark.parametrize("positive", ["clip", "exp"])


def moved(combiner: Combiner, size: float = 0.3) -> Combiner:
    """The combiner in float64, away from its start, and monotone; no weight is 0."""
    combiner, by = combiner.double(), size * normal(combiner.phi.numel(), seed=1)
    with torch.no_grad():
        combiner.phi += by.abs() if combiner.positive == "clip" else by
    return combiner


def losses_of(combiner: Combiner, batch: int = 3) -> Tensor:
    columns = combiner.num_losses
    return images(batch, columns, 4, 5) if isinstance(combiner, ConvCombiner) else positive_losses(batch, columns)


def total_at(combiner: Combiner, losses: Tensor) -> float:
    return combiner.loss_weights(losses).sum().item()


# ------------------------------------------------------------------------------------------------------- what is kept


@EVERY
@MAPS
@pytest.mark.parametrize("main", [None, 1])
def test_weights_add_up_to_the_total_at_losses_of_1_whatever_phi(make, main, positive):
    combiner = make(3, main=main, positive=positive, total_weight=2.5).double()
    ones = torch.ones(1, 3).double()
    for step in range(3):
        assert total_at(combiner, ones) == pytest.approx(2.5)
        moved(combiner, 0.5 * step)
    combiner.total_weight = 4
    assert combiner.total_weight == 4.0
    assert total_at(combiner, ones) == pytest.approx(4)
    combiner.total_weight = None
    assert total_at(combiner, ones) != pytest.approx(4)


@EVERY
def test_a_total_scales_the_weights_and_not_their_mix(make):
    combiner = moved(make(3, main=0, reduction="none"))
    plain, losses = combiner.loss_weights(positive_losses(5)), positive_losses(5)
    combiner.total_weight = 2.5
    ratio = combiner.loss_weights(losses) / plain
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0, 0].item()))


@ALL
@MAPS
@pytest.mark.parametrize("given", ["ones", "losses", "masked"])
def test_keeping_the_total_changes_no_value(make, positive, given):
    combiner = moved(make(3, main=0, positive=positive))
    losses = losses_of(combiner, 5)
    mask = losses > 0.5 if given == "masked" else None
    value = combiner(losses)
    for _ in range(2):  # a second time, with a factor that is not 1
        combiner.keep_total_(*(() if given == "ones" else (losses, mask)))
        torch.testing.assert_close(combiner(losses), value)
        moved(combiner)
        value = combiner(losses)


@EVERY
@MAPS
def test_the_total_is_kept_at_the_mean_of_the_losses_that_are_present(make, positive):
    combiner = moved(make(3, main=0, positive=positive))
    losses, mask = positive_losses(6), positive_losses(6) > 0.7
    assert not mask.all()
    combiner.keep_total_(losses.where(mask, torch.nan), mask)
    mean = ((losses * mask).sum(0) / mask.sum(0)).unsqueeze(0)
    for _ in range(2):
        assert total_at(combiner, mean) == pytest.approx(combiner.total_weight)
        moved(combiner)


@pytest.mark.parametrize("activation", ["softplus", "identity"])
@pytest.mark.parametrize("main", [None, 0])
def test_an_images_weights_add_up_to_the_total_away_from_the_borders(activation, main):
    combiner = moved(ConvCombiner(2, (3, 2), main, activation=activation, total_weight=2.5))
    small, large = (total_at(combiner, torch.ones(1, 2, size, size).double()) for size in (32, 64))
    assert small < large < 2.5
    assert 2 * large - small == pytest.approx(2.5, rel=2e-3)  # what is missing falls with 1 / size


@pytest.mark.parametrize("make", [LinearCombiner, PolynomialCombiner, NonlinearCombiner, DeepLinearCombiner])
def test_where_all_weights_are_0_value_and_gradients_are_finite(make):
    combiner = make(3, main=None, total_weight=1.0)
    with torch.no_grad():
        combiner.phi.zero_()
    losses = torch.rand(4, 3, requires_grad=True)
    value = combiner(losses)
    gradients = torch.autograd.grad(value, (losses, combiner.phi))
    assert value == 0
    assert not gradients[0].any()
    assert gradients[1].isfinite().all()


# --------------------------------------------------------------------------------------------------------- derivatives


@ALL
@MAPS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_and_gradgradcheck(make, positive, reduction):
    combiner = moved(make(2, main=0, reduction=reduction, positive=positive), 0.1)
    losses = losses_of(combiner, 2)
    combiner.keep_total_(1.5 * losses)
    mask = normal(*losses.shape, seed=3) > -0.5

    def function(losses: Tensor, phi: Tensor) -> Tensor:
        return functional_call(combiner, {"phi": phi}, (losses, mask))

    given = losses.requires_grad_(), combiner.phi.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@ALL
@MAPS
def test_kernels_and_reference_agree(make, positive):
    combiner = moved(make(3, main=1, positive=positive, total_weight=2.0))
    results = []
    for context in (auxfast.engine_only, reference_kernels):
        losses = losses_of(combiner, 5).requires_grad_()
        wrt = losses, combiner.phi
        with context():
            value = combiner(losses)
        first = torch.autograd.grad(value, wrt, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), wrt, retain_graph=True, materialize_grads=True)
        third = torch.autograd.grad(first[1].square().sum(), wrt, materialize_grads=True)
        results.append((value, *first, *second, *third))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@EVERY
@MAPS
def test_phi_that_needs_no_gradient_gives_the_same(make, positive):
    combiner = moved(make(3, main=1, positive=positive, total_weight=2.0))
    losses = positive_losses(5).requires_grad_()
    value = combiner(losses)
    combiner.requires_grad_(False)
    assert torch.equal(combiner(losses), value)
    assert torch.equal(*(torch.autograd.grad(v, losses)[0] for v in (value, combiner(losses))))
    with torch.no_grad():
        assert torch.equal(combiner(losses), value)


def test_a_phi_that_was_written_to_before_the_backward_raises():
    combiner = NonlinearCombiner(3, (4, 2), total_weight=2.0)
    value = combiner(torch.rand(4, 3))
    with torch.no_grad():
        combiner.phi += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def scaling(combiner: Combiner) -> Tensor:
    """The direction in phi that scales all weights alike and does nothing else."""
    direction = torch.zeros_like(combiner.phi)
    direction[-combiner.layers()[[*combiner.layers()][-1]].numel() :] = 1
    if combiner.positive == "clip":
        direction *= combiner.phi.detach()
    return direction


@EVERY
@MAPS
def test_hypergradients_have_no_part_that_only_scales_also_away_from_a_minimum(make, positive):
    torch.manual_seed(0)
    x, y = normal(20, 4, seed=1), normal(20, 3, seed=2)
    net = nn.Linear(4, 3).double()

    def shares(**options: float) -> float:
        combiner = moved(make(3, main=None, positive=positive, **options))
        losses = lambda: (net(x) - y).square()  # noqa: E731
        given = losses()[:, 0].mean(), combiner(losses()), net.parameters(), combiner.parameters()
        (gradient,) = auxfast.hypergradient(*given, solver=auxfast.solvers.Identity(), warn=False).grads
        direction = scaling(combiner)
        return abs(torch.cosine_similarity(gradient, direction, dim=0).item())

    assert shares() > 1e-3
    assert shares(total_weight=2.0) < 1e-12


@EVERY
@MAPS
def test_the_losses_of_a_kept_total_are_certified_as_functions_too(make, positive):
    """A factor that followed the losses would make the gradient that of no loss: NOT_SYMMETRIC."""
    torch.manual_seed(0)
    x, y = normal(20, 4, seed=1), normal(20, 3, seed=2)
    net, combiner = nn.Linear(4, 3).double(), moved(make(3, main=0, positive=positive, total_weight=2.0))
    losses = lambda: (net(x) - y).square()  # noqa: E731
    result = auxfast.hypergradient(
        lambda: losses()[:, 0].mean(),
        lambda: combiner(losses()) + 0.1 * sum(w.square().sum() for w in net.parameters()),
        net.parameters(),
        combiner.parameters(),
        state=auxfast.solvers.SolverState(),
    )
    assert result.stats.converged


@EVERY
def test_transforms_of_torch_func(make):
    combiner = moved(make(3, main=0, total_weight=2.0))
    losses, phi = positive_losses(5), combiner.phi.detach()

    def function(phi: Tensor, losses: Tensor) -> Tensor:
        return functional_call(combiner, {"phi": phi}, (losses,))

    value = combiner(losses)
    torch.testing.assert_close(grad(function)(phi, losses), torch.autograd.grad(value, combiner.phi)[0])
    batched = vmap(function, (None, 0))(phi, losses.unsqueeze(1))
    torch.testing.assert_close(batched.mean(), value)


def test_half_precision_is_combined_in_float32():
    for positive, make in product(("clip", "exp"), MAKERS.values()):
        combiner = make(3, main=0, positive=positive).half()
        losses = torch.rand(4, 3).half()
        combiner.keep_total_(losses)
        assert combiner(losses).dtype == torch.float32
        torch.testing.assert_close(combiner(losses), copy.deepcopy(combiner).float()(losses.float()), rtol=1e-3, atol=0)


# -------------------------------------------------------------------------------------------------------------- state


@ALL
def test_a_checkpoint_restores_the_total(make):
    combiner, other = make(3, main=0).double(), make(3, main=0).double()
    assert list(combiner.state_dict()) == ["phi"]
    losses = losses_of(combiner)
    combiner.keep_total_(losses)
    moved(combiner)
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"c": combiner}).state_dict(), file)
    file.seek(0)
    nn.ModuleDict({"c": other}).load_state_dict(torch.load(file))
    assert other.total_weight == combiner.total_weight
    torch.testing.assert_close(other(losses), combiner(losses), rtol=1e-14, atol=0)


def test_a_checkpoint_without_a_total_leaves_it():
    combiner = LinearCombiner(3, total_weight=2.0)
    combiner.load_state_dict(LinearCombiner(3).state_dict())
    assert combiner.total_weight == 2


@EVERY
def test_copies_and_moves_keep_it(make):
    combiner = make(3, main=0)
    combiner.keep_total_(positive_losses(4).float())
    moved(combiner)
    losses = positive_losses(5)
    twin = copy.deepcopy(combiner)
    assert torch.equal(twin(losses), combiner(losses))
    torch.testing.assert_close(twin.float()(losses.float()), combiner(losses).float())


def test_repr_says_so():
    assert "total_weight=2.5" in repr(NonlinearCombiner(3, total_weight=2.5))
    assert "total_weight" not in repr(NonlinearCombiner(3))


@pytest.mark.parametrize("total", [0, -1.0, float("nan"), float("inf"), True, "1", torch.ones(())])
def test_a_total_that_is_none_is_refused(total):
    with pytest.raises(ValueError, match="total_weight must be None or a finite number above 0, got"):
        LinearCombiner(3, total_weight=total)
    combiner = NonlinearCombiner(3)
    with pytest.raises(ValueError, match="total_weight must be None or a finite number above 0, got"):
        combiner.total_weight = total


def test_a_total_is_refused_where_none_can_be_kept():
    with pytest.raises(ValueError, match="total_weight needs monotone=True: weights of both signs may add up to 0"):
        LinearCombiner(3, monotone=False, total_weight=1.0)
    with pytest.raises(ValueError, match="total_weight needs monotone=True"):
        NonlinearCombiner(3, monotone=False).keep_total_()
    with pytest.raises(ValueError, match=r"total_weight needs main_reduction .*: a sum grows with the image"):
        ConvCombiner(3, main_reduction="sum", total_weight=1.0)
    with pytest.raises(ValueError, match=r"total_weight must be .*, got 0\.0"):
        LinearCombiner(3, init_value=0.0).keep_total_()
    with pytest.raises(ValueError, match=r"losses must be \(batch, 3\), got \(2, 2\)"):
        LinearCombiner(3).keep_total_(torch.ones(2, 2))
