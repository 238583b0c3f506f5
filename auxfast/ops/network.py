"""What the descriptions of the combiners' networks have in common, and the codes by which the kernels know it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
Activation = Literal["softplus", "identity"]
REDUCTIONS: dict[str, int] = {"none": 0, "sum": 1, "mean": 2}  # as csrc/common/network.h has them
ACTIVATIONS: dict[str, int] = {"identity": 0, "softplus": 1}


class Network(ABC):
    """An architecture whose parameters lie in one flat `phi`."""

    num_losses: int

    def __post_init__(self) -> None:
        """Fills in what is cached: up to Python 3.11 that takes a lock, which torch.compile of 2.11 cannot trace."""
        for kind in type(self).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, cached_property):
                    getattr(self, name)

    @cached_property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every part of phi, in its order."""

    @cached_property
    @abstractmethod
    def fits_kernels(self) -> bool:
        """Whether the kernels have room for it; larger ones run on the reference."""

    @cached_property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @cached_property
    def phi_shape(self) -> tuple[int]:
        return (self.num_parameters,)

    def split(self, phi: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor (num_parameters,) by the names of `shapes`."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        parts = phi.split(sizes)
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}
