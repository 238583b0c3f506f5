"""A problem as the trainer needs to know it: a model, its losses, and how good it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """Losses of a batch.

    losses: (batch, num_losses), or (batch, num_losses, H, W) of pixels, with a graph to the model.
    mask: None, or 0 and 1 in the same shape, where 0 marks a loss that the sample lacks: its label is unknown.
    """

    losses: Tensor
    mask: Tensor | None


class LabelBatch(NamedTuple):
    """Losses of a batch, and what a label generator needs to add one more.

    losses: as in `Batch`. The last column is that of the generated labels, and is 0.
    mask: as in `Batch`, and 0 in the last column: without a generator, no sample has such labels. With one, the samples
        (points) that have the main loss have them.
    auxiliary_logits: the student's logits of the auxiliary classes, (batch, num_auxiliary) or (batch, num_auxiliary,
        points).
    inputs: what the generator sees, such as the images.
    labels: main classes, int64, as `LabelGenerator` takes them. Where the main loss is masked, any class will do.
    """

    losses: Tensor
    mask: Tensor
    auxiliary_logits: Tensor
    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Part:
    """The part of each batch that this process computes, where several share a run (`torchrun`).

    All processes draw the whole batch from generators in the same state, the samples' indices and whatever else is
    random, and each takes its part of what was drawn: then they have the batches that one process has.

    rank: number of the process, from 0.
    size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def of(self, drawn: Tensor) -> Tensor:
        """This process's part of what was drawn for a whole batch, (batch, ...): a slice without a copy. The parts
        differ by one sample at most, the first ones being larger."""
        return drawn.tensor_split(self.size)[self.rank]


WHOLE = Part()


class Task(Protocol):
    """A problem with its four parts: training, auxiliary, validation and test samples, as one seed has drawn them.

    Once it is made, a task draws only from the generator that it is given, one of the CPU, so that a run resumes with
    the same batches. Its tensors and its model are attributes, and are moved to another device if a run wants that.

    A task may also have `shared_parameters()`: the model's parameters that the losses share, without those of a single
    loss. GradNorm, GCS and MGDA compare the losses' gradients in them, as their papers do; otherwise in all parameters.

    It may have `release_auxiliary()`: from now on `training_batch` draws from the samples of the auxiliary set too. The
    trainer calls it after the last outer step (`TrainConfig.cooldown`), and again where a run resumes after that, so
    that the labels which told the weights apart are trained on in the end.

    It may have `further_scores()`: other figures of the model on the test part, a dict of numbers by their names in
    tables, such as {"top-3 accuracy, %": 68.2}. They are in the result beside the score, and nothing is chosen by them.

    It may have `split_indices()`: the indices of each part's samples by the part's name, as they are before training.
    They are written to the run's folder, and a run goes on only with the same.

    It may have a `label_generator`, a module such as `auxfast.nn.LabelGenerator` that is called with inputs and labels.
    Then `training_batch` returns a `LabelBatch`, the last of `loss_names` is that of the generated labels, and the
    methods `auxilearn-labels`, `maxl` and `maxl-f` can train it. What it returns is a distribution over the auxiliary
    classes for each sample (point).

    And it may bring outer parameters of its own, for weights of examples, decays, a network of labels: `training_loss`,
    a module that holds them and is called with a batch, `training_loss(*batch)`, to return a scalar. What it needs
    besides losses and mask, such as the samples' indices, are further entries of the batch, then a named tuple of one's
    own that begins with these two. The method `own` trains with it and learns its parameters, `own-frozen` is the
    control. If it has a `project_()`, that is called after each outer step.

    Several processes can share its runs if `training_batch` takes one more argument, `part`, a `Part` that is given by
    name: it draws the whole batch, and returns that part of it. A sample's losses must not depend on the other samples
    of the batch, and a training loss of the task's own must be a mean over the samples. A task without that argument
    is refused there. All processes compute the whole `outer_loss`; the first alone computes the scores.
    """

    loss_names: tuple[str, ...]
    main: int  # index of the main loss among the losses
    model: nn.Module

    def training_batch(self, generator: torch.Generator) -> Batch | Any:
        """The losses of the model on a batch of training samples: a `Batch`, or one's own named tuple (see above)."""

    def outer_loss(self) -> Tensor:
        """The main loss of the model on the auxiliary set: a scalar with a graph to the model."""

    def validation_score(self) -> float:
        """How good the model is on the validation part: more is better. It is measured at every outer step, for the
        report and for early stopping: what it takes adds to every run."""

    def score(self) -> float:
        """How good the model is on the test part: more is better."""
