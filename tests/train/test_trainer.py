"""The loop, on a problem whose answers are known (OneWeight) and on one that draws (Noisy)."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from auxfast.implicit import HyperOptimizer
from auxfast.nn import Combiner, ConvCombiner, LinearCombiner
from auxfast.solvers import GradientFlow, Neumann
from auxfast.train import Batch, Component, RunConfig, Trainer, make_training_loss, parse_method
from auxfast.train.config import LabelsConfig
from auxfast.train.run import metrics_line
from auxfast.train.training_loss import CombinedLoss, WeightedLoss
from train.problems import LabelledNoisy, Noisy, NoisyOptions, OneWeight, noisy_config, train_config


def _equal_weights(*weights: float) -> LinearCombiner:
    combiner = LinearCombiner(len(weights or (1, 1, 1)))
    with torch.no_grad():
        combiner.phi.copy_(torch.tensor(weights or (1.0, 1.0, 1.0)))
    return combiner


def _trainer(combiner: Combiner, *, task=None, learn: bool = False, **changes) -> Trainer:
    return Trainer(task or OneWeight(), CombinedLoss(combiner, learned=learn), train_config(**changes), 0)


def test_without_outer_steps_only_the_model_learns():
    combiner = _equal_weights(1.0, 2.0, 1.0)
    before = combiner.phi.detach().clone()
    trainer = _trainer(combiner)
    records = trainer.run()
    assert torch.equal(combiner.phi, before)
    assert trainer.task.model.weight.item() == pytest.approx(0.25, abs=1e-4)  # (0 + 2 - 1) / 4
    assert {(r.outer_loss, r.residual, r.matvecs, r.skipped, r.outer_seconds) for r in records} == {
        (None, None, None, False, 0.0)
    }
    assert [record.step for record in records] == list(range(20))


def test_the_combiner_learns_which_auxiliary_helps():
    trainer = _trainer(_equal_weights(), learn=True)
    records = trainer.run()
    assert records[-1].outer_loss < 0.5 * records[0].outer_loss
    main, helpful, harmful = records[-1].loss_weights
    assert helpful > main >= 0
    assert helpful > harmful >= 0
    assert records[0].phi == records[0].loss_weights == (1.0, 1.0, 1.0)  # before the first outer step
    assert all(0 <= record.residual < 1e-1 and record.matvecs == 50 + 1 for record in records)
    assert all(record.inner_seconds > 0 and record.outer_seconds > 0 for record in records)
    assert trainer.task.score() > -0.5


def test_records_are_handed_over_as_they_are_made():
    seen = []
    records = _trainer(_equal_weights(), learn=True, outer_steps=3).run(seen.append)
    assert seen == records
    assert len(records) == 3


def test_skipped_outer_steps_are_recorded():
    trainer = _trainer(_equal_weights(), learn=True, outer_steps=4, solver=Neumann(steps=2, step_size="auto"))
    outer_loss, zero = trainer.task.outer_loss, lambda: 0 * trainer.task.model.weight.sum()
    trainer.task.outer_loss = lambda: outer_loss() + (zero().sqrt() if len(trainer.records) == 2 else 0)  # of slope NaN
    assert [record.skipped for record in trainer.run()] == [False, False, True, False]


class Careless(Noisy):
    """Validation draws dropout masks, moves BatchNorm's statistics, and may leave the model in eval mode."""

    def __init__(self, careless: bool) -> None:
        super().__init__(0, NoisyOptions(), hold_out=True)
        self.careless = careless

    def validation_score(self) -> float:
        score = -self.outer_loss().item()
        if self.careless:
            self.model.eval()
        return score


@pytest.mark.parametrize("careless", [False, True])
def test_the_validation_score_is_recorded_at_every_outer_step_and_changes_nothing(careless, monkeypatch):
    states, records = [], []
    for measured in (True, False):
        torch.manual_seed(0)
        task = Careless(careless)
        if not measured:
            task.validation_score = lambda: 0.0
        trainer = _trainer(_equal_weights(), task=task, learn=True, outer_steps=3, inner_steps=2)
        records.append(trainer.run())
        states.append([*task.model.state_dict().values(), torch.get_rng_state()])
    assert len({record.validation_score for record in records[0]}) == 3
    assert all(record.validation_seconds > 0 for record in records[0])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.parametrize(("name", "control"), [("linear", "linear-frozen"), ("maxl", "maxl-f")])
