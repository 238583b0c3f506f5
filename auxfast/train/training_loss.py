"""The training loss: one number from the losses of a batch, by a combiner or by a weighting."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auxfast.implicit.ranks import Ranks
from auxfast.nn import (
    Combiner,
    ConvCombiner,
    DeepLinearCombiner,
    LinearCombiner,
    NonlinearCombiner,
    PolynomialCombiner,
    focal_loss,
    negative_entropy,
    soft_cross_entropy,
)
from auxfast.ops.inputs import full_precision
from auxfast.train.averaging import averaged_losses, factor_of_part, total
from auxfast.train.config import CombinerConfig, LabelsConfig, RunConfig
from auxfast.train.methods import LABELS, OWN, Method
from auxfast.train.task import Batch, LabelBatch, Task
from auxfast.train.task_check import label_generator, own_training_loss
from auxfast.weighting import Equal, SingleTask, make_weighting

_IMAGE = (64, 64)  # pixels in which a convolutional combiner's weight is measured: 256 x 256 would give 5% more


class LabelsOfAll(NamedTuple):
    """The mean label of all ranks' samples.

    mean: (classes,).
    factor: see `factor_of_part`; of this rank's samples that have labels.
    """

    mean: Tensor
    factor: float


class TrainingLoss(nn.Module, ABC):
    """Maps a batch, called as `loss(*batch)`, to a scalar, a mean over its samples (and pixels).

    `learned`: whether outer steps move its parameters.
    `ranks`: processes that share each batch. Called with a part of it, the scalar is that part's mean.
    """

    learned = False
    ranks: Ranks | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Outer parameters that require gradients, as groups for the outer optimizer."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    @abstractmethod
    def forward(self, losses: Tensor, mask: Tensor | None, *further: Any) -> Tensor: ...

    @abstractmethod
    def mean_weights(self, batch: Batch) -> tuple[float, ...]:
        """The weight of each loss in the training loss: d (training loss of a sample) / d (its loss j), as a mean over
        the samples that have loss j, of all ranks. In images, the samples are the pixels."""


class CombinedLoss(TrainingLoss):
    """Training loss by a combiner. Given images of losses, a combiner of samples sees every pixel as a sample.

    Args:
        combiner: one of `auxfast.nn`, or the task's own training loss (see `Task`).
        weight_decay: of its parameters, in the outer optimizer.
    """

    def __init__(self, combiner: nn.Module, *, learned: bool = True, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.combiner = combiner
        self.learned = learned
        self.weight_decay = weight_decay
        self._takes_images = isinstance(combiner, ConvCombiner)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `TrainingLoss`: with the weight decay of their own."""
        return [{**group, "weight_decay": self.weight_decay} for group in super().parameter_groups()]

    def forward(self, losses: Tensor, mask: Tensor | None, *further: Any) -> Tensor:
        if not isinstance(self.combiner, Combiner):
            own: Tensor = self.combiner(losses, mask, *further)
            return own
        if self._takes_images and losses.dim() != 4:
            raise ValueError(
                "losses must be images, (batch, num_losses, height, width), for the combiner conv, and this task's are "
                f"{tuple(losses.shape)}: choose another one"
            )
        if losses.dim() > 2 and not self._takes_images:
            losses, mask = _samples(losses), None if mask is None else _samples(mask)
        combined: Tensor = self.combiner(losses, mask)
        return combined

    def mean_weights(self, batch: Batch) -> tuple[float, ...]:
        """See `TrainingLoss`. They are the gradient through the combiner, at the losses of this batch."""
        with torch.enable_grad():
            losses = full_precision(batch.losses.detach()).requires_grad_()
            combined = self(losses, *batch[1:])
            (gradient,) = torch.autograd.grad(combined, losses, allow_unused=True, materialize_grads=True)
        mask = torch.ones_like(losses) if batch.mask is None else batch.mask
        samples = losses[:, 0].numel()
        sums, counts = (t.transpose(0, 1).flatten(1).sum(dim=1) for t in (gradient, mask))
        if self.ranks is None:
            return tuple((sums * samples / counts.clamp(min=1)).tolist())
        numbers = total(self.ranks, [*(sums * samples).tolist(), *counts.tolist()])
        pairs = zip(numbers[: len(sums)], numbers[len(sums) :], strict=True)
        return tuple(weight / max(count, 1) for weight, count in pairs)


