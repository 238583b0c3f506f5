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
        core: (m, m) float64, `vectors products^T`, of whole vectors.
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
    asymmetry = torch.linalg.vector_norm(weights @ (core - core.T))
    of_rounding = system.space.sum(rounding.square().sum()).sqrt()
    return bool(system.space.read(asymmetry - _CERTAIN * of_rounding) <= 0)


def check_pair(system: LinearSystem, error: float) -> bool:
    """Whether H may be symmetric, though `|<v, H w> - <w, H v>|` is `error` of the products with two vectors v and w.
    Costs four products if that is suspicious, with vectors of the Krylov space of a right-hand side."""
    if not _is_suspicious(system, error):
        return True
    index = torch.tensor([int(system.rhs_norms.argmax())], device=system.rhs.device)
    dots = system.space.dots

    def unit(rows: Tensor) -> Tensor:
        return rows / dots(rows, rows).sqrt()[:, None].to(rows.dtype)

    first = unit(system.rhs.index_select(0, index))  # (1, n), as all vectors here
    image = system.product(first, index)
    second = image
    for _ in range(2):  # once leaves what rounding put back
        second = second - dots(second, first)[:, None].to(first.dtype) * first
    second = unit(second)
    vectors, products = torch.cat([first, second]), torch.cat([image, system.product(second, index)])
    core = system.space.sum(vectors.double() @ products.double().T)
    size = dots(products, products).sum().sqrt()
    error = float(system.space.read(torch.linalg.vector_norm(core - core.T) / size))
    return may_be_symmetric(system, error, vectors, products, core, index)


def _is_suspicious(system: LinearSystem, error: float) -> bool:
    return error > math.sqrt(torch.finfo(system.dtype).eps)
