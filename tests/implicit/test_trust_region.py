"""What one outer step may do to the weights of the losses, whatever the torch optimizer proposes."""

from __future__ import annotations

import warnings

import pytest
import torch

import auxfast
from auxfast.nn import (
    ConvCombiner,
    DeepLinearCombiner,
    LabelGenerator,
    LinearCombiner,
    NonlinearCombiner,
    PolynomialCombiner,
)

COMBINERS = {
    "linear": lambda: LinearCombiner(3),
    "linear with main": lambda: LinearCombiner(3, main=0),
    "deep linear": lambda: DeepLinearCombiner(3, (4, 4)),
    "nonlinear": lambda: NonlinearCombiner(3, (4, 4)),
    "nonlinear, normalised": lambda: NonlinearCombiner(3, (4, 4), weight_norm=True),
    "nonlinear, any sign": lambda: NonlinearCombiner(3, (4, 4), monotone=False),
    "polynomial": lambda: PolynomialCombiner(3),
    "polynomial, any sign": lambda: PolynomialCombiner(3, monotone=False),
    "conv": lambda: ConvCombiner(3, (2, 2)),
}
EVERY = pytest.mark.parametrize("make", COMBINERS.values(), ids=COMBINERS.keys())


class Problem:
    """A linear network with three losses for each sample or pixel."""

    def __init__(self, combiner):
        torch.manual_seed(1)
        self.combiner = combiner
        shape = (6, 3, 4, 4) if isinstance(combiner, ConvCombiner) else (6, 3)
        self.features = torch.rand(*shape, 5)
        self.targets = torch.rand(shape)
        self.w = torch.zeros(5, requires_grad=True)

    def losses(self):
        return (self.features @ self.w - self.targets).square() + 0.1

    def step(self, outer):
        outer_loss = (self.features[:3] @ self.w - 2).square().mean()
        return outer.step(outer_loss, self.combiner(self.losses()), [self.w])

    def weights(self):
        return self.combiner.mean_weights(self.losses().detach())


def largest_change(before, after):
    return ((after - before).abs() / before.abs().clamp(min=0.01 * before.abs().mean())).max().item()


@EVERY
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_no_step_changes_a_weight_by_more_than_its_share_even_if_the_optimizer_wants_to(make, optimizer):
    torch.manual_seed(0)
    problem = Problem(make())
    options = {"solver": auxfast.solvers.Identity(), "project": [problem.combiner]}
    outer = auxfast.HyperOptimizer(optimizer(problem.combiner.parameters(), lr=30.0), max_weight_change=0.1, **options)
    changes = []
    for _ in range(4):
        before = problem.weights()
        problem.step(outer)
        changes.append(largest_change(before, problem.weights()))
    assert max(changes) <= 0.1 + 1e-4
    assert max(changes) > 0.01


@EVERY
def test_a_step_within_the_limit_is_the_optimizer_s_own(make):
    phis = []
    for limit in (0.15, None):
        torch.manual_seed(0)
        problem = Problem(make())
        optimizer = torch.optim.SGD(problem.combiner.parameters(), lr=1e-5)
        outer = auxfast.HyperOptimizer(optimizer, max_weight_change=limit, project=[problem.combiner])
        problem.step(outer)
        phis.append(problem.combiner.phi.detach())
    torch.testing.assert_close(*phis, rtol=0, atol=0)


def learned_totals(problem):
    losses = problem.losses().detach()
    totals = problem.combiner.loss_weights(losses).abs().flatten(1).sum(dim=1)
    return totals - float(problem.combiner.main is not None)