class WeightedLoss(TrainingLoss):
    """Training loss by a weighting: the weighted sum of each loss's mean, where a sample that lacks a loss counts as 0.

    Args:
        weighting: one of `auxfast.weighting`.
        parameters: parameters of the model, in which some weightings compare the losses' gradients.
    """

    def __init__(self, weighting: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weighting = weighting
        self._parameters_of_model = list(parameters)
        self._constant = isinstance(weighting, (SingleTask, Equal))  # calling it anew would take 10% of a small step
        self._last: Tensor | None = None  # (num_losses,), weights of the last batch

    def forward(self, losses: Tensor, mask: Tensor | None, *further: Any) -> Tensor:
        means = mean_losses(losses, mask)
        if self._last is None or not self._constant:
            whole = means
            if self.ranks is not None:  # what a weighting learns, it learns of the whole batch
                whole = averaged_losses(self.ranks, means, len(losses), self._parameters_of_model)
            self._last = self.weighting(whole, self._parameters_of_model)
        return torch.dot(self._last, means)

    def mean_weights(self, batch: Batch) -> tuple[float, ...]:
        """See `TrainingLoss`. They are those of the last call: calling the weighting again would advance its state."""
        assert self._last is not None
        return tuple(self._last.tolist())


def combiner_of(loss: TrainingLoss) -> nn.Module | None:
    """The combiner of a training loss, or the task's own training loss; None if there is neither."""
    if isinstance(loss, GeneratedLabelsLoss):
        return combiner_of(loss.combination)
    return loss.combiner if isinstance(loss, CombinedLoss) else None


class GeneratedLabelsLoss(TrainingLoss):
    """Training loss of a student that learns a generator's labels beside the main task (paper, section 3.3): it is
    called with a `LabelBatch`.

    Args:
        generator: the task's label generator, whose parameters are outer ones.
        combination: combines all losses, the generated one included; what it learns are outer parameters too.
        main: index of the main loss.
        with_lookahead: whether outer steps are MAXL's, see `Trainer`.
    """

    _losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cross-entropy": soft_cross_entropy,
        "focal": focal_loss,
    }

    def __init__(
        self,
        generator: nn.Module,
        combination: TrainingLoss,
        config: LabelsConfig,
        main: int,
        *,
        learned: bool,
        with_lookahead: bool,
    ) -> None:
        super().__init__()
        self.generator, self.combination, self.config, self.main = generator, combination, config, main
        self.learned, self.with_lookahead = learned, with_lookahead
        self._last: Batch | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `TrainingLoss`: the generator's with its own learning rate, and those of the combination."""
        options = {"lr": self.config.lr, "weight_decay": self.config.weight_decay}
        generator = {"params": [parameter for parameter in self.generator.parameters() if parameter.requires_grad]}
        groups = [{**generator, **options}, *self.combination.parameter_groups()]
        return [group for group in groups if group["params"]]

    def forward(self, losses: Tensor, mask: Tensor | None, *further: Any) -> Tensor:
        if mask is None or len(further) != 3:
            given = "a batch without a mask" if mask is None else f"a batch of {2 + len(further)} entries"
            raise TypeError(f"task.training_batch: got {given}, must return a LabelBatch to be labelled")
        auxiliary_logits, inputs, labels = further
        soft_labels = full_precision(self.generator(inputs, labels))
        generated = self._losses[self.config.loss](full_precision(auxiliary_logits), soft_labels)
        losses = torch.cat([full_precision(losses[:, :-1]), generated[:, None]], dim=1)
        mask = torch.cat([mask[:, :-1], mask[:, self.main, None]], dim=1)
        self._last = Batch(losses.detach(), mask)
        combined: Tensor = self.combination(losses, mask)
        return combined

    def entropy_term(self, batch: LabelBatch, of_all: LabelsOfAll | None = None) -> Tensor:
        """The entropy term of the outer loss, a scalar with a graph to the generator alone. Labels of samples (points)
        without the main loss play no part: their main class may be any.

        of_all: what `labels_of_all` returns for this batch; None: it is found here, by a collective of all ranks.
        """
        weight = self.config.entropy_weight if self.with_lookahead else self.config.outer_entropy_weight
        known = self._known_labels(batch)
        of_all = of_all or self._labels_of_all(known)
        if of_all is not None:
            return weight * _negative_entropy_of_all(known, of_all)
        return weight * negative_entropy(known) if len(known) else known.sum()

    @torch.no_grad()
    def labels_of_all(self, batch: LabelBatch) -> LabelsOfAll | None:
        """The mean label of all ranks, of which this one has a part of the batch; None for one process."""
        return None if self.ranks is None else self._labels_of_all(self._known_labels(batch))

    @torch.no_grad()
    def _labels_of_all(self, known: Tensor) -> LabelsOfAll | None:
        if self.ranks is None:
            return None
        factor = factor_of_part(self.ranks, len(known))
        own = known.sum(dim=0) * (factor / max(len(known), 1))
        (summed,) = self.ranks.sum([own], [own])
        return LabelsOfAll(summed / self.ranks.size, factor)

    def _known_labels(self, batch: LabelBatch) -> Tensor:
        """Labels of the samples (points) that have the main loss, (n, classes)."""
        soft_labels = full_precision(self.generator(batch.inputs, batch.labels)).movedim(1, -1)
        return soft_labels[batch.mask[:, self.main].bool()]

    def mean_weights(self, batch: Batch) -> tuple[float, ...]:
        """See `TrainingLoss`. They are those of the last call, since a batch lacks the generated loss."""
        assert self._last is not None
        return self.combination.mean_weights(self._last)


