"""Methods that train on generated labels: what the student learns, and along which gradient the generator moves."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auxfast import verify_hypergradient
from auxfast.nn import focal_loss, soft_cross_entropy
from auxfast.solvers import MINRES, Identity
from auxfast.train import (
    Batch,
    CombinerConfig,
    Component,
    LabelBatch,
    LabelsConfig,
    RunConfig,
    Trainer,
    check_task,
    make_training_loss,
    parse_method,
)
from train.problems import LabelledNoisy, NoisyOptions, OneWeight, noisy_config, train_config

LR = 0.3
# Steps of SGD make the generator's gradient visible; what a mean of 16 samples depends on is the batch alone.
STEP = train_config(
    outer_steps=1,
    inner_steps=1,
    inner_optimizer=Component("SGD", {"lr": LR}),
    outer_optimizer=Component("SGD", {"lr": 1.0}),
    max_outer_grad_norm=None,
    solver=Identity(LR),
)


def smooth_task():
    """The task in float64, with nothing that draws or keeps statistics."""
    torch.manual_seed(0)
    task = LabelledNoisy(0, NoisyOptions(dropout=0.0), hold_out=True)
    task.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    task.label_generator.backbone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 7))
    task.label_generator.double()
    task.inputs, task.mask = task.inputs.double(), task.mask.double()
    return task


LABELS = LabelsConfig(lr=1.0)


def trainer_of(task, method, config=STEP, labels=LABELS):
    run_config = RunConfig(config, labels=labels)
    return Trainer(task, make_training_loss(parse_method(method), run_config, task), config, seed=3)


def moved(module, step):
    """Change of a module's parameters by `step`."""
    before = deepcopy(module.state_dict())
    step()
    return {name: value - before[name] for name, value in module.state_dict().items()}


def minimise(loss, params):
    optimizer = torch.optim.LBFGS(
        params, max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def inner_loss(task, batch, weight=1.0, loss=soft_cross_entropy):
    """The training loss, written out: means over the batch of the losses that the samples have."""
    generated = loss(batch.auxiliary_logits, task.label_generator(batch.inputs, batch.labels))
    return (batch.mask[:, 0] * (batch.losses[:, 0] + weight * generated)).mean()


@pytest.mark.parametrize(("loss", "weight"), [("cross-entropy", 1.0), ("focal", 0.4)])
def test_the_training_loss_is_the_main_loss_and_that_of_the_generated_labels(loss, weight):
    task = smooth_task()
    batch = task.training_batch(torch.Generator().manual_seed(5))
    config = RunConfig(labels=LabelsConfig(loss=loss, weight=weight))
    function = {"cross-entropy": soft_cross_entropy, "focal": focal_loss}[loss]
    for method in ("maxl", "maxl-f", "auxilearn-labels", "auxilearn-labels-frozen"):
        training_loss = make_training_loss(parse_method(method), config, task)
        torch.testing.assert_close(training_loss(*batch), inner_loss(task, batch, weight, function))
        assert training_loss.mean_weights(batch) == pytest.approx((1.0, weight))


def test_a_combiner_of_both_losses_is_learned_with_the_labels():
    task = LabelledNoisy(0, NoisyOptions(), hold_out=True)
    trainer = Trainer(
        task, make_training_loss(parse_method("auxilearn-labels"), noisy_config(), task), noisy_config().train, seed=0
    )
    assert trainer.combiner is not None
    before = deepcopy(trainer.training_loss.state_dict())
    trainer.run()
    after = trainer.training_loss.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"generator.backbone.0.weight", "combination.combiner.phi"} <= changed
    layers = trainer.combiner.layers()
    assert all(bool((layer >= 0).all()) for name, layer in layers.items() if "weight" in name)


