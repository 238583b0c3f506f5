"""A few Lanczos steps: the extreme eigenvalues of an operator, and the solution that their Krylov space holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auxfast.solvers.base import Block, SolverState
from auxfast.solvers.certificate import Certified, Rows
from auxfast.solvers.preconditioners import Apply

_STEPS = 8  # of Lanczos: the largest eigenvalue to a few per cent
_MARGIN = 1.1  # for what is missing of it


class Estimate:
    """Where the eigenvalues of `A` are believed to be: `H + damping I`, or `M (H + damping I)` with a preconditioner.

    From `state` at first, which keeps them, without the damping, for systems that change slowly; else, and once more
    where the residual grows, from a few Lanczos steps.

    Args:
        best: where the solutions that Lanczos finds on the way are offered: 9 products a row.
    """

    smallest = math.nan  # at least the smallest eigenvalue, more or less
    largest = math.nan  # at most the largest eigenvalue

    def __init__(self, best: Certified, state: SolverState | None, precondition: Apply | None = None) -> None:
        self.indefinite = False  # whether negative eigenvalues were found, in this solve
        self._best, self._state, self._precondition = best, state, precondition
        self._damping = best.block.damping if precondition is None else 0.0
        self._explored = 0
        self._known = False
        if state is None or state.smallest_eigenvalue is None or state.largest_eigenvalue is None:
            return
        self.smallest = state.smallest_eigenvalue + self._damping
        self.largest = state.largest_eigenvalue + self._damping
        self._known = True

    @property
    def upper(self) -> float:
        """What no eigenvalue should be above; not above 0 if there are no positive ones."""
        return _MARGIN * self.largest

    @property
    def largest_of_h(self) -> float | None:
        """That of H itself, if it was estimated."""
        unknown = math.isnan(self.largest) or self._precondition is not None
        return None if unknown else self.largest - self._damping

    def explore(self, rows: Rows) -> Rows:
        """Estimates the eigenvalues if they are unknown. Returns which of `rows` are still to be solved: none if the
        products are not finite."""
        if self._known:
            return rows
        self._explored += 1
        x, residual = self._best.at(rows)
        space = lanczos(self._best.block, residual, _STEPS, self._precondition)
        self._best.offer(rows, x + space.correction)
        if math.isnan(space.smallest):
            return rows[:0]
        self.smallest, self.largest, self._known = space.smallest, space.largest, True
        rounding = 10 * torch.finfo(residual.dtype).eps * max(-space.smallest, space.largest)
        self.indefinite |= space.smallest < -rounding
        return np.intersect1d(rows, self._best.unsolved())

    def renew(self) -> bool:
        """To be called where a residual grew: whether there is a point in another `explore`. Not if there is negative
        curvature, which no estimate helps against, nor a third time."""
        self._known = self.indefinite or self._explored == 2
        return not self._known

    def leave(self, good: bool) -> None:
        """Leaves the eigenvalues in the state, or nothing, which makes the next solve estimate them anew."""
        if self._state is not None:
            keep = good and self._known
            self._state.smallest_eigenvalue = self.smallest - self._damping if keep else None
            self._state.largest_eigenvalue = self.largest - self._damping if keep else None


@dataclass(frozen=True)
class KrylovSpace:
    """What Lanczos found from the residuals of k right-hand sides."""

    smallest: float
    """The smallest Ritz value over all rows, at least the smallest eigenvalue; nan if nothing finite was seen."""
    largest: float
    """The largest Ritz value, at most the largest eigenvalue."""
    correction: Tensor
    """(k, n): what to add to each solution, the best in its Krylov space; zeros where that would not help."""
    residual: Tensor
    """(k, n): the residuals after that."""


def lanczos(block: Block, residual: Tensor, steps: int, precondition: Apply | None = None) -> KrylovSpace:
    """`steps` Lanczos steps on every row of `residual` at once, fully reorthogonalised (Paige 1972; the solution is
    that of MINRES, Paige & Saunders 1975).

    Costs `steps` products a row, and holds `steps + 1` vectors a row, twice as many with a preconditioner. Nothing
    waits for the device before the end; on a CPU it stops where every row has found an invariant subspace, in which
    the solution is exact.

    Args:
        block: the operator.
        residual: (k, n); rows of zeros are left alone.
        steps: at least 1.
        precondition: with it the norm of the residual that the solution makes smallest is the one that it induces.
    """
    rows, size = residual.shape
    basis = residual.new_zeros(rows, steps + 1, size)  # orthonormal (in the preconditioner's inner product)
    images = basis if precondition is None else torch.zeros_like(basis)
    coefficients = torch.zeros(2, steps + 1, rows, dtype=torch.float64, device=residual.device)
    diagonal, beside = coefficients

    def append(j: int, vector: Tensor, negligible: Tensor) -> None:
        image = vector if precondition is None else precondition(vector)
        norm = torch.linalg.vecdot(vector.double(), image.double()).clamp(min=0).sqrt()
        kept = (norm > negligible) & norm.isfinite()
        beside[j] = torch.where(kept, norm, 0)
        for store, row in ((basis, vector), (images, image))[: 1 if images is basis else 2]:
            store[:, j] = torch.where(kept[:, None], row / norm[:, None], 0)

    append(0, residual, negligible=diagonal[0])  # nothing is: zeros
    rounding = 10 * torch.finfo(residual.dtype).eps
    for j in range(steps):
        vector = block.product(images[:, j].contiguous())
        negligible = rounding * torch.linalg.vector_norm(vector, dim=1, dtype=torch.float64)
        for _ in range(2):  # one Gram-Schmidt pass leaves what rounding put back
            overlap = images[:, : j + 1] @ vector[..., None]  # (k, j + 1, 1)
            vector = vector - (basis[:, : j + 1].mT @ overlap)[..., 0]
            diagonal[j] += overlap[:, j, 0]
        append(j + 1, vector, negligible)
        if residual.device.type == "cpu" and not beside[j + 1].any():
            break
    return _solve(residual, basis, images, *coefficients.tolist())


def _solve(
    residual: Tensor, basis: Tensor, images: Tensor, diagonal: list[list[float]], beside: list[list[float]]
) -> KrylovSpace:
    """The small problems: eigenvalues of each row's tridiagonal matrix, and its least-squares solution."""
    rows, vectors, _ = basis.shape
    small = torch.zeros(2, rows, vectors, dtype=torch.float64)
    ritz = []
    for row in range(rows):
        a, b = torch.tensor([[line[row] for line in lines] for lines in (diagonal, beside)], dtype=torch.float64)
        usable = (b[:-1] > 0) & a[:-1].isfinite()
        steps = int(usable.long().cumprod(0).sum())
        small[1, row, 0] = b[0]
        if steps == 0:
            continue
        matrix = torch.diag(a[:steps]) + torch.diag(b[1:steps], 1) + torch.diag(b[1:steps], -1)
        ritz.append(torch.linalg.eigvalsh(matrix))
        extended = torch.cat([matrix, torch.zeros(1, steps, dtype=torch.float64)])  # (steps + 1, steps)
        extended[steps, steps - 1] = b[steps]
        start = small[1, row, : steps + 1].clone()
        rcond = steps * torch.finfo(basis.dtype).eps
        small[0, row, :steps] = torch.linalg.lstsq(extended, start[:, None], rcond=rcond, driver="gelsd").solution[:, 0]
        small[1, row, : steps + 1] = start - extended @ small[0, row, :steps]
    weights = small.to(basis.device, basis.dtype)[..., None, :]  # (2, k, 1, steps + 1)
    correction, remaining = (weights[0] @ images)[:, 0], (weights[1] @ basis)[:, 0]
    before, after = (torch.linalg.vector_norm(r, dim=1, dtype=torch.float64) for r in (residual, remaining))
    helps = ((after < before) & correction.isfinite().all(dim=1))[:, None]
    values = torch.cat(ritz) if ritz else torch.tensor([torch.nan])
    return KrylovSpace(
        float(values.min()),
        float(values.max()),
        torch.where(helps, correction, 0),
        torch.where(helps, remaining, residual),
    )