def mean_losses(losses: Tensor, mask: Tensor | None) -> Tensor:
    """Means (num_losses,) in float32 at least: sum over the samples (pixels) that have a loss / number of all."""
    if mask is not None:
        losses = torch.where(mask.bool(), losses, 0.0)
    return full_precision(losses).mean(dim=[0, *range(2, losses.dim())])


def main_loss(batch: Batch | LabelBatch, main: int, ranks: Ranks | None = None) -> Tensor:
    """Mean of the main loss over the samples (pixels) that have it: a scalar. With ranks, this rank's term, such that
    the mean over ranks is that mean over the samples of all."""
    losses = known_main_losses(batch, main)
    if ranks is None:
        return losses.mean()
    return losses.sum() * (factor_of_main(ranks, losses) or math.nan)


def known_main_losses(batch: Batch | LabelBatch, main: int) -> Tensor:
    """The main loss of the samples (pixels) that have it."""
    losses = full_precision(batch.losses[:, main])
    return losses if batch.mask is None else losses[batch.mask[:, main].bool()]


def factor_of_main(ranks: Ranks | None, losses: Tensor) -> float:
    """What the sum of this rank's known main losses is multiplied by in `main_loss`; 0 where no rank has any."""
    (count,) = total(ranks, [losses.numel()])
    return (1 if ranks is None else ranks.size) / count if count else 0.0


def _negative_entropy_of_all(soft_labels: Tensor, of_all: LabelsOfAll) -> Tensor:
    """This rank's term of the negative entropy of all ranks' labels, of which it has (n, classes): a scalar. The mean
    over ranks has its value and its gradient, which is that of (log y + 1) . m in m, the mean label of all, at m = y.
    """
    own = soft_labels.sum(dim=0) * (of_all.factor / max(len(soft_labels), 1))
    slope = of_all.mean.clamp(min=torch.finfo(own.dtype).tiny).log() + 1
    return negative_entropy(of_all.mean[None]) + torch.dot(slope, own - own.detach())


def with_decay(training_loss: Tensor, parameters: Sequence[Tensor], weight_decay: float) -> Tensor:
    """The inner loss: the training loss, a scalar, and half of `weight_decay` times the parameters' squared norm."""
    if not weight_decay:
        return training_loss
    squares = torch.stack([parameter.square().sum() for parameter in parameters])
    return training_loss + 0.5 * weight_decay * squares.sum()


def make_training_loss(method: Method, config: RunConfig, task: Task) -> TrainingLoss:
    """The training loss of `method` at its start. Combiners draw their weights from torch's random state."""
    num_losses = len(task.loss_names)
    if method.family == OWN:
        return CombinedLoss(own_training_loss(task), learned=method.learned)
    if method.labels:
        return _generated_labels_loss(method, config, task)
    if method.holds_out:
        combiner = make_combiner(method, config.combiner, num_losses, task.main)
        return CombinedLoss(combiner, learned=method.learned, weight_decay=config.combiner.weight_decay)
    shared = task.shared_parameters() if hasattr(task, "shared_parameters") else task.model.parameters()
    parameters = [parameter for parameter in shared if parameter.requires_grad]
    return WeightedLoss(make_method_weighting(method, config, num_losses, task.main), parameters)