def test_learned_labels_follow_the_hypergradient():
    task = smooth_task()
    trainer = trainer_of(task, "auxilearn-labels")
    reference = deepcopy(task)
    generator = torch.Generator().manual_seed(3)
    torch.randint(2**63 - 1, (), generator=generator)  # the seed of the outer batches, drawn first
    outer_batches = deepcopy(trainer.outer_generator.get_state())
    steps = moved(task.label_generator, trainer.run)
    # The student's one inner step, and then -<lr * d outer / dW, d/dphi d inner / dW> by hand.
    params = list(reference.model.parameters())
    grads = torch.autograd.grad(inner_loss(reference, reference.training_batch(generator)), params)
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            param -= LR * grad
    v = torch.autograd.grad(reference.outer_loss(), params, allow_unused=True, materialize_grads=True)
    generator.set_state(outer_batches)
    loss = inner_loss(reference, reference.training_batch(generator))
    inner = torch.autograd.grad(loss, params, create_graph=True)
    product = sum((LR * a * b).sum() for a, b in zip(v, inner, strict=True))
    phi = dict(reference.label_generator.named_parameters())
    expected = torch.autograd.grad(product, list(phi.values()))
    for (name, _), grad in zip(phi.items(), expected, strict=True):
        torch.testing.assert_close(steps[name], grad)  # a step of SGD with lr 1 along -(-product)


def test_maxl_follows_the_derivative_through_its_look_ahead():
    task = smooth_task()
    config = replace(STEP, inner_steps=2, weight_decay=0.2)
    trainer = trainer_of(task, "maxl", config, LabelsConfig(lr=1.0, entropy_weight=0.3))
    reference = deepcopy(task)
    outer_batches = trainer.outer_generator.get_state()
    steps = moved(task.label_generator, trainer.run)
    reference.model.load_state_dict(task.model.state_dict())  # outer steps leave the student as it is
    generator = torch.Generator()
    generator.set_state(outer_batches)
    phi = dict(reference.label_generator.named_parameters())
    start = {name: p.detach().clone() for name, p in phi.items()}
    for _ in range(2):
        batch = reference.training_batch(generator)
        params = dict(reference.model.named_parameters())
        grads = torch.autograd.grad(inner_loss(reference, batch), list(params.values()), create_graph=True)
        ahead = {name: p - LR * (g + 0.2 * p) for (name, p), g in zip(params.items(), grads, strict=True)}
        logits = torch.func.functional_call(reference.model, ahead, (batch.inputs,))[:, :3]
        known = batch.mask[:, 0].bool()
        main = F.cross_entropy(logits[known], batch.labels[known])
        mean = reference.label_generator(batch.inputs, batch.labels)[known].mean(dim=0)
        loss = main + 0.3 * (mean * mean.log()).sum()
        for p, grad in zip(phi.values(), torch.autograd.grad(loss, list(phi.values())), strict=True):
            p.data -= grad
    for name, p in phi.items():
        torch.testing.assert_close(steps[name], p.detach() - start[name])


def test_the_entropy_term_of_the_outer_loss_adds_its_own_gradient():
    steps = []
    for weight in (0.0, 0.5):
        task = smooth_task()
        teacher = deepcopy(task.label_generator)
        trainer = trainer_of(task, "auxilearn-labels", STEP, replace(LABELS, outer_entropy_weight=weight))
        generator = torch.Generator()
        generator.set_state(trainer.outer_generator.get_state())
        steps.append(moved(task.label_generator, trainer.run))
    batch = task.training_batch(generator)
    known = batch.mask[:, 0].bool()
    mean = teacher(batch.inputs, batch.labels)[known].mean(dim=0)
    (0.5 * (mean * mean.log()).sum()).backward()
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(steps[1][name] - steps[0][name], -parameter.grad)


def test_the_entropy_term_of_a_batch_without_main_labels_is_zero():
    task = smooth_task()
    task.mask = torch.zeros_like(task.mask)
    labels = replace(LABELS, outer_entropy_weight=0.5)
    trainer = trainer_of(task, "auxilearn-labels", replace(STEP, outer_steps=2), labels)
    assert not any(step.any() for step in moved(task.label_generator, trainer.run).values())
    assert not any(record.skipped for record in trainer.records)


