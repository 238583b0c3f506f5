"""The label generator: a network that invents auxiliary labels, which a student learns beside the main task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LabelGenerator(nn.Module):
    """A network g(x; phi) whose outputs become soft auxiliary labels, by a softmax over the auxiliary classes that
    belong to the sample's main class (paper, sections 3.3 and 5.4, after Liu et al. 2019, "Self-Supervised
    Generalisation with Meta Auxiliary Learning").

        generator = LabelGenerator(network, hierarchy=[5] * 10)  # network: (batch, ...) -> (batch, 50)
        soft_labels = generator(images, labels)  # (batch, 50), each row a distribution over five classes

    Its parameters are outer ones: they act on the outer loss only through the student that has learned the labels.

    Args:
        backbone: maps inputs to (batch, sum(hierarchy)) logits, or to (batch, sum(hierarchy), ...) of points or pixels.
        hierarchy: number of auxiliary classes of each main class. They may differ. Auxiliary classes are numbered
            through: those of main class 0 come first. A single number, `(5,)`, gives one auxiliary task to all.
        temperature: what the logits are divided by, above 0: below 1 labels are harder, above softer.

    Raises:
        TypeError, ValueError: an argument is not what it must be.
    """

    is_member: Tensor  # (main classes, auxiliary classes) bool

    def __init__(self, backbone: nn.Module, hierarchy: Sequence[int], temperature: float = 1.0) -> None:
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a torch.nn.Module, not a {type(backbone).__name__}")
        if isinstance(hierarchy, int) or any(isinstance(size, bool) or not isinstance(size, int) for size in hierarchy):
            raise TypeError(f"hierarchy must be a list of ints, one for each main class, got {hierarchy!r}")
        if not hierarchy or min(hierarchy) < 1:
            raise ValueError(f"hierarchy must have at least one class for each main class, got {list(hierarchy)}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
        super().__init__()
        self.backbone = backbone
        self.hierarchy = tuple(hierarchy)
        self.temperature = temperature
        owner = torch.repeat_interleave(torch.arange(len(hierarchy)), torch.tensor(self.hierarchy))
        self.register_buffer("is_member", owner == torch.arange(len(hierarchy))[:, None], persistent=False)

    @property
    def num_auxiliary(self) -> int:
        """Number of all auxiliary classes, of which the student predicts each."""
        return sum(self.hierarchy)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Soft labels (batch, num_auxiliary, ...), of the backbone's shape: along dimension 1 they are 0 outside the
        sample's main class, and add up to 1.

        Args:
            inputs: what the backbone takes.
            labels: main classes (batch,), int64; or (batch, ...), one for each point or pixel.

        Raises:
            TypeError, ValueError: labels are no integers, are out of range, or do not fit the backbone's output.
        """
        logits: Tensor = self.backbone(inputs)
        if logits.dim() < 2 or logits.shape[1] != self.num_auxiliary:
            raise ValueError(
                f"backbone must return (batch, {self.num_auxiliary}, ...), one logit for each class of hierarchy, got "
                f"{tuple(logits.shape)}"
            )
        self._check_labels(labels, (len(logits), *logits.shape[2:]))
        member = self.is_member[labels].movedim(-1, 1)
        member = member[(...,) + (None,) * (logits.dim() - member.dim())]
        return (logits / self.temperature).masked_fill(~member, -math.inf).softmax(dim=1)

    def _check_labels(self, labels: Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be a tensor of int64, got {given}")
        if tuple(labels.shape) not in {shape, shape[:1]}:
            raise ValueError(f"labels must have the shape {shape[:1]} or {shape}, got {tuple(labels.shape)}")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.hierarchy):
            raise ValueError(
                f"labels must be main classes from 0 to {len(self.hierarchy) - 1}, got some from {int(labels.min())} "
                f"to {int(labels.max())}; leave samples without a main label out, or mask their loss"
            )

    def extra_repr(self) -> str:
        return f"hierarchy={self.hierarchy}, temperature={self.temperature}"
