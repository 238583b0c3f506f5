"""Whether products contradict the symmetry of H: a figure that costs nothing, and products that confirm a large one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from auxfast.solvers.linear_system import LinearSystem

_CERTAIN = 10  # a contradiction of symmetry relative to one of linearity, which rounding alone makes


def may_be_symmetric(
    system: LinearSystem,
    error: float,
    vectors: Tensor | None,
    products: Tensor,
    core: Tensor,
    index: Tensor | None = None,
) -> bool:
    """Whether H may be symmetric, though `error` is `||core - core^T|| / ||products||`. If that is larger than rounding
    makes it, unless all products are little more than that, two more products tell.

    Args:
        vectors: (m, n), orthonormal rows; None: the n unit vectors.
        products: (m, n), each of them times H.
        core: (m, m) float64, `vectors products^T`.
        index: (1,), the right-hand side that all of this belongs to; None: any.
    """
    if not _is_suspicious(system, error):
        return True
    indices = torch.arange(len(products), device=products.device)
    signs = 1 - 2 * torch.stack([indices % 2, indices % 3 % 2 ^ indices % 2])  # (2, m)
    weights = signs.double() / math.sqrt(len(products))  # (2, m)
    combined = weights if vectors is None else weights @ vectors.double()  # (2, n)
    combined = combined.to(system.rhs.dtype)
    found = torch.cat([system.product(row, index) for row in combined.split(len(combined) if index is None else 1)])
    rounding = found.double() - weights @ products.double()
    asymmetric = torch.linalg.vector_norm(weights @ (core - core.T)) > _CERTAIN * torch.linalg.vector_norm(rounding)
    return not bool(asymmetric)


def check_pair(system: LinearSystem, error: float) -> bool:
    """Whether H may be symmetric, though `|<v, H w> - <w, H v>|` is `error` of the products with two vectors v and w.
    Costs four products if that is suspicious, with vectors of the Krylov space of a right-hand side."""
    if not _is_suspicious(system, error):
        return True
    index = torch.tensor([int(system.rhs_norms.argmax())], device=system.rhs.device)
    start = system.rhs[index[0]]
    first = start / torch.linalg.vector_norm(start)
    (image,) = system.product(first[None], index)
    second = image
    for _ in range(2):  # once leaves what rounding put back
        second = second - torch.dot(second, first) * first
    second = second / torch.linalg.vector_norm(second)
    (other,) = system.product(second[None], index)
    vectors, products = torch.stack([first, second]), torch.stack([image, other])
    core = vectors.double() @ products.double().T
    error = float(torch.linalg.vector_norm(core - core.T) / torch.linalg.vector_norm(products, dtype=core.dtype))
    return may_be_symmetric(system, error, vectors, products, core, index)


def _is_suspicious(system: LinearSystem, error: float) -> bool:
    return error > math.sqrt(torch.finfo(system.dtype).eps)