@pytest.mark.parametrize("method", ["maxl", "auxilearn-labels"])
def test_the_class_of_a_sample_without_main_label_may_be_any(method):
    weights = []
    for filled in (0, 2):
        task = smooth_task()
        task.labels = torch.where(task.mask[:, 0].bool() | (torch.arange(60) < 20), task.labels, filled)
        trainer_of(task, method, replace(STEP, outer_steps=2)).run()
        weights.append(task.label_generator.backbone[0].weight)
    assert torch.equal(*weights)


def test_maxl_takes_no_step_on_a_batch_without_main_labels():
    task = smooth_task()
    task.mask = torch.zeros_like(task.mask)
    trainer = trainer_of(task, "maxl", replace(STEP, outer_steps=2))
    assert not any(step.any() for step in moved(task.label_generator, trainer.run).values())
    assert [record.outer_loss for record in trainer.records] == [None, None]


def test_maxl_outlives_a_scheduler_that_ends_at_0():
    task = smooth_task()
    scheduler = Component("CosineAnnealingLR", {"T_max": 4})
    trainer = trainer_of(task, "maxl", replace(STEP, outer_steps=2, inner_steps=2, inner_scheduler=scheduler))
    assert [record.outer_loss is None for record in trainer.run()] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("combiner", [None, "nonlinear"])
def test_the_hypergradient_is_that_of_the_solved_student(combiner):
    task = smooth_task()
    config = RunConfig(
        STEP, CombinerConfig(hidden=(3,), skip=True), labels=LabelsConfig(loss="focal", combiner=combiner)
    )
    loss = make_training_loss(parse_method("auxilearn-labels"), config, task).double()
    student = [p.requires_grad_() for p in task.model.parameters()]

    def inner_loss():
        batch = task.training_batch(torch.Generator().manual_seed(1))
        return loss(*batch) + 0.05 * sum(p.square().sum() for p in student)

    minimise(inner_loss, student)
    phi = [p for group in loss.parameter_groups() for p in group["params"]]
    report = verify_hypergradient(task.outer_loss, inner_loss, student, phi, solver=MINRES(tol=1e-9), max_directions=4)
    assert report.verdict.startswith("right"), report


@pytest.mark.parametrize("method", ["maxl-f", "auxilearn-labels-frozen"])
def test_frozen_generators_stay_as_they_start(method):
    task = smooth_task()
    trainer = trainer_of(task, method, train_config(outer_steps=3, inner_steps=2))
    assert not any(step.any() for step in moved(task.label_generator, trainer.run).values())
    assert all(record.outer_loss is None and record.matvecs is None for record in trainer.records)


def test_maxl_records_its_outer_loss_and_no_residual():
    task = smooth_task()
    records = trainer_of(task, "maxl", train_config(outer_steps=2, inner_steps=3, warmup=0.4, cooldown=0.4)).run()
    assert all(record.outer_loss is not None and record.outer_seconds > 0 for record in records)
    assert all(record.residual is None for record in records)


def test_only_the_learned_labels_hold_out_an_auxiliary_set():
    held_out = {name: parse_method(name).holds_out for name in ("maxl", "maxl-f", "auxilearn-labels", "stl")}
    assert held_out == {"maxl": False, "maxl-f": False, "auxilearn-labels": True, "stl": False}
    assert parse_method("auxilearn-labels-frozen").holds_out
    learned = {name: parse_method(name).learned for name in ("maxl", "maxl-f", "auxilearn-labels")}
    assert learned == {"maxl": True, "maxl-f": False, "auxilearn-labels": True}


def labelled():
    return LabelledNoisy(0, NoisyOptions(), hold_out=True)


def second_loss():
    task = labelled()
    made = task.training_batch
    task.training_batch = lambda generator: (b := made(generator))._replace(losses=b.losses[:, :1].expand(-1, 2))
    return task


def with_batch(**changes):
    task = labelled()
    made = task.training_batch
    task.training_batch = lambda generator: made(generator)._replace(**changes)
    return task


def plain_batch():
    task = labelled()
    made = task.training_batch
    task.training_batch = lambda generator: Batch(*made(generator)[:2])
    return task


