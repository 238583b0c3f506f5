"""A few Lanczos steps: the extreme eigenvalues of an operator, and the solution that their Krylov space holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auxfast.solvers.base import SolverState, StopReason
from auxfast.solvers.best_iterate import BestIterate, Rows
from auxfast.solvers.lanczos import Lanczos
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.preconditioners import Apply
from auxfast.solvers.space import VectorSpace

_LANCZOS_STEPS = 8  # enough for the largest eigenvalue to a few per cent
_MARGIN = 1.1  # upper bound relative to the largest Ritz value, which misses a few per cent of the largest eigenvalue
_MAX_ESTIMATES = 2  # estimates in one solve: the second, from a residual that grew, sees what the first missed


class SpectrumBounds:
    """Bounds of the eigenvalues of `A`, which is `H + damping I`, or its product `M (H + damping I)` with a
    preconditioner.

    They come from `state` at first, which keeps them, without the damping, for systems that change slowly; else, and
    once more where the residual grows, from a few Lanczos steps.

    Args:
        best: takes the solutions that Lanczos finds on the way, at 9 products a row.
        state: read here, and written by `save`.
        precondition: M.

    Attributes:
        smallest: a Ritz value, at least the smallest eigenvalue, or what the solver found to be nearer; nan if unknown.
        largest: a Ritz value, at most the largest eigenvalue; nan if unknown.
        indefinite: whether negative eigenvalues were found in this solve.
    """

    def __init__(self, best: BestIterate, state: SolverState | None, precondition: Apply | None = None) -> None:
        self.smallest = self.largest = math.nan
        self.indefinite = False
        self._best, self._state, self._precondition = best, state, precondition
        self._damping = best.system.damping if precondition is None else 0.0
        self._estimates = 0
        self._known = False
        if state is None or state.smallest_eigenvalue is None or state.largest_eigenvalue is None:
            return
        self.smallest = state.smallest_eigenvalue + self._damping
        self.largest = state.largest_eigenvalue + self._damping
        self._known = True

    @property
    def upper(self) -> float:
        """A bound that no eigenvalue should exceed; at most 0 if there are no positive ones."""
        return _MARGIN * self.largest

    @property
    def largest_of_h(self) -> float | None:
        """The largest eigenvalue of H itself, if it was estimated."""
        unknown = math.isnan(self.largest) or self._precondition is not None
        return None if unknown else self.largest - self._damping

    def estimate(self, rows: Rows) -> Rows:
        """Estimates the eigenvalues if they are unknown. Returns which of `rows` are still to be solved: none if the
        products are not finite."""
        if self._known:
            return rows
        self._estimates += 1
        x, residual = self._best.current(rows)
        index = torch.from_numpy(rows).to(residual.device)
        space = lanczos(self._best.system, residual, _LANCZOS_STEPS, self._precondition, index)
        self._best.update(rows, x + space.correction)
        if math.isnan(space.smallest):
            for row in rows:
                self._best.stop_reasons[row] = StopReason.DIVERGED
            return rows[:0]
        self._best.check_symmetry(space.symmetry_error)
        self.smallest, self.largest, self._known = space.smallest, space.largest, True
        rounding = 10 * torch.finfo(residual.dtype).eps * max(-space.smallest, space.largest)
        self.indefinite |= space.smallest < -rounding
        return np.intersect1d(rows, self._best.unsolved())

    def should_retry(self) -> bool:
        """Whether another `estimate` may help a residual that grew; if so, the bounds count as unknown from now on.
        Nothing helps against negative curvature, and there is no third estimate."""
        self._known = self.indefinite or self._estimates == _MAX_ESTIMATES
        return not self._known

    def save(self, good: bool) -> None:
        """Writes the eigenvalues to the state if they were `good`, else none: the next solve then estimates them."""
        if self._state is not None:
            keep = good and self._known
            self._state.smallest_eigenvalue = self.smallest - self._damping if keep else None
            self._state.largest_eigenvalue = self.largest - self._damping if keep else None


@dataclass(frozen=True)
class KrylovSpace:
    """What Lanczos found from the residuals of k right-hand sides.

    Attributes:
        smallest: the smallest Ritz value over all rows, at least the smallest eigenvalue; nan if nothing finite was
            seen.
        largest: the largest Ritz value, at most the largest eigenvalue.
        correction: (k, n), what to add to each solution, the best in its Krylov space; zeros where that would not help.
        residual: (k, n), the residuals after that.
        symmetry_error: `|<v, H w> - <w, H v>|` for the first two basis vectors v and w, relative to the largest modulus
            of a Ritz value; nan if there is no second.
    """

    smallest: float
    largest: float
    correction: Tensor
    residual: Tensor
    symmetry_error: float


def lanczos(
    system: LinearSystem,
    residual: Tensor,
    steps: int,
    precondition: Apply | None = None,
    index: Tensor | None = None,
) -> KrylovSpace:
    """`steps` Lanczos steps on every row of `residual`; the solution is that of MINRES (Paige & Saunders 1975).

    Costs `steps` products a row, and holds `steps + 1` vectors a row, twice as many with a preconditioner. Nothing
    waits for the device before the end; on a CPU it stops where every row has found an invariant subspace, in which
    the solution is exact.

    Args:
        system: it has the operator.
        residual: (k, n); rows of zeros are left alone.
        steps: at least 1.
        precondition: with it the solution makes the residual smallest in the norm that it induces.
        index: (k,), the right-hand sides that the rows belong to; None: all, in order.
    """
    process = Lanczos(system, residual, steps, precondition, index)
    for _ in range(steps):
        process.step()
        if residual.device.type == "cpu" and process.is_exhausted():
            break
    return _solve(
        system.space, residual, process.basis, process.images, *system.space.read(process.coefficients).tolist()
    )


def _solve(
    space: VectorSpace,
    residual: Tensor,
    basis: Tensor,
    images: Tensor,
    diagonal: list[list[float]],
    beside: list[list[float]],
    above: list[list[float]],
) -> KrylovSpace:
    """The eigenvalues of each row's tridiagonal matrix, and the solution of its least-squares problem.

    Args:
        space: that of the rows.
        residual: (k, n).
        basis, images: (k, steps + 1, n), see `lanczos`.
        diagonal, beside: [steps + 1][k], the tridiagonal matrices; `beside[0]` holds the norms of the residuals.
        above: [steps + 1][k]; entry 1 is that of `beside` if the operator is symmetric.
    """
    rows, vectors, _ = basis.shape
    small = torch.zeros(2, rows, vectors, dtype=torch.float64)
    ritz, errors = [], []
    for row in range(rows):
        a, b = torch.tensor([[line[row] for line in lines] for lines in (diagonal, beside)], dtype=torch.float64)
        usable = (b[:-1] > 0) & a[:-1].isfinite()
        steps = int(usable.long().cumprod(0).sum())
        small[1, row, 0] = b[0]
        if steps == 0:
            continue
        matrix = torch.diag(a[:steps]) + torch.diag(b[1:steps], 1) + torch.diag(b[1:steps], -1)
        ritz.append(torch.linalg.eigvalsh(matrix))
        if steps > 1:
            errors.append(abs(above[1][row] - beside[1][row]) / float(ritz[-1].abs().max()))
        extended = torch.cat([matrix, torch.zeros(1, steps, dtype=torch.float64)])  # (steps + 1, steps)
        extended[steps, steps - 1] = b[steps]
        start = small[1, row, : steps + 1].clone()
        rcond = steps * torch.finfo(basis.dtype).eps
        small[0, row, :steps] = torch.linalg.lstsq(extended, start[:, None], rcond=rcond, driver="gelsd").solution[:, 0]
        small[1, row, : steps + 1] = start - extended @ small[0, row, :steps]
    weights = small.to(basis.device, basis.dtype)[..., None, :]  # (2, k, 1, steps + 1)
    correction, remaining = (weights[0] @ images)[:, 0], (weights[1] @ basis)[:, 0]
    before, after = (space.read(space.dots(r, r)) for r in (residual, remaining))
    helps = torch.from_numpy((after < before) & space.are_finite(correction))[:, None].to(residual.device)
    values = torch.cat(ritz) if ritz else torch.tensor([torch.nan])
    return KrylovSpace(
        float(values.min()),
        float(values.max()),
        torch.where(helps, correction, 0),
        torch.where(helps, remaining, residual),
        max(errors, default=math.nan),
    )
