"""The label generator: a network that invents auxiliary labels, which a student learns beside the main task."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from auxfast.autograd.transforms import in_transform


class LabelGenerator(nn.Module):
    """A network g(x; phi) whose outputs become soft auxiliary labels, by a softmax over the auxiliary classes that
    belong to the sample's main class (paper, sections 3.3 and 5.4, after Liu et al. 2019, "Self-Supervised
    Generalisation with Meta Auxiliary Learning").

        generator = LabelGenerator(network, hierarchy=[5] * 10)  # network: (batch, ...) -> (batch, 50)
        soft_labels = generator(images, labels)  # (batch, 50), each row a distribution over five classes

    Its parameters are outer ones: they act on the outer loss only through the student that has learned the labels.

    Args:
        backbone: maps inputs to (batch, sum(hierarchy)) logits, or to (batch, sum(hierarchy), ...) of points or pixels.
        hierarchy: number of auxiliary classes of each main class, ints or an array of them. They may differ. Auxiliary
            classes are numbered through: those of main class 0 come first. A single number, `(5,)`, gives one auxiliary
            task to all, whose samples then have the label 0.
        temperature: what the logits are divided by, above 0: below 1 labels are harder, above softer.

    Raises:
        TypeError, ValueError: an argument is not what it must be.
    """

    def __init__(self, backbone: nn.Module, hierarchy: Iterable[int], temperature: float = 1.0) -> None:
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a torch.nn.Module, not a {type(backbone).__name__}")
        sizes = _checked_sizes(hierarchy)
        given: Any = temperature
        if isinstance(given, bool) or not isinstance(given, Real):
            raise TypeError(f"temperature must be a number, not a {type(given).__name__}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
        super().__init__()
        self.backbone = backbone
        self.hierarchy = sizes
        self.temperature = float(temperature)
        # This is no buffer: to_empty(), after a start on the device "meta", would leave any numbers in it.
        self._owners = _owners(sizes, torch.device("cpu"))

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
            TypeError, ValueError: labels are no integers, are out of range, or do not fit the backbone's output. Their
                range is read on the CPU alone, and not in torch.compile and transforms of torch.func: elsewhere labels
                out of range give NaN.
            RuntimeError: labels are on another device than the backbone's output.
        """
        logits: Tensor = self.backbone(inputs)
        if not isinstance(logits, Tensor):
            raise TypeError(f"backbone must return a tensor of logits, got a {type(logits).__name__}")
        if logits.dim() < 2 or logits.shape[1] != self.num_auxiliary:
            raise ValueError(
                f"backbone must return (batch, {self.num_auxiliary}, ...), one logit for each class of hierarchy, got "
                f"{tuple(logits.shape)}"
            )
        self._check_labels(labels, logits)
        owners = self._owners_on(logits.device)
        is_member = labels[:, None] == owners.view(1, -1, *[1] * (labels.dim() - 1))
        is_member = is_member.view(*is_member.shape, *[1] * (logits.dim() - is_member.dim()))
        return (logits / self.temperature).masked_fill(~is_member, -math.inf).softmax(dim=1)

    def _owners_on(self, device: torch.device) -> Tensor:
        """The main class of each auxiliary class, (num_auxiliary,) int64."""
        owners = self._owners  # another thread may replace it by that of its own device
        if owners.device != device:
            owners = self._owners = _owners(self.hierarchy, device)
        return owners

    def _check_labels(self, labels: Tensor, logits: Tensor) -> None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be a tensor of int64, got {given}")
        of_samples, of_points = logits.shape[:1], logits.shape[:1] + logits.shape[2:]
        if labels.shape not in (of_samples, of_points):
            allowed = " or ".join(str(tuple(shape)) for shape in dict.fromkeys((of_samples, of_points)))
            raise ValueError(f"labels must have the shape {allowed}, got {tuple(labels.shape)}")
        if labels.device != logits.device:
            raise RuntimeError(
                f"labels are on {labels.device} and the backbone's output is on {logits.device}: move one to the other"
            )
        readable = type(labels) is Tensor and labels.is_cpu and not (torch.compiler.is_compiling() or in_transform())
        if readable and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.hierarchy):
            raise ValueError(
                f"labels must be main classes from 0 to {len(self.hierarchy) - 1}, got some from {int(labels.min())} "
                f"to {int(labels.max())}; leave samples without a main label out, or give them any class and mask "
                "their loss"
            )

    def extra_repr(self) -> str:
        return f"hierarchy={self.hierarchy}, temperature={self.temperature}"


def _checked_sizes(hierarchy: Iterable[int]) -> tuple[int, ...]:
    try:
        given = list(hierarchy)
        if any(isinstance(size, bool) for size in given):
            raise TypeError
        sizes = tuple(operator.index(size) for size in given)
    except TypeError:
        raise TypeError(f"hierarchy must be a list of ints, one for each main class, got {hierarchy!r}") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"hierarchy must have at least one class for each main class, got {list(sizes)}")
    return sizes


def _owners(hierarchy: tuple[int, ...], device: torch.device) -> Tensor:
    """The main class of each auxiliary class, (num_auxiliary,) int64."""
    return torch.tensor([main for main, size in enumerate(hierarchy) for _ in range(size)], device=device)
