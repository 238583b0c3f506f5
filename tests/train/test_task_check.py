"""What a task must be: faults are told before training, by the member's name, what was given and what is allowed."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from auxfast.train import WHOLE, Batch, RunConfig, Trainer, make_training_loss, parse_method
from auxfast.train.task_check import check_task
from train.problems import ExampleWeights, Noisy, NoisyOptions, OneWeight, Shared, SharedLabels, train_config


def test_what_a_task_must_be_is_accepted():
    check_task(OneWeight())
    check_task(Noisy(0, NoisyOptions(), hold_out=True), own=True)
    task = OneWeight()
    task.validation_score = lambda: task.model.weight.sum()  # a tensor, with a graph
    task.loss_names = ["main", "helpful", "harmful"]
    check_task(task)


def _losses(task):
    return OneWeight.training_batch(task, None).losses


def _raise():
    raise IndexError("index 3 is out of bounds")


FAULTS = {
    "no score": (
        lambda task: setattr(type(task), "score", property()),
        r"task\.score: Task has none; see auxfast\.train\.Task",
    ),
    "names in one string": (
        lambda task: setattr(task, "loss_names", "main"),
        r"task\.loss_names: got 'main', must be a tuple of strings, one for each loss",
    ),
    "numbers for names": (lambda task: setattr(task, "loss_names", (0, 1)), r"loss_names: got \(0, 1\), must be"),
    "no names": (lambda task: setattr(task, "loss_names", ()), "task.loss_names: got none, must name one loss"),
    "main out of range": (
        lambda task: setattr(task, "main", 3),
        r"task\.main: got 3, must be the index of the main loss, an integer from 0 to 2",
    ),
    "main by name": (lambda task: setattr(task, "main", "main"), r"task\.main: got 'main', must be the index"),
    "a function for a model": (
        lambda task: setattr(task, "model", len),
        r"task\.model: got builtin_function_or_method, must be a torch\.nn\.Module",
    ),
    "a model without parameters": (
        lambda task: setattr(task, "model", nn.Tanh()),
        r"task\.model: got Tanh with no parameter that requires gradients",
    ),
    "a score that is no method": (
        lambda task: setattr(task, "score", 0.5),
        r"task\.score: got float, must be a method",
    ),
    "a flag for what gives the auxiliary set back": (
        lambda task: setattr(task, "release_auxiliary", True),
        r"task\.release_auxiliary: got bool, must be a method",
    ),
    "an auxiliary set that cannot be given back": (
        lambda task: setattr(task, "release_auxiliary", _raise),
        r"task\.release_auxiliary: raised IndexError: index 3 is out of bounds",
    ),
    "no batches once it is given back": (
        lambda task: setattr(
            task, "release_auxiliary", lambda: setattr(task, "training_batch", lambda generator: None)
        ),
        r"task\.training_batch: got NoneType, must return a Batch",
    ),
    "losses as one tensor": (
        lambda task: setattr(task, "training_batch", lambda generator: _losses(task)),
        r"task\.training_batch: got Tensor, must return a Batch\(losses, mask\)",
    ),
    "a loss too few": (
        lambda task: setattr(task, "training_batch", lambda generator: Batch(_losses(task)[:, :2], None)),
        r"training_batch: got losses of shape \(1, 2\), must be \(batch, 3\)",
    ),
    "losses without a graph": (
        lambda task: setattr(task, "training_batch", lambda generator: Batch(_losses(task).detach(), None)),
        r"training_batch: got losses without a graph, must be computed from task\.model",
    ),
    "losses of another model": (
        lambda task: setattr(task, "training_batch", lambda _: Batch(torch.ones(2, 3, requires_grad=True), None)),
        r"training_batch: got losses that the parameters of task\.model play no part in",
    ),
    "no samples": (
        lambda task: setattr(task, "training_batch", lambda generator: Batch(_losses(task)[:0], None)),
        r"training_batch: got losses of shape \(0, 3\), must have a sample",
    ),
    "a loss that is nan": (
        lambda task: setattr(task, "training_batch", lambda generator: Batch(_losses(task) * math.nan, None)),
        r"training_batch: got losses that are not finite before the first step",
    ),
    "a mask of another shape": (
        lambda task: setattr(task, "training_batch", lambda generator: Batch(_losses(task), torch.ones(1, 2))),
        r"training_batch: got a mask of shape \(1, 2\), must be None or \(1, 3\)",
    ),
    "a mask of weights": (
        lambda task: setattr(task, "training_batch", lambda generator: Batch(_losses(task), torch.full((1, 3), 0.5))),
        r"training_batch: got a mask of other numbers than 0 and 1",
    ),
    "a batch that fails": (
        lambda task: setattr(task, "training_batch", lambda generator: _raise()),
        r"task\.training_batch: raised IndexError: index 3 is out of bounds \(test_task_check\.py, line \d+\)",
    ),
    "an outer loss that is a number": (
        lambda task: setattr(task, "outer_loss", lambda: 0.5),
        r"task\.outer_loss: got float, must return a scalar tensor with a graph to the model",
    ),
    "an outer loss without a graph": (
        lambda task: setattr(task, "outer_loss", lambda: torch.ones(())),
        r"task\.outer_loss: got a tensor without a graph, must return",
    ),
    "an outer loss of another model": (
        lambda task: setattr(task, "outer_loss", lambda: torch.ones((), requires_grad=True) * 2),
        r"task\.outer_loss: got a loss that the parameters of task\.model play no part in",
    ),
    "no score returned": (
        lambda task: setattr(task, "validation_score", lambda: None),
        r"task\.validation_score: got NoneType, must return a number, more is better",
    ),
    "a score that is nan": (
        lambda task: setattr(task, "validation_score", lambda: math.nan),
        r"task\.validation_score: got nan before the first step",
    ),
    "further scores without names": (
        lambda task: setattr(
            task,
            "further_scores",
            lambda: [71.0, 88.5],
        ),
        r"task\.further_scores: got \[71\.0, 88\.5\], must return a dict of numbers by their names",
    ),
    "a further score that is no number": (
        lambda task: setattr(task, "further_scores", lambda: {"top 3": None}),
        r"task\.further_scores: got NoneType, must return numbers by names",
    ),
    "a split of lists": (
        lambda task: setattr(task, "split_indices", lambda: {"training": [1, 2]}),
        r"task\.split_indices: got \{'training': \[1, 2\]\}, must return a dict of \(n,\) int64 tensors",
    ),
    "a training loss that is a method": (
        lambda task: setattr(task, "training_loss", lambda losses, mask: losses.sum()),
        r"task\.training_loss: got function, must be a torch\.nn\.Module",
    ),
    "a training loss with the model's parameters": (
        lambda task: setattr(task, "training_loss", task.model),
        r"task\.training_loss: its parameter weight is one of task\.model too",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_before_training(fault):
    class Task(OneWeight):
        pass

    task = Task()
    change, message = FAULTS[fault]
    change(task)
    with pytest.raises((TypeError, ValueError), match=message):
        check_task(task)


def test_missing_labels_may_have_any_loss():
    task = OneWeight()
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    task.training_batch = lambda generator: Batch(torch.where(mask.bool(), _losses(task), math.nan), mask)
    check_task(task)


def test_a_training_loss_of_its_own_is_called_with_the_batch():
    task = OneWeight()
    task.training_loss = ExampleWeights()  # which wants rows
    with pytest.raises(ValueError, match=r"task\.training_loss: raised TypeError: .*rows"):
        check_task(task, own=True)
    check_task(task)
    own = task.training_loss
    own.constant = nn.Parameter(torch.zeros(()), requires_grad=False)
    own.forward = lambda losses, mask: losses.sum()
    with pytest.raises(ValueError, match=r"task\.training_loss: got a loss that its own parameters play no part in"):
        check_task(task, own=True)
    own.forward = lambda losses, mask: own.logits.sum()
    with pytest.raises(ValueError, match=r"training_loss: got a loss that the parameters of task\.model play no part"):
        check_task(task, own=True)


def test_the_trainer_refuses_what_is_no_task():
    task, config = OneWeight(), train_config()
    loss = make_training_loss(parse_method("equal"), RunConfig(config), task)
    incomplete = SimpleNamespace(loss_names=("main",), main=0, model=task.model)
    with pytest.raises(TypeError, match=r"task\.training_batch: SimpleNamespace has none"):
        Trainer(incomplete, loss, config, 0)


class _LessDrawn(Shared):
    def training_batch(self, generator, part=WHOLE):
        batch = super().training_batch(generator, part)
        torch.randn(len(batch.losses), generator=generator)
        return batch


class _Repeated(Shared):
    def training_batch(self, generator, part=WHOLE):
        return super().training_batch(generator, WHOLE)


class _Related(Shared):
    def training_batch(self, generator, part=WHOLE):
        batch = super().training_batch(generator, part)
        return batch._replace(losses=batch.losses - batch.losses.mean(dim=0))


def _with_sum(task):
    task.training_loss.forward = lambda losses, mask, rows: (
        ExampleWeights.forward(task.training_loss, losses, mask, rows) * len(losses)
    )
    return task


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (OneWeight(), r"task\.training_batch: OneWeight's takes no argument part, .* or start one process"),
        (_LessDrawn(), r"task\.training_batch: draws less for a part of a batch than for the whole: draw everything"),
        (_Repeated(), r"got parts of 15, 15 samples, and the whole batch has 15: draw everything"),
        (_Related(), r"got other losses in the parts of a batch than in the whole: .* no loss of a sample may depend"),
        (Shared(batch=1), r"task\.training_batch: got no sample in part 1 of 2, must have one for each process"),
        (_with_sum(Shared()), r"task\.training_loss: got .* must be a mean over samples"),
    ],
)
def test_a_task_whose_parts_are_not_the_whole_is_refused_for_several_processes(task, message):
    check_task(Shared(), own=True, processes=3)
    check_task(SharedLabels(), labels=True, processes=2)
    with pytest.raises((TypeError, ValueError), match=message):
        check_task(task, own=hasattr(task, "training_loss"), processes=2)
