"""One outer step of learned labels against one meta step of MAXL, for student and teacher of `fashion-labels`.

Step by step MAXL is the cheaper one: its meta step by hand takes 0.84 to 0.86 of our outer step with both networks (19
against 23 ms, 31 against 36; an inner step takes 6.5 and 9; three quiet runs). What makes learned labels cheap is that
a run takes one outer step for eight inner ones, MAXL one for each.

On a busy core, where an outer step with the ConvNet took 28 ms, the entropy term took 5, for the teacher's labels are
computed twice, losses and forward passes 8, and `Identity()`, which has the same solution, another 11 for its
certificate. By hand, with forward-mode derivatives of the student in place of double backward, an outer step took 18 ms
there, 0.75 of MAXL's 24.

By `torch.profiler` the share of softmax and its derivatives is 1%, so that an op that fuses it with the cross-entropy
would gain nothing: convolutions, pooling and BatchNorm, whose second derivative is many small products, take the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from timing import interleaved
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from auxfast.experiments.paper.fashion_labels import BATCH, CLASSES, EXPERIMENT, SIDE, make_student, make_teacher
from auxfast.experiments.paper.label_task import LabelTask
from auxfast.nn import negative_entropy, soft_cross_entropy
from auxfast.train import Trainer, make_training_loss, parse_method
from auxfast.train.maxl import maxl_step

LABELLED, HELD_OUT = 600, 30  # those of the setting of 1%


def make_task(network: str) -> LabelTask:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(LABELLED, 1, SIDE, SIDE, generator=generator)
    labels = torch.randint(CLASSES, (LABELLED,), generator=generator)
    rows = torch.arange(LABELLED)
    options = EXPERIMENT.config.task
    return LabelTask(
        images=images,
        labels=labels,
        num_classes=CLASSES,
        label_generator=make_teacher(network, options.temperature),
        batch_size=BATCH,
        training=rows[HELD_OUT:],
        auxiliary=rows[:HELD_OUT],
        validation=rows[:HELD_OUT],
        test=rows[:HELD_OUT],
        model=make_student(network),
    )


def make_trainer(name: str, network: str) -> Trainer:
    task, config, method = make_task(network), EXPERIMENT.config, parse_method(name)
    return Trainer(task, make_training_loss(method, config, task), config.train, 0)


def maxl_by_hand(network: str) -> Callable[[], Any]:
    """The meta step as MAXL's authors have it: functional parameters after one step, with a graph through that step."""
    task = make_task(network)
    student, teacher, lr = task.model, task.label_generator, 1e-2
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def main_loss(parameters: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        main, auxiliary = functional_call(student, parameters, (inputs,)).tensor_split([CLASSES], dim=1)
        return F.cross_entropy(main, labels), auxiliary

    def step() -> None:
        rows = task.training[torch.randperm(len(task.training), generator=generator)[: task.batch_size]]
        inputs, labels = task.images[rows], task.labels[rows]
        parameters = dict(student.named_parameters())
        soft_labels = teacher(inputs, labels)
        loss, auxiliary = main_loss(parameters, inputs, labels)
        loss = loss + soft_cross_entropy(auxiliary, soft_labels).mean()
        grads = torch.autograd.grad(loss, tuple(parameters.values()), create_graph=True)
        ahead = {name: w - lr * grad for (name, w), grad in zip(parameters.items(), grads, strict=True)}
        meta_loss, _ = main_loss(ahead, inputs, labels)
        meta_loss = meta_loss + 0.2 * negative_entropy(soft_labels)
        optimizer.zero_grad()
        torch.autograd.backward(meta_loss, inputs=list(teacher.parameters()))
        optimizer.step()

    return step


def maxl(network: str) -> Callable[[], Any]:
    trainer = make_trainer("maxl", network)
    loss, outer = trainer.maxl, trainer.outer
    assert loss is not None
    assert outer is not None
    return lambda: maxl_step(trainer._batch, loss, outer, trainer.parameters, 1e-2, trainer.outer_generator)


def outer_step(network: str) -> Callable[[], Any]:
    trainer = make_trainer("auxilearn-labels", network)

    def step() -> None:
        batch, training_loss, outer_loss = trainer._bilevel_losses()
        trainer._outer_step(outer_loss, training_loss, batch)

    return step


def inner_step(network: str) -> Callable[[], Any]:
    trainer = make_trainer("auxilearn-labels", network)
    trainer.config = replace(trainer.config, inner_steps=1)
    return trainer._inner_steps


@pytest.mark.parametrize("network", ["convnet", "resnet8"])
def test_outer_step_of_labels(benchmark, network):
    benchmark.group = "labels: one outer step, student and teacher of fashion-labels"
    steps = {
        "MAXL by hand": maxl_by_hand(network),
        "maxl": maxl(network),
        "auxilearn-labels": outer_step(network),
        "one inner step": inner_step(network),
    }
    seconds = interleaved(steps, rounds=15 if benchmark.enabled else 1, inner=1)
    benchmark.extra_info.update(
        {f"{name}, ms": 1e3 * s for name, s in seconds.items()},
        ratio=f"{seconds['MAXL by hand'] / seconds['auxilearn-labels']:.2f}x",
    )
    benchmark(steps["auxilearn-labels"])
