"""Splits for auxiliary learning: disjoint parts for training, validation and test, stratified where asked for, and an
auxiliary set that is allocated from the training part.

The auxiliary set (paper, section 3.1) holds the main labels that the outer loss is measured on. It must be a
small share of the main labels: what it takes, training lacks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_AUXILIARY_SHARE = 0.10


def split(
    indices: Tensor, sizes: Sequence[int], generator: torch.Generator, labels: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Draws disjoint random parts of these sizes from `indices` (count,), int64; what is left over is dropped.

    With `labels` (count,), int64, aligned with `indices`, the parts are stratified: a part has every class in
    its share of the whole, to within one or two samples a class (exactly, where classes are equally large and
    it divides).

    Raises:
        ValueError: a size is negative, their sum is more than there is, or `labels` has another length.
    """
    if min(sizes) < 0 or sum(sizes) > len(indices):
        raise ValueError(f"sizes: got {list(sizes)}, must be >= 0 and add up to at most {len(indices)}")
    order = torch.randperm(len(indices), generator=generator)
    if labels is not None:
        if labels.shape != indices.shape:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, must be {tuple(indices.shape)}")
        order = _spread_classes(order, labels)
    parts = torch.split(order[: sum(sizes)], list(sizes))
    return tuple(indices[part] for part in parts)


def _spread_classes(order: Tensor, labels: Tensor) -> Tensor:
    """Spreads every class evenly over `order`: then any contiguous piece of it is stratified."""
    position = torch.empty(len(order))
    for label in torch.unique(labels):
        members = torch.nonzero(labels[order] == label).squeeze(1)
        position[members] = (torch.arange(len(members)) + 0.5) / len(members)
    return order[torch.argsort(position, stable=True)]


def draw_per_class(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws `count` random samples of every class in `labels` (n,), int64: the indices drawn, and the others.

    Raises:
        ValueError: `count` is below 1, or a class has fewer than `count` samples.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, must be 1 or more")
    drawn = []
    for label in torch.unique(labels):
        members = torch.nonzero(labels == label).squeeze(1)
        if len(members) < count:
            raise ValueError(f"count: got {count}, but class {int(label)} has only {len(members)} samples")
        drawn.append(members[torch.randperm(len(members), generator=generator)[:count]])
    chosen = torch.cat(drawn)
    others = torch.ones(len(labels), dtype=torch.bool)
    others[chosen] = False
    return chosen, torch.nonzero(others).squeeze(1)


def allocate_auxiliary(
    labelled: Tensor, count: int, generator: torch.Generator, labels: Tensor | None = None, *, hold_out: bool = True
) -> tuple[Tensor, Tensor]:
    """Allocates `count` of the `labelled` training samples (n,), int64, to the auxiliary set: (training, auxiliary).

    With `labels` (n,), aligned with them, both are stratified, as in `split`. With `hold_out`, training is without the
    auxiliary samples, and a large set is warned of; without, it has them too, at its end: for methods that need no
    auxiliary set, so that every method has the same labels to spend.

    Raises:
        ValueError: `count` is not from 1 to n - 1, or `labels` has another length.
    """
    if not 1 <= count < len(labelled):
        raise ValueError(f"count: got {count}, must be from 1 to {len(labelled) - 1}: the rest is trained on")
    auxiliary, training = split(labelled, (count, len(labelled) - count), generator, labels)
    if not hold_out:
        return torch.cat([training, auxiliary]), auxiliary
    warn_if_auxiliary_set_is_large(count, len(labelled))
    return training, auxiliary


def draw_batch(indices: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draws `size` of the `indices` (n,), without repetition; all of them, in random order, if there are fewer."""
    return indices[torch.randperm(len(indices), generator=generator)[:size]]


def warn_if_auxiliary_set_is_large(auxiliary: int, labelled: int) -> None:
    """Warns if `auxiliary` samples are more than 10% of all `labelled` ones, themselves included.

    The labels it takes are missing in training. On the demo's data, learning lost at 20 to 40% and won at
    10%; the paper used about 2%.
    """
    if auxiliary > LARGEST_AUXILIARY_SHARE * labelled:
        warnings.warn(
            f"the auxiliary set takes {auxiliary} of {labelled} main labels ({auxiliary / labelled:.0%}); "
            f"above {LARGEST_AUXILIARY_SHARE:.0%}, training usually loses more than learning wins back",
            stacklevel=2,
        )


def standardise(values: Tensor, training: Tensor) -> Tensor:
    """Shifts and scales the columns of `values` (n, ...) to mean 0 and deviation 1 over the `training` rows.

    Only those rows: statistics of auxiliary or test rows would leak what must stay unseen. A constant column
    is only shifted.
    """
    seen = values[training]
    deviation = seen.std(dim=0)
    return (values - seen.mean(dim=0)) / torch.where(deviation > 0, deviation, 1.0)