def test_outer_steps_that_move_nothing_leave_no_trace(name, control):
    """Their losses go through dropout and BatchNorm, in training mode."""
    options = NoisyOptions()
    config = noisy_config(options, outer_steps=3, outer_optimizer=Component("SGD", {"lr": 0.0}))
    config = replace(config, labels=LabelsConfig(lr=0.0))
    ends = []
    for method in map(parse_method, (name, control)):
        torch.manual_seed(0)
        task = (LabelledNoisy if method.labels else Noisy)(0, options, hold_out=method.holds_out)
        Trainer(task, make_training_loss(method, config, task), config.train, seed=0).run()
        ends.append(task.model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize(("name", "learned"), [("linear", True), ("linear-frozen", False), ("equal", False)])
def test_whether_outer_steps_are_taken_follows_from_the_method(name, learned):
    task, config = OneWeight(), train_config(outer_steps=1)
    (record,) = Trainer(task, make_training_loss(parse_method(name), RunConfig(config), task), config, 0).run()
    assert (record.outer_loss is not None) == learned


def test_the_hypergradient_knows_the_weight_decay():
    # w* = (phi_1 - phi_2) / (sum phi + decay / 2): with phi = 1, d w* / d phi_1 = 1 / (3 + decay / 2) at w* = 0,
    # so the hypergradient in phi_1 is 2 (0 - 1) / (3 + decay / 2).
    combiner = _equal_weights()
    _trainer(
        combiner,
        learn=True,
        outer_steps=1,
        weight_decay=2.0,
        outer_optimizer=Component("SGD", {"lr": 1.0}),
        solver=Neumann(steps=400, step_size=0.05),
    ).run()
    assert combiner.phi[1].item() == pytest.approx(1 + 2 / (3 + 1), rel=1e-4)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_the_weight_decay_is_a_part_of_the_loss_for_every_optimizer(name):
    # Stationary where 2 (3 w - 1 - 2 + 1) + decay w = 0: AdamW's own, decoupled decay would end elsewhere.
    trainer = _trainer(_equal_weights(0, 3.0, 1.0), weight_decay=2.0, inner_optimizer=Component(name, {"lr": 0.01}))
    trainer.run()
    assert trainer.task.model.weight.item() == pytest.approx(4 / (8 + 2), abs=2e-3)


def test_inner_steps_are_those_of_the_optimizer_and_the_scheduler():
    trainer = _trainer(
        _equal_weights(),
        task=OneWeight(1.0),
        outer_steps=2,
        inner_steps=3,
        inner_optimizer=Component("SGD", {"lr": 0.1}),
        inner_scheduler=Component("StepLR", {"step_size": 2, "gamma": 0.5}),
    )
    trainer.run()
    expected = 1.0
    for lr in (0.1, 0.1, 0.05, 0.05, 0.025, 0.025):
        expected -= lr * 6 * expected
    assert trainer.task.model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_inner_gradients_are_clipped():
    trainer = _trainer(
        _equal_weights(),
        task=OneWeight(5.0),
        outer_steps=1,
        inner_steps=4,
        inner_optimizer=Component("SGD", {"lr": 1.0}),
        max_inner_grad_norm=0.5,
    )
    trainer.run()
    assert trainer.task.model.weight.item() == pytest.approx(5 - 4 * 0.5, abs=1e-4)


def test_the_outer_loss_can_be_that_of_training_which_wants_no_auxiliary():
    records = _trainer(_equal_weights(1.0, 2.0, 1.0), learn=True, outer_set="training").run()
    _, helpful, harmful = records[-1].loss_weights
    assert records[-1].outer_loss < records[0].outer_loss  # w -> 0, where the main loss is 0
    assert helpful - harmful < 0.5


def test_phi_keeps_no_gradient_of_inner_steps_and_requires_one_in_the_end():
    combiner = _equal_weights()
    _trainer(combiner, outer_steps=1).run()
    assert combiner.phi.grad is None
    assert combiner.phi.requires_grad


def test_a_control_sees_the_same_batches():
    drawn = {}
    for learn in (True, False):
        task = Noisy(0, NoisyOptions(), hold_out=True)
        trainer = _trainer(_equal_weights(), task=task, learn=learn, outer_steps=3, inner_steps=2)
        trainer.run()
        drawn[learn] = [task.drawn[i] for i in ((0, 1, 3, 4, 6, 7) if learn else range(6))]  # without the outer steps'
    assert drawn[True] == drawn[False]


def test_a_diverging_run_says_so_and_what_to_try():
    with pytest.raises(FloatingPointError, match=r"training loss is (inf|nan) at outer step \d+: try a smaller lr"):
        _trainer(_equal_weights(), task=OneWeight(1.0), inner_optimizer=Component("SGD", {"lr": 10.0})).run()


class NoOuter(OneWeight):
    def outer_loss(self) -> torch.Tensor:
        return self.model.weight.sum() * math.nan


def test_an_outer_loss_that_is_not_finite_is_named():
    with pytest.raises(FloatingPointError, match="the outer loss is nan at outer step 0"):
        _trainer(_equal_weights(), task=NoOuter(), learn=True).run()


# ---------------------------------------------------------------------------------------- outer parameters of its own


class OwnShares(nn.Module):
    """The helpful auxiliary's and the harmful one's weights as a softmax; what has no gradient is not learned."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))
        self.of_main = nn.Parameter(torch.tensor(0.25), requires_grad=False)
        self.projected = 0

    def forward(self, losses: torch.Tensor, mask: None) -> torch.Tensor:
        main, *others = losses.mean(dim=0)
        return self.of_main * main + self.logits.softmax(0) @ torch.stack(others)

    def project_(self) -> None:
        self.projected += 1


def _own(name: str, **changes) -> tuple[Trainer, OwnShares]:
    task, config = OneWeight(), train_config(**changes)
    task.training_loss = own = OwnShares()
    return Trainer(task, make_training_loss(parse_method(name), RunConfig(config), task), config, 0), own


def test_a_task_s_own_outer_parameters_are_learned():
    trainer, own = _own("own")
    records = trainer.run()
    assert records[-1].outer_loss < 0.5 * records[0].outer_loss
    assert records[0].loss_weights == pytest.approx((0.25, 0.5, 0.5))
    main, helpful, harmful = records[-1].loss_weights
    assert main == 0.25
    assert helpful > 0.8 > 0.2 > harmful
    assert records[0].phi == (0.0, 0.0)
    assert own.projected == len(records)
    assert [parameter.requires_grad for parameter in own.parameters()] == [True, False]


def test_their_frozen_control_stays_and_takes_no_outer_steps():
    trainer, own = _own("own-frozen", outer_steps=3)
    records = trainer.run()
    assert [record.outer_loss for record in records] == [None] * 3
    assert {record.loss_weights for record in records} == {records[0].loss_weights}
    assert own.logits.tolist() == [0, 0]


def test_a_training_loss_that_ignores_the_losses_gives_them_no_weight():
    trainer, own = _own("own", outer_steps=1)
    own.forward = lambda losses, mask: own.logits.sigmoid() @ (trainer.task.model.weight - 1).square().expand(2, 1)
    (record,) = trainer.run()
    assert record.loss_weights == (0.0, 0.0, 0.0)


def test_the_method_own_needs_a_training_loss_of_the_task():
    task, config = OneWeight(), train_config()
    with pytest.raises(TypeError, match=r"task\.training_loss: there is none, and the method own needs it"):
        make_training_loss(parse_method("own"), RunConfig(config), task)


# ------------------------------------------------------------------------------------------------------ early stopping


class Overfits(OneWeight):
    """w goes to -1, and is best on the way, where it is nearest to -0.5."""

    def validation_score(self) -> float:
        return -abs(self.model.weight.item() + 0.5)


def _overfit(**changes) -> Trainer:
    return _trainer(
        _equal_weights(0.0, 0.0, 1.0),
        task=Overfits(),
        inner_steps=1,
        inner_optimizer=Component("SGD", {"lr": 0.05}),
        **changes,
    )


def test_early_stopping_waits_and_returns_to_the_best():
    trainer = _overfit(outer_steps=50, patience=3)
    records = trainer.run()
    scores = [record.validation_score for record in records]
    best = scores.index(max(scores))
    assert trainer.stopped_early
    assert len(records) == best + 1 + 3
    assert trainer.task.validation_score() == scores[best]


def test_a_run_that_ends_before_patience_does_returns_to_the_best_as_well():
    trainer = _overfit(outer_steps=8, patience=30)
    scores = [record.validation_score for record in trainer.run()]
    assert not trainer.stopped_early
    assert scores.index(max(scores)) < 7
    assert trainer.task.validation_score() == max(scores)


def test_with_early_stopping_the_combiner_returns_as_well():
    combiner = _equal_weights()
    trainer = _trainer(combiner, learn=True, outer_steps=6, patience=2)
    trainer.task.validation_score = lambda: -abs(len(trainer.records) - 2.0)
    records = trainer.run()
    assert len(records) == 5
    assert tuple(combiner.phi.tolist()) == records[2].phi


def test_a_validation_score_that_is_nan_is_never_the_best():
    trainer = _overfit(outer_steps=3, patience=2)
    trainer.task.validation_score = lambda: math.nan
    trainer.run()
    assert trainer.best is None
    assert not trainer.stopped_early


# -------------------------------------------------------------------------------------------------- mixed precision


class SeesPrecision(Noisy):
    def training_batch(self, generator: torch.Generator) -> Batch:
        batch = super().training_batch(generator)
        self.output = self.model(self.inputs).dtype
        return batch


@pytest.mark.parametrize("method", ["linear", "nonlinear", "equal", "uncertainty", "gcs"])
@pytest.mark.parametrize("amp", [True, False])
def test_amp_runs_the_model_in_bfloat16_and_still_learns(method, amp):
    task = SeesPrecision(0, NoisyOptions(), hold_out=True)
    config = train_config(amp=amp, outer_steps=3, solver=Neumann(steps=3, step_size=0.05))
    method = parse_method(method)
    torch.manual_seed(0)
    loss, before = make_training_loss(method, RunConfig(config), task), task.validation_score()
    Trainer(task, loss, config, 0).run()
    assert task.output == (torch.bfloat16 if amp else torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in task.model.parameters())
    assert task.validation_score() > 0.5 * before  # minus a squared error


def test_a_residual_that_is_not_certified_is_recorded_as_none():
    records = _trainer(_equal_weights(), learn=True, outer_steps=2, solver=Neumann(3, 0.05, certify=False)).run()
    assert [(record.residual, record.matvecs) for record in records] == [(None, 3)] * 2
    assert b'"residual": null' in metrics_line(records[0])


# ------------------------------------------------------------------------------------------------------- loss weights


def test_mean_weights_are_over_the_samples_that_have_the_loss():
    loss = CombinedLoss(_equal_weights(2.0, 3.0))
    batch = Batch(torch.rand(4, 2), torch.tensor([[1.0, 1], [0, 1], [0, 1], [0, 1]]))
    assert loss.mean_weights(batch) == pytest.approx((2.0, 3.0))
    assert loss.mean_weights(Batch(torch.rand(4, 2), None)) == pytest.approx((2.0, 3.0))
    nobody = Batch(torch.rand(4, 2), torch.tensor([[0.0, 1]]).expand(4, 2))
    assert loss.mean_weights(nobody) == pytest.approx((0.0, 3.0))


def test_mean_weights_of_images_are_over_pixels():
    mask = torch.ones(2, 2, 3, 4)
    mask[0, 0] = mask[1, 0, :2] = 0
    loss = CombinedLoss(_equal_weights(2.0, 3.0))
    assert loss.mean_weights(Batch(torch.rand(2, 2, 3, 4), mask)) == pytest.approx((2.0, 3.0))


@pytest.mark.parametrize("method", ["equal", "uncertainty", "dwa", "gradnorm"])
def test_weights_of_a_weighting_are_those_that_the_last_inner_step_had(method):
    task, config = OneWeight(0.3), train_config(outer_steps=1, inner_steps=4)
    loss = make_training_loss(parse_method(method), RunConfig(config), task)
    assert isinstance(loss, WeightedLoss)
    given = []
    loss.weighting.register_forward_hook(lambda module, inputs, weights: given.append(tuple(weights.tolist())))
    (record,) = Trainer(task, loss, config, 0).run()
    assert record.loss_weights == given[-1]
    assert len(given) == (1 if method == "equal" else 4)


class OnePixelwiseWeight(OneWeight):
    """The same for every pixel of an image; the harmful loss is unknown in half of the pixels."""

    def training_batch(self, generator: torch.Generator) -> Batch:
        losses = super().training_batch(generator).losses[:, :, None, None].expand(1, 3, 6, 6)
        mask = torch.ones(1, 3, 6, 6)
        mask[:, 2, 3:] = 0
        return Batch(losses, mask)


def test_a_combiner_of_loss_images_learns_which_auxiliary_helps():
    torch.manual_seed(0)
    combiner = ConvCombiner(3, (4, 4), init_range=(0.1, 0.3))
    outer = Component("SGD", {"lr": 0.05, "momentum": 0.9})
    records = _trainer(combiner, task=OnePixelwiseWeight(), learn=True, outer_optimizer=outer).run()
    assert records[-1].outer_loss < 0.5 * records[0].outer_loss
    _, helpful, harmful = records[-1].loss_weights
    assert helpful > 2 * harmful >= 0
    assert records[0].phi is None  # too many
    assert min(part.min() for name, part in combiner.layers().items() if "weight" in name) >= 0


# ------------------------------------------------------------------------------------------- what a task should not do


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda losses: losses, r"task\.training_batch: got Tensor, must return a Batch\(losses, mask\) of tensors"),
        (lambda losses: (losses, None), r"task\.training_batch: got tuple, must return a Batch\(losses, mask\)"),
        (lambda losses: Batch(losses.unbind(1), None), r"task\.training_batch: got Batch, must return a Batch"),
        (lambda losses: None, r"task\.training_batch: got NoneType, must return a Batch\(losses, mask\)"),
        (
            lambda losses: Batch(losses[0], None),
            r"task\.training_batch: got losses of shape \(3,\), must be \(batch, 3\)",
        ),
        (
            lambda losses: Batch(losses[:, :2], None),
            r"training_batch: got losses of shape \(1, 2\), must be \(batch, 3\)",
        ),
        (lambda losses: Batch(losses.sum(), None), r"training_batch: got losses of shape \(\), must be \(batch, 3\)"),
    ],
)
@pytest.mark.parametrize("learn", [False, True])
def test_a_training_batch_that_is_none_is_refused_with_what_it_must_be(returned, message, learn, monkeypatch):
    make = OneWeight.training_batch
    monkeypatch.setattr(OneWeight, "training_batch", lambda task, generator: returned(make(task, generator).losses))
    with pytest.raises((TypeError, ValueError), match=message):
        _trainer(_equal_weights(), learn=learn).run()


@pytest.mark.parametrize(("returned", "given"), [(0.5, "float"), (torch.ones(3), r"shape \(3,\)"), (None, "NoneType")])
def test_an_outer_loss_that_is_no_scalar_is_refused(returned, given, monkeypatch):
    monkeypatch.setattr(OneWeight, "outer_loss", lambda task: returned)
    with pytest.raises(TypeError, match=rf"task\.outer_loss: got {given}, must return a scalar tensor with a graph"):
        _trainer(_equal_weights(), learn=True).run()


def test_a_score_may_be_a_tensor(monkeypatch):
    monkeypatch.setattr(OneWeight, "validation_score", lambda task: -task.outer_loss().detach())
    records = _trainer(_equal_weights(), patience=50).run()
    assert all(type(record.validation_score) is float for record in records)


class Releasing(OneWeight):
    """Counts the calls of `release_auxiliary`, and the training batches before the first."""

    def __init__(self):
        super().__init__()
        self.releases, self.batches, self.batches_before = 0, 0, None

    def training_batch(self, generator):
        self.batches += 1
        return super().training_batch(generator)

    def release_auxiliary(self):
        self.releases += 1
        self.batches_before = self.batches


@pytest.mark.parametrize("learn", [True, False])
def test_phi_stays_during_warm_up_and_cool_down_and_the_auxiliary_set_is_released_in_the_end(learn):
    task = Releasing()
    trainer = _trainer(_equal_weights(), task=task, learn=learn, outer_steps=8, warmup=0.25, cooldown=0.375)
    records = trainer.run()
    assert [record.outer_loss is not None for record in records] == [learn and 2 <= step < 5 for step in range(8)]
    moved = [later.phi != earlier.phi for earlier, later in itertools.pairwise(records)]
    assert moved == [learn and 2 <= step < 5 for step in range(7)]
    assert records[-1].phi == tuple(trainer.combiner.phi.tolist())
    assert (task.releases, task.batches_before) == (1, 5 * 20 + 3 * learn)


def test_patience_waits_until_the_warm_up_is_over():
    task = Releasing()
    task.validation_score = lambda: 0.0
    trainer = _trainer(_equal_weights(), task=task, learn=True, outer_steps=20, warmup=0.25, patience=3)
    records = trainer.run()
    assert [record.outer_loss is not None for record in records] == [False] * 5 + [True] * 3
    assert trainer.stopped_early


def test_gradient_flow_gets_its_time_from_the_inner_steps_so_far():
    options = {"learn": True, "outer_steps": 2, "inner_steps": 5, "inner_optimizer": Component("SGD", {"lr": 0.1})}
    trainer = _trainer(_equal_weights(), solver=GradientFlow(floored=True), **options)
    times = []
    trainer.run(lambda record: times.append(trainer.outer.solver))
    assert times == [GradientFlow(time, floored=True, learning_rate=0.1) for time in (0.5, 1.0)]
    given = _trainer(_equal_weights(), solver=GradientFlow(3.0), **options)
    given.run()
    assert given.outer.solver == GradientFlow(3.0)


def test_a_trainer_that_resumes_in_the_cool_down_releases_again():
    options = {"learn": True, "outer_steps": 8, "cooldown": 0.5}
    first, second, whole = (_trainer(_equal_weights(), task=Releasing(), **options) for _ in range(3))

    class Stop(Exception):
        pass

    def stop(record):
        if record.step == 5:
            raise Stop

    with pytest.raises(Stop):
        first.run(stop)
    second.load_state_dict(first.state_dict(), first.records)
    without_seconds = [[record._replace(**NO_SECONDS) for record in trainer.run()] for trainer in (second, whole)]
    assert without_seconds[0] == without_seconds[1]
    assert second.task.releases == 1


NO_SECONDS = {"inner_seconds": 0.0, "outer_seconds": 0.0, "validation_seconds": 0.0}


@pytest.mark.parametrize(("warmup", "cooldown"), [(0.6, 0.4), (1.0, 0.0), (-0.1, 0.0), (0.0, float("nan"))])
def test_a_run_that_would_never_learn_is_refused(warmup, cooldown):
    with pytest.raises(ValueError, match=r"train\.(warmup|cooldown)"):
        train_config(warmup=warmup, cooldown=cooldown)


def test_the_default_configuration_is_the_recommended_outer_optimizer():
    combiner = _equal_weights()
    config = RunConfig()
    loss = make_training_loss(parse_method("linear"), config, OneWeight())
    outer = Trainer(OneWeight(), loss, config.train, seed=0).outer
    recommended = HyperOptimizer.recommended(combiner)
    for name in ("solver", "curvature", "max_weight_change", "_totals"):
        assert getattr(outer, name) == getattr(recommended, name)
    groups = [{k: v for k, v in o.optimizer.param_groups[0].items() if k != "params"} for o in (outer, recommended)]
    assert groups[0] == groups[1]
    assert loss.combiner.positive == combiner.positive == "exp"