def _generated_labels_loss(method: Method, config: RunConfig, task: Task) -> GeneratedLabelsLoss:
    num_losses, generator = len(task.loss_names), label_generator(task)
    combination: TrainingLoss
    if method.family == LABELS and config.labels.combiner is not None:
        family = Method(config.labels.combiner)
        combiner = make_combiner(family, config.combiner, num_losses, task.main)
        combination = CombinedLoss(combiner, learned=method.learned, weight_decay=config.combiner.weight_decay)
    else:
        weighting = make_weighting("equal", num_losses, main=task.main, auxiliary_weight=config.labels.weight)
        combination = WeightedLoss(weighting, [])
    return GeneratedLabelsLoss(
        generator,
        combination,
        config.labels,
        task.main,
        learned=method.learned,
        with_lookahead=method.family == "maxl",
    )


def make_method_weighting(method: Method, config: RunConfig, num_losses: int, main: int = 0) -> nn.Module:
    """The weighting of a method, with its options in `config`.

    Raises:
        ValueError: it has no such options.
    """
    options = config.weighting.get(method.family, {})
    try:
        return make_weighting(method.family, num_losses, main=main, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"weighting.{method.family}: got {dict(options)}: {error}") from error


def check_method(method: Method, config: RunConfig, num_losses: int) -> None:
    """Raises ValueError, which names the entry, unless the method can combine so many losses. No random state moves."""
    if method.family == OWN or (method.labels and config.labels.combiner is None):
        return
    if method.labels:
        assert config.labels.combiner is not None
        method = Method(config.labels.combiner)
    if not method.holds_out:
        make_method_weighting(method, config, num_losses)
        return
    with torch.random.fork_rng(devices=[]):
        try:
            make_combiner(method, config.combiner, num_losses, main=0)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"combiner ({method.name}): {error}") from error


@torch.no_grad()
def make_combiner(method: Method, config: CombinerConfig, num_losses: int, main: int) -> Combiner:
    """The method's combiner at its start, drawn from torch's random state.

    With `config.skip` all start as the main loss + a function of all losses (paper, section 3.2). The linear and the
    polynomial one give every auxiliary `config.initial_weight` (and the main loss no second weight; without the skip:
    1); in the networks that is the auxiliaries' mean weight at losses of 1 (in an image of 64 x 64 pixels). Where
    weights are learned as logarithms, the main loss has that weight too, so that it can grow if the auxiliaries'
    shrinks, and weights of 0 are small ones instead (see `Combiner.positive_`).
    """
    skip = main if config.skip else None
    make = _simple_combiner if method.family in ("linear", "polynomial") else _network_combiner
    combiner = make(method, config, num_losses, main, skip)
    if method.monotone:
        combiner.positive_(config.positive)
    return combiner


def _simple_combiner(method: Method, config: CombinerConfig, num_losses: int, main: int, skip: int | None) -> Combiner:
    options: dict[str, Any] = {"init_value": config.initial_weight, "monotone": method.monotone}
    combiner: Combiner
    if method.family == "linear":
        combiner = LinearCombiner(num_losses, skip, **options)
    else:
        combiner = PolynomialCombiner(num_losses, config.degree, skip, **options)
    second_weight = 0.0 if config.positive == "clip" else config.initial_weight
    combiner.phi[main] = second_weight if config.skip else 1.0
    return combiner


def _network_combiner(method: Method, config: CombinerConfig, num_losses: int, main: int, skip: int | None) -> Combiner:
    widths = config.channels if method.family == "conv" else config.hidden
    kinds: dict[str, Any] = {"deep-linear": DeepLinearCombiner, "nonlinear": NonlinearCombiner, "conv": ConvCombiner}
    network: NonlinearCombiner | ConvCombiner = kinds[method.family](
        num_losses, widths, skip, monotone=method.monotone, weight_norm=config.weight_norm
    )
    ones = torch.ones(1, num_losses, *(_IMAGE if method.family == "conv" else ()))
    auxiliaries = network.loss_weights(ones).reshape(num_losses, -1)[torch.arange(num_losses) != main]
    out = network.layers()["out.weight_g" if config.weight_norm else "out.weight"]
    out.mul_(config.initial_weight * (num_losses - 1) / auxiliaries.sum())
    return network


def _samples(losses: Tensor) -> Tensor:
    """Reshapes (batch, num_losses, H, W) to (batch * H * W, num_losses)."""
    return losses.movedim(1, -1).flatten(0, -2)
