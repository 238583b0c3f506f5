"""Linear systems over lists of tensors whose matrix is known, for the tests of every solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = [(4, 3), (), (1,), (0,), (5,)]
SIZE = sum(torch.Size(shape).numel() for shape in SHAPES)


@dataclass
class System:
    """`matrix x = b`, with `b` and `x` cut into tensors of SHAPES; `products` counts the matvecs."""

    matrix: Tensor  # (n, n)
    rhs: list[Tensor]
    products: int = 0

    def matvec(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        self.products += 1
        return cut(self.matrix @ flat(vectors))

    def solution(self) -> Tensor:
        """(n,)"""
        return torch.linalg.solve(self.matrix, flat(self.rhs))

    def residual(self, x: Sequence[Tensor]) -> float:
        b = flat(self.rhs)
        return float((b - self.matrix @ flat(x)).norm() / b.norm())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def cut(vector: Tensor) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [part.reshape(shape) for part, shape in zip(vector.split(sizes), SHAPES, strict=True)]


def symmetric(dtype: torch.dtype = torch.float64, device: str = "cpu") -> System:
    """A symmetric system with eigenvalues from 0.1 to 1 in a random basis."""
    generator = torch.Generator().manual_seed(3)
    values = torch.linspace(0.1, 1, SIZE, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(values) @ basis.T
    b = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return System(matrix.to(device, dtype), cut(b.to(device, dtype)))


@dataclass
class Operator:
    """`v -> matrix v` for one tensor of shape (n,), with a `batched` of its own; `products` counts the vectors."""

    matrix: Tensor  # (n, n)
    products: int = 0

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        self.products += 1
        return [self.matrix @ vectors[0]]

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        self.products += len(vectors[0])
        return [vectors[0] @ self.matrix.T]


def with_eigenvalues(values: Tensor, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    """(n,) float64 -> (n, n), symmetric, with these eigenvalues in a random basis."""
    gaussian = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(gaussian)[0]
    matrix = basis @ torch.diag(values) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def gaussian(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