def shared_parameter(learned=True):
    task = labelled()
    features = nn.Linear(4, 4).requires_grad_(learned)
    task.model = nn.Sequential(features, *task.model)
    task.label_generator.backbone.insert(0, features)
    return task


class Altered(nn.Module):
    def __init__(self, generator, change):
        super().__init__()
        self.generator, self.change = generator, change

    def forward(self, inputs, labels):
        return self.change(self.generator(inputs, labels))


def with_labels(change):
    task = labelled()
    task.label_generator = Altered(task.label_generator, change)
    return task


def main_last():
    task = labelled()
    task.main = 1
    return task


def test_a_part_that_is_not_trained_may_be_shared_with_the_student():
    check_task(shared_parameter(learned=False), labels=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (plain_batch, "task.training_batch: got a batch of 2 entries, must return a LabelBatch"),
        (partial(with_batch, mask=None), "task.training_batch: got a batch without a mask, must return a LabelBatch"),
        (main_last, "task.main: got 1, the last of task.loss_names, which must be the loss of the generated labels"),
    ],
)
def test_the_trainer_tells_what_cannot_be_labelled(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        trainer_of(make(), "maxl").run()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (OneWeight, r"task.label_generator: there is none.*auxfast.nn.LabelGenerator"),
        (plain_batch, "task.training_batch: got Batch, must return a LabelBatch"),
        (second_loss, "got losses that are not 0 in the column of the generated labels"),
        (partial(with_batch, mask=torch.ones(16, 2)), "a mask that is not 0 in the column of the generated labels"),
        (partial(with_batch, auxiliary_logits=torch.ones(16, 5)), r"labels of shape \(16, 7\), must be \(16, 5\)"),
        (shared_parameter, "task.label_generator: its parameter backbone.0.weight is one of task.model too"),
        (
            partial(with_batch, auxiliary_logits=torch.ones(16, 7, 5)),
            r"auxiliary_logits of shape \(16, 7, 5\), and a loss has the shape \(16,\)",
        ),
        (main_last, "task.main: got 1, the last of task.loss_names"),
        (partial(with_labels, lambda labels: labels - 0.1), "label_generator: got labels that are no distributions"),
        (partial(with_labels, lambda labels: 2 * labels), "label_generator: got labels that are no distributions"),
        (partial(with_labels, lambda labels: labels * torch.nan), "label_generator: got labels that are no distrib"),
        (partial(with_labels, torch.Tensor.detach), "task.label_generator: got labels that its own parameters play no"),
    ],
)
def test_what_cannot_be_labelled_is_told(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        check_task(make(), labels=True)


def test_a_task_with_a_generator_is_accepted_and_trains_other_methods_too():
    check_task(labelled(), labels=True)
    task = LabelledNoisy(0, NoisyOptions(), hold_out=False)
    assert isinstance(task.training_batch(torch.Generator()), LabelBatch)
    config = noisy_config()
    Trainer(task, make_training_loss(parse_method("stl"), config, task), config.train, seed=0).run()


@pytest.mark.parametrize(
    ("section", "given"),
    [("labels", LabelsConfig(weight_decay=0.1)), ("combiner", CombinerConfig(weight_decay=0.1, positive="clip"))],
)
def test_a_decay_of_outer_parameters_needs_an_optimizer_that_knows_it(section, given):
    config = train_config(outer_optimizer=Component("Rprop", {}))
    RunConfig(config)
    with pytest.raises(ValueError, match=rf"{section}.weight_decay: got 0.1, must be 0 with .*outer_optimizer Rprop"):
        RunConfig(config, **{section: given})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "hinge"}, "labels.loss: got 'hinge', must be 'cross-entropy' or 'focal'"),
        ({"combiner": "none"}, "labels.combiner: got 'none', must be one of linear"),
        ({"lr": -1.0}, "labels.lr: got -1.0, must be a finite number of at least 0"),
    ],
)
def test_options_out_of_range_are_told(changes, words):
    with pytest.raises(ValueError, match=words):
        LabelsConfig(**changes)
