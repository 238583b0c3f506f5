"""The check of batched products with a symmetric matrix, by one product of the engine for all batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDING = 100
"""Machine epsilons, of the largest that two terms can make, by which an inner product may be off."""


class SymmetricProbe:
    """A vector c and its product `p = H c`, against which batches are compared: `<c, H v> = <p, v>` for each vector v
    of any batch. The signs of c are random, so that an error of a product shows in `<c, H v>` almost surely, at about
    its size.

    Args:
        vector: c, one tensor for each input. All entries of a tensor have one size.
        image: p.
    """

    def __init__(self, vector: Sequence[Tensor], image: Sequence[Tensor]) -> None:
        self._vector, self._image = [c.reshape(-1) for c in vector], [p.reshape(-1) for p in image]
        epsilon = torch.finfo(image[0].dtype).eps
        weights = [epsilon**0.5 * c[:1].abs().sum() for c in self._vector]
        lengths = [_ROUNDING * epsilon * torch.linalg.vector_norm(p) for p in self._image]
        self._tolerances = torch.stack([*weights, *lengths])

    def confirms(self, vectors: Sequence[Tensor], products: Sequence[Tensor]) -> bool:
        """Whether `products` are those with `vectors`, up to rounding; (k, ...) each. False for what is not finite."""
        v, hv = ([t.reshape(len(t), t.shape[1:].numel()) for t in tensors] for tensors in (vectors, products))
        difference = hv[0].new_zeros(len(hv[0]))
        for rows, c in zip(hv, self._vector, strict=True):
            difference = torch.addmv(difference, rows, c)
        for rows, p in zip(v, self._image, strict=True):
            difference = torch.addmv(difference, rows, p, alpha=-1)
        norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in (*hv, *v)])
        allowed = self._tolerances @ norms
        return bool(((difference.abs() <= allowed) & allowed.isfinite()).all())


def random_signs(like: Sequence[Tensor]) -> list[Tensor]:
    """Random signs for each of a batch of tensors, divided by the size of the batch's entries, so that all tensors
    count alike in an inner product."""
    generator = torch.Generator().manual_seed(0)
    signs = []
    for batch in like:
        size = float(torch.linalg.vector_norm(batch)) / max(batch.numel(), 1) ** 0.5
        drawn = torch.randint(2, batch.shape[1:], generator=generator, dtype=torch.int8) * 2 - 1
        signs.append(drawn.to(batch.device, batch.dtype) / (size or 1.0))
    return signs