@EVERY
def test_the_largest_total_of_a_sample_s_learned_weights_stays_what_it_was_at_the_first_step(make):
    torch.manual_seed(0)
    problem = Problem(make())
    outer = auxfast.HyperOptimizer.recommended(problem.combiner, lr=0.5)
    total = learned_totals(problem).max()
    for _ in range(8):
        problem.step(outer)
        now = learned_totals(problem).max()
        if problem.combiner.monotone or now > total:  # those of both signs may come to weigh less, by their sizes
            torch.testing.assert_close(now, total, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            problem.w += 0.05  # so that the losses, and with them the weights, change between the steps


def test_the_total_is_kept_across_a_checkpoint():
    problem = Problem(LinearCombiner(3))
    outer = auxfast.HyperOptimizer.recommended(problem.combiner)
    problem.step(outer)
    again = Problem(LinearCombiner(3))
    resumed = auxfast.HyperOptimizer.recommended(again.combiner)
    again.combiner.load_state_dict(problem.combiner.state_dict())
    resumed.load_state_dict(outer.state_dict())
    for p, o in ((problem, outer), (again, resumed)):
        p.combiner.scale_(1.5)  # what drifts is brought back to the first total, not to the last one
        p.step(o)
    torch.testing.assert_close(problem.combiner.phi, again.combiner.phi)
    assert problem.weights().sum() == pytest.approx(3, rel=1e-4)


@EVERY
def test_the_recommended_way_starts_with_the_same_combined_loss(make):
    torch.manual_seed(0)
    problem = Problem(make())
    before = problem.combiner(problem.losses())
    outer = auxfast.HyperOptimizer.recommended(problem.combiner)
    torch.testing.assert_close(problem.combiner(problem.losses()), before, rtol=3e-3, atol=1e-4)
    assert problem.combiner.positive == ("exp" if problem.combiner.monotone else "clip")
    assert outer.optimizer.param_groups[0]["lr"] == 0.1


def test_two_combiners_have_a_limit_each_and_other_parameters_none():
    first, second, decay = LinearCombiner(2), LinearCombiner(3), torch.zeros((), requires_grad=True)
    w = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([decay, second.phi, first.phi], lr=100.0)
    outer = auxfast.HyperOptimizer(optimizer, solver=auxfast.solvers.Identity(), project=[first, second])
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 1.0, 1.5]])

    def inner():
        errors = (w - a).square()
        return first(errors[None]) + second(errors.sum() * b) + decay.exp() * w.square().sum()

    outer.step((w - 1).square().sum() + decay, inner(), [w])
    assert first.phi.detach().sub(1).abs().max() == pytest.approx(0.15, rel=0.1)
    assert second.phi.detach().sub(1).abs().max() == pytest.approx(0.15, rel=0.1)
    assert decay.abs() > 10


@pytest.mark.parametrize("given", [0, -0.1, float("nan")])
def test_a_limit_that_is_none_is_refused(given):
    optimizer = torch.optim.SGD(LinearCombiner(2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="max_weight_change"):
        auxfast.HyperOptimizer(optimizer, max_weight_change=given, warn=False)


def test_labels_and_a_combiner_are_learned_together_with_learning_rates_of_their_own():
    combiner, generator = NonlinearCombiner(2), LabelGenerator(torch.nn.Linear(3, 4), (2, 2))
    outer = auxfast.HyperOptimizer.recommended(combiner, generator=generator, generator_lr=0.02)
    first, second = outer.optimizer.param_groups
    assert (first["params"], first["lr"]) == (list(combiner.parameters()), 0.1)
    assert (second["params"], second["lr"]) == (list(generator.parameters()), 0.02)
    assert combiner.positive == "exp"
    alone = auxfast.HyperOptimizer.recommended(generator=generator)
    assert len(alone.optimizer.param_groups) == 1
    assert not alone.project


def test_only_a_combiner_has_a_recommended_optimizer():
    with pytest.raises(TypeError, match="a combiner, a generator, or both, and got neither"):
        auxfast.HyperOptimizer.recommended()
    with pytest.raises(TypeError, match=r"generator must be one of auxfast\.nn, not a Linear"):
        auxfast.HyperOptimizer.recommended(generator=torch.nn.Linear(2, 1))
    with pytest.raises(TypeError, match=r"combiner must be one of auxfast\.nn, not a Linear"):
        auxfast.HyperOptimizer.recommended(torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match="lr"):
        auxfast.HyperOptimizer.recommended(LinearCombiner(2), lr=0.0)


@EVERY
def test_the_total_that_is_kept_does_not_depend_on_which_losses_a_batch_lacks(make):
    torch.manual_seed(0)
    problem = Problem(make())
    if not problem.combiner.monotone:
        pytest.skip("weights of both signs add up to anything")
    outer = auxfast.HyperOptimizer.recommended(problem.combiner, lr=0.05)
    losses = problem.losses()
    problem.step(outer)
    whole = learned_totals(problem).max()
    for lacking in ([1, 2], [0, 1], [1]):
        mask = torch.ones_like(losses)
        mask[:, lacking] = 0
        outer.step(problem.w.sum(), problem.combiner(problem.losses(), mask), [problem.w])
        assert 0.7 < learned_totals(problem).max() / whole < 1.4
    problem.step(outer)
    torch.testing.assert_close(learned_totals(problem).max(), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "valid_mean"])
