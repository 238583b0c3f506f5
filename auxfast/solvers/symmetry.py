"""Whether products contradict the symmetry of H: a figure that costs nothing, and products that confirm a large one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from auxfast.solvers.linear_system import LinearSystem

_CERTAIN = 10  # a contradiction of symmetry relative to one of linearity, which rounding alone makes


def check_products(system: LinearSystem, vectors: Tensor | None, products: Tensor) -> tuple[float, bool]:
    """`||C - C^T|| / ||products||` with `C = vectors products^T`, and whether H may be symmetric all the same. If the
    figure is larger than rounding makes it, unless all products are little more than that, two more products tell.

    Args:
        vectors: (m, n), orthonormal rows; None: the n unit vectors.
        products: (m, n), each of them times H.
    """
    core = products.double().T if vectors is None else vectors.double() @ products.double().T  # (m, m)
    difference = core - core.T
    size = float(torch.linalg.vector_norm(products, dtype=torch.float64))
    error = float(torch.linalg.vector_norm(difference)) / size if size else 0.0
    if not _is_suspicious(system, error):
        return error, True
    indices = torch.arange(len(products), device=products.device)
    signs = 1 - 2 * torch.stack([indices % 2, indices % 3 % 2 ^ indices % 2])  # (2, m)
    weights = signs.double() / math.sqrt(len(products))  # (2, m)
    combined = weights if vectors is None else weights @ vectors.double()  # (2, n)
    rounding = system.product(combined.to(system.rhs.dtype)).double() - weights @ products.double()
    asymmetric = torch.linalg.vector_norm(weights @ difference) > _CERTAIN * torch.linalg.vector_norm(rounding)
    return error, not bool(asymmetric)


def check_pair(system: LinearSystem, error: float) -> bool:
    """Whether H may be symmetric, though `|<v, H w> - <w, H v>|` is `error` of the products with two vectors v and w.
    Costs four products if that is suspicious, with vectors of the Krylov space of a right-hand side."""
    if not _is_suspicious(system, error):
        return True
    start = system.rhs[int(system.rhs_norms.argmax())]
    first = start / torch.linalg.vector_norm(start)
    (image,) = system.product(first[None])
    second = image
    for _ in range(2):  # once leaves what rounding put back
        second = second - torch.dot(second, first) * first
    second = second / torch.linalg.vector_norm(second)
    (other,) = system.product(second[None])
    return check_products(system, torch.stack([first, second]), torch.stack([image, other]))[1]


def _is_suspicious(system: LinearSystem, error: float) -> bool:
    return error > math.sqrt(torch.finfo(system.dtype).eps)
