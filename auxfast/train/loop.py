"""Algorithm 1 of the paper, for any task that can say its losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from auxfast.implicit import HyperOptimizer
from auxfast.train.config import TrainConfig


class Batch(NamedTuple):
    """losses: (batch, num_losses), or (batch, num_losses, H, W) of pixels, with a graph to the model. mask: None, or of
    the same shape, of 0 and 1, where 0 marks a loss that the sample does not have (its label is unknown)."""

    losses: Tensor
    mask: Tensor | None


class Task(Protocol):
    """What the loop needs to know of a problem: a model, its losses, and how good it is."""

    loss_names: tuple[str, ...]
    main: int  # column, or channel, of the main loss
    model: nn.Module

    def training_batch(self, generator: torch.Generator) -> Batch:
        """The losses of the model on a batch of training samples."""

    def outer_loss(self) -> Tensor:
        """The main loss of the model on the auxiliary set: a scalar with a graph to the model."""

    def score(self) -> float:
        """How good the model is on the test part."""


Combine = Callable[[Tensor, "Tensor | None"], Tensor]  # (losses, mask) -> scalar training loss


class OuterRecord(NamedTuple):
    """What was seen at one outer step. Where nothing is learned, there is no outer loss and no residual.

    `residual` is that of the linear system behind the hypergradient, relative to its right-hand side.
    `loss_weights` holds d (training loss) / d (loss j), as a mean over the samples (in images: pixels) of one batch
    that have loss j (paper, section 3.2).
    """

    training_loss: float
    outer_loss: float | None
    residual: float | None
    loss_weights: tuple[float, ...]


def train(
    task: Task,
    combine: Combine,
    config: TrainConfig,
    generator: torch.Generator,
    *,
    outer: HyperOptimizer | None = None,
    on_outer_step: Callable[[OuterRecord], None] | None = None,
) -> list[OuterRecord]:
    """Algorithm 1: train `task.model` on the combined loss and, with `outer`, the combiner on the outer loss.

    Args:
        combine: (losses, mask) -> scalar training loss; an `auxfast.nn` combiner, or any function.
        generator: draws the batches. The same state gives the same run, to the bit, on the same machine.
        outer: the optimizer of the combiner's parameters; None leaves the combiner as it is.
        on_outer_step: called with every record as it is made.

    Returns:
        One record for each of the `config.outer_steps` outer steps.

    Raises:
        FloatingPointError: the training loss is not finite any more; says when, and what to try.
    """
    parameters = list(task.model.parameters())
    inner = config.inner_optimizer(parameters)
    records = []
    for step in range(config.outer_steps):
        for _ in range(config.inner_steps):
            inner.zero_grad()
            loss = combine(*task.training_batch(generator))
            torch.autograd.backward(loss, inputs=parameters)  # not into the combiner's .grad
            inner.step()
        batch = task.training_batch(generator)
        training_loss = combine(*batch)
        weights = mean_loss_weights(combine, batch)
        outer_loss = stats = None
        if outer is not None:
            outer_loss = task.outer_loss()
            # The inner optimizer adds the gradient of the weight decay itself; here it has to be in the loss.
            decay = 0.5 * config.weight_decay * sum(p.square().sum() for p in parameters)
            stats = outer.step(outer_loss, training_loss + decay, parameters)
        record = OuterRecord(
            training_loss.item(),
            None if outer_loss is None else outer_loss.item(),
            None if stats is None else stats.residual,
            weights,
        )
        if not math.isfinite(record.training_loss):
            raise FloatingPointError(
                f"the training loss is {record.training_loss} at outer step {step}: try a smaller inner_lr or outer_lr"
            )
        records.append(record)
        if on_outer_step is not None:
            on_outer_step(record)
    return records


def mean_loss_weights(combine: Combine, batch: Batch) -> tuple[float, ...]:
    """d (combined loss of a sample) / d (its loss j), as a mean over the samples that have loss j.

    `combine` must be a mean over the batch, as the combiners are by default. In images, the samples are the pixels: a
    weight of 1 is that in a mean over all pixels. One number for each loss.
    """
    losses = batch.losses.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(combine(losses, batch.mask), losses)
    mask = torch.ones_like(losses) if batch.mask is None else batch.mask
    samples = losses[:, 0].numel()
    sums, counts = (t.transpose(0, 1).flatten(1).sum(dim=1) for t in (gradient, mask))
    return tuple((sums * samples / counts.clamp(min=1)).tolist())