def test_the_total_is_that_of_the_learned_weights_however_the_main_loss_is_reduced(reduction):
    torch.manual_seed(0)
    problem = Problem(ConvCombiner(3, (2, 2), main_reduction=reduction))
    outer = auxfast.HyperOptimizer.recommended(problem.combiner, lr=0.5)

    def learned():
        weights = problem.combiner.loss_weights(problem.losses().detach()).flatten(1).sum(dim=1)
        return weights.max() - (16 if reduction == "sum" else 1)

    total = learned()
    for _ in range(4):
        problem.step(outer)
        torch.testing.assert_close(learned(), total, rtol=1e-3, atol=1e-4)


def test_each_combiner_keeps_its_own_total_whichever_is_called_first():
    first, second = LinearCombiner(2, init_value=5.0), LinearCombiner(2, init_value=1.0)
    params = [*first.parameters(), *second.parameters()]
    outer = auxfast.HyperOptimizer(torch.optim.SGD(params, lr=0.1), keep_total=True, project=[first, second])
    w = torch.zeros(2, requires_grad=True)
    for combiner in (second, first, second):
        outer.step((w - 2).square().sum(), combiner((w - 1).square()[None] + 0.1 * w), [w])
    assert [c.phi.detach().sum().item() for c in (first, second)] == pytest.approx([10.0, 2.0])


def test_a_batch_without_samples_says_nothing_of_the_total():
    combiner, w = LinearCombiner(2), torch.zeros(2, requires_grad=True)
    outer = auxfast.HyperOptimizer.recommended(combiner)
    for samples in (0, 3):
        losses = ((w - 1).square() + 0.1 * w).expand(samples, 2)
        outer.step((w - 2).square().sum(), combiner(losses).nansum() + w.square().sum(), [w])
    combiner.scale_(2.0)
    outer.step((w - 2).square().sum(), combiner(((w - 1).square() + 0.1 * w)[None]), [w])
    assert combiner.phi.detach().exp().sum().item() == pytest.approx(2, rel=1e-4)


def test_weights_that_start_at_zero_are_refused_where_their_total_is_kept():
    with pytest.raises(ValueError, match=r"combiner must start with weights above 0.*keep_total=False"):
        auxfast.HyperOptimizer.recommended(LinearCombiner(2, main=0, init_value=0.0))
    auxfast.HyperOptimizer.recommended(LinearCombiner(2, main=0, init_value=0.0), keep_total=False)


class Exponential(torch.nn.Module):
    def forward(self, x):
        return x.exp()


def compiled(combiner):
    return torch.compile(combiner, backend="eager")


def parametrized(combiner):
    return torch.nn.utils.parametrize.register_parametrization(combiner, "phi", Exponential())


@pytest.mark.parametrize("hide", [pytest.param(compiled, marks=pytest.mark.slow), parametrized])
def test_a_combiner_whose_calls_are_not_seen_is_told(hide):
    combiner = LinearCombiner(2)
    called = hide(combiner)
    w = torch.zeros(2, requires_grad=True)
    other = LinearCombiner(2)  # nobody calls it
    optimizer = torch.optim.SGD([*combiner.parameters(), other.phi], lr=0.1)
    outer = auxfast.HyperOptimizer(optimizer, project=[combiner, other], solver=auxfast.solvers.Identity())
    with pytest.warns(RuntimeWarning, match="max_weight_change and keep_total do nothing"):
        outer.step((w - 2).square().sum(), called((w - 1).square()[None]), [w])


def test_a_combiner_that_a_loss_does_without_is_nothing_to_tell():
    seen, other, w = LinearCombiner(2), LinearCombiner(2), torch.zeros(2, requires_grad=True)
    outer = auxfast.HyperOptimizer(torch.optim.SGD([seen.phi, other.phi], lr=0.1), project=[seen, other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outer.step((w - 2).square().sum(), seen((w - 1).square()[None]), [w])


@pytest.mark.parametrize("make", [COMBINERS["deep linear"], COMBINERS["nonlinear"], COMBINERS["nonlinear, normalised"]])
def test_hundreds_of_steps_with_a_kept_total_leave_no_layer_out_of_range(make):
    torch.manual_seed(0)
    combiner = make()
    outer = auxfast.HyperOptimizer.recommended(combiner, lr=1.0, max_weight_change=None, warn=False)
    w, target = torch.zeros(3, requires_grad=True), torch.tensor([1.0, 0.9, -1.1])
    for _ in range(100):
        losses = (w - target).square()[None] + (w.sum() - 1).square()
        outer.step((w - 1).square().sum(), combiner(losses), [w])
    assert outer.skipped_steps == 0
    assert combiner.loss_weights(losses.detach()).sum().isfinite()
    assert combiner.phi.max() < 60
