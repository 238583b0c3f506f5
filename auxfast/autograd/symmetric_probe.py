"""The check of products with a symmetric matrix, by one product of the engine for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor

_ROUNDING = 100
"""Machine epsilons, of the largest that two terms can make, by which an inner product may be off."""

_ROUNDING_OF_ONE = 3
"""The same, of the terms one by one: vectors that the Hessians of networks map to rounding alone came to 0.4."""

_SMALLEST = 10
"""The smallest size of entries that counts, in roots of the machine epsilon and of the largest size. Inner products of
networks with biases before batch normalisations are then off by up to 0.15 of what is allowed; with 1, by ten times as
much."""

_EPSILON_OF_TF32 = 2.0**-10


class SymmetricProbe:
    """A vector c and its product `p = H c`, against which other products are compared: `<c, H v> = <p, v>` for each
    vector v. The signs of c are random, so that an error of a product shows in `<c, H v>` almost surely, at about its
    size.

    Args:
        vector: c, one tensor for each input. All entries of a tensor have one size.
        image: p.
        epsilon: the relative rounding of products, see `rounding_of_products`.
    """

    def __init__(self, vector: Sequence[Tensor], image: Sequence[Tensor], epsilon: float) -> None:
        sizes = [p.numel() for p in image]
        self._pair = torch.cat([*map(_flat, vector), *map(_flat, image)])  # (2n,), for few operations in a product
        self._pair[sum(sizes) :].neg_()
        of_both = self._pair.split(sizes * 2)
        self._vector, self._minus_image = of_both[: len(sizes)], of_both[len(sizes) :]
        self._epsilon = epsilon

    @cached_property
    def _tolerances(self) -> Tensor:
        """What of each norm of a product, and then of a vector, an inner product may be off by."""
        weights = [self._epsilon**0.5 * c[:1].abs().sum() for c in self._vector]
        lengths = [_ROUNDING * self._epsilon * torch.linalg.vector_norm(p) for p in self._minus_image]
        return torch.stack([*weights, *lengths])

    def confirms(self, vectors: Sequence[Tensor], products: Sequence[Tensor]) -> bool:
        """Whether `products` are those with `vectors`, up to rounding; (k, ...) each. False for what is not finite."""
        v, hv = ([t.reshape(len(t), t.shape[1:].numel()) for t in tensors] for tensors in (vectors, products))
        difference = hv[0].new_zeros(len(hv[0]))
        for rows, c in zip((*hv, *v), (*self._vector, *self._minus_image), strict=True):
            difference = torch.addmv(difference, rows, c)
        norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in (*hv, *v)])
        allowed = self._tolerances @ norms
        return bool(((difference.abs() <= allowed) & allowed.isfinite()).all())

    def confirms_one(self, vector: Sequence[Tensor], product: Sequence[Tensor]) -> bool:
        """The same for one vector, by five operations and three numbers that the host reads together.

        Rounding moves `H v` by some epsilons of `|H| |v|`, with the moduli of all entries, and `<c, H v>` by those of
        the length of `c o |H| |v|`, entry by entry. That is at most `sqrt(n) |p o v|`, with `p_j^2` for the sum over i
        of `(c_i H_ij)^2`, its mean over the signs.
        """
        terms = torch.cat([*map(_flat, product), *map(_flat, vector)]).mul_(self._pair)
        size = len(terms) // 2
        norms = torch.linalg.vector_norm(terms.view(2, size), dim=1)
        difference, of_product, of_vector = torch.cat([terms.sum()[None], norms]).tolist()
        allowed = self._epsilon**0.5 * of_product + _ROUNDING_OF_ONE * self._epsilon * size**0.5 * of_vector
        return bool(abs(difference) <= allowed < inf)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def random_signs(like: Sequence[Tensor], shapes: Sequence[torch.Size], epsilon: float) -> list[Tensor]:
    """Random signs, a tensor of each of the `shapes`, divided by the norm of one whose entries have the size of those
    in the tensor of `like` in its place: so all tensors count alike in an inner product. Sizes below a small part of
    the largest count as that: such entries may be nothing but rounding, as those of a bias before a batch normalisation
    are."""
    norms = torch.stack(torch._foreach_norm(list(like))).tolist()
    sizes = [norm / max(tensor.numel(), 1) ** 0.5 for norm, tensor in zip(norms, like, strict=True)]
    smallest = _SMALLEST * epsilon**0.5 * max(sizes) or 1.0
    numbers = [shape.numel() for shape in shapes]
    generator = torch.Generator(like[0].device).manual_seed(0)
    drawn = torch.randint(2, (sum(numbers),), generator=generator, dtype=like[0].dtype, device=like[0].device)
    signs = [*drawn.mul_(2).sub_(1).split(numbers)]
    torch._foreach_div_(signs, [max(size, smallest) * n**0.5 or 1.0 for size, n in zip(sizes, numbers, strict=True)])
    return [sign.view(shape).to(each.dtype) for sign, shape, each in zip(signs, shapes, like, strict=True)]


def rounding_of_products(device: torch.device, dtype: torch.dtype, with_convolutions: bool) -> float:
    """The machine epsilon of `dtype`; on a CUDA device that of TF32, where torch is allowed to take it for float32: by
    default it is for convolutions, and not for matrix products."""
    cudnn: Any = torch.backends.cudnn  # its types lack `conv`
    backends = [torch.backends.cuda.matmul, *([cudnn.conv] if with_convolutions else [])]
    if device.type == "cuda" and dtype == torch.float32 and any(each.fp32_precision == "tf32" for each in backends):
        return _EPSILON_OF_TF32
    return torch.finfo(dtype).eps
