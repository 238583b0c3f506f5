"""The truncated Neumann series (the paper's Algorithm 2, with the factor that makes it the inverse)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from auxfast.ops.neumann import GROWTH
from auxfast.solvers.base import (
    Matvec,
    SolverState,
    SolveStats,
    StopReason,
    check_flag,
    check_positive,
    refuse_not_symmetric,
)
from auxfast.solvers.best_iterate import RESTART_GAIN, BestIterate, Floats, Rows
from auxfast.solvers.iterative import IterativeSolver
from auxfast.solvers.linear_system import LinearSystem, check_rhs
from auxfast.solvers.series import ListProducts, Products, RowProducts, Series, run, without_graph
from auxfast.solvers.space import LOCAL
from auxfast.solvers.spectrum import SpectrumBounds

_SERVED = 0.9
"""The largest relative residual, where there is no tolerance, of eigenvalues that are kept: far too large ones, as one
bad batch leaves them, show in nothing but a residual that stays where it is."""
_WORST_FIRST = (StopReason.NOT_FINITE, StopReason.DIVERGED, StopReason.STEPS, StopReason.TRIVIAL)


@dataclass(frozen=True)
class Neumann(IterativeSolver):
    """`x = a (I + M + ... + M^steps) b`, `M = I - a A`, `A = H + damping I`: `steps + 1` terms, `steps` products.

    It converges to `A^-1 b` if all eigenvalues of `A` lie between 0 and `2 / a`, at the rate of the largest
    `|1 - a eigenvalue|`. The factor `a`, which the paper's Algorithm 2 leaves out, makes it the inverse: the
    solution does not scale with `1 / a`.

    **Growth.** The vector that the iteration carries is the exact residual of the sum without its last term. Once
    its norm grows it does so for ever (its squares are moments of `M^2`, hence log-convex). The sum is then cut where
    the norm was smallest, and summed once more up to there: rounding would spoil a way back. `stop_reason` is
    `diverged`. One product more, with the sum, tells its true residual, which is at most 1; if the last term was the
    first to grow, the sum is returned without it.

    **`certify=False`** is Algorithm 2 as it stands, for `steps` products and not one more: the sum is the whole one
    however it grew, unless it overflowed, where x = 0 is returned. Its residual is not known: `residual` and
    `residuals` are NaN, `converged` is False, and `diverged` still tells that the norm grew.

    **`step_size="auto"`** takes `2 / (1.1 largest + smallest)` of the extreme eigenvalues that 8 Lanczos steps find,
    and starts from the solution that they find as well: 9 products a right-hand side, on top of `steps`. `state`
    keeps the eigenvalues for the next solve. If the residual grows, they are estimated anew from there, once; so
    they are in the next solve if this one misses its tolerance (`None`: if it leaves a residual above 0.9).

    Args:
        steps: Hessian-vector products of the series at most (the paper's J), at least 1.
        step_size: the paper's alpha; above 0, and below `2 / (largest eigenvalue of A)` to converge.
        tol: stop once the relative residual is at most this, between 0 and 1; it is read after every step on a CPU
            and after every 8th on a GPU, where each reading waits for the device. `None`: always `steps` steps, unless
            the residual grows or is 0.
        damping, warm_start: see `IterativeSolver`.
        certify: whether the residual is found, at one product.

    Raises:
        ValueError: a setting outside its range; or `certify=False` with one that needs the residual: `tol`,
            `warm_start`, or `step_size="auto"`.
    """

    steps: int = 20
    step_size: float | Literal["auto"] = "auto"
    tol: float | None = None
    damping: float = 0.0
    warm_start: bool = False
    certify: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size != "auto":
            check_positive('step_size, if it is not "auto",', self.step_size)
        check_flag("certify", self.certify)
        if not self.certify and (self.tol is not None or self.warm_start or self.step_size == "auto"):
            raise ValueError(
                f"certify=False goes with a fixed step_size, tol=None and warm_start=False, for all else needs the "
                f"residual; not with step_size={self.step_size!r}, tol={self.tol!r}, warm_start={self.warm_start!r}"
            )

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `(H + damping I) x = rhs`; see `Solver.solve`.

        Raises:
            ValueError: `rhs` is empty or not finite, or (batched) of different numbers of right-hand sides; or `matvec`
                says that it is not symmetric.
            RuntimeError: `matvec` returns other shapes, dtypes or devices than it was given.
        """
        refuse_not_symmetric(self, matvec)
        is_flat = batched or self.damping != 0 or torch.finfo(rhs[0].dtype).bits < 32 if rhs else True
        is_flat = is_flat or getattr(matvec, "space", LOCAL) is not LOCAL
        if self.certify:
            if is_flat or self.step_size == "auto" or self.tol is not None or self.warm_start:
                return super().solve(matvec, rhs, batched=batched, state=state)
            return self._certified(matvec, rhs, state)
        assert self.step_size != "auto"
        check_rhs(rhs, batched)
        if is_flat:
            system = LinearSystem(matvec, rhs, self.damping, batched)
            series = [Series([b], self.step_size, row=i, space=system.space) for i, b in enumerate(system.rhs)]
            stats = self._sum(series, RowProducts(system), system.limits())
            return system.unflatten(torch.stack([s.p[0] for s in series])), stats
        one = Series(without_graph(rhs), self.step_size)
        stats = self._sum([one], ListProducts(matvec), [torch.finfo(rhs[0].dtype).max])
        return one.p, stats

    def _certified(
        self, matvec: Matvec, rhs: Sequence[Tensor], state: SolverState | None
    ) -> tuple[list[Tensor], SolveStats]:
        """The sum on the tensors as they are, which saves copies of flat rows. Where numbers are extreme, the solve is
        done anew with all precautions."""
        assert self.step_size != "auto"
        check_rhs(rhs, False)
        series, products = Series(without_graph(rhs), self.step_size), ListProducts(matvec)
        iterations, residual = 0, None
        if series.is_in_range():
            iterations = run([series], products, self.steps)
            residual = series.certified_residual(products)
        if residual is None:
            solution, stats = super().solve(matvec, rhs, state=state)
            return solution, replace(stats, matvecs=stats.matvecs + products.matvecs)
        largest, negative = curvature_of_growth([series.curvature], self.damping)
        reason = StopReason.DIVERGED if series.grew else StopReason.STEPS if residual else StopReason.CONVERGED
        return series.p, SolveStats(
            iterations=iterations,
            matvecs=products.matvecs,
            residual=residual,
            converged=residual == 0,
            stop_reason=reason,
            step_size=self.step_size,
            largest_eigenvalue=largest,
            negative_curvature=negative,
            residuals=(residual,),
        )

    def _sum(self, series: Sequence[Series], products: Products, limits: Sequence[float]) -> SolveStats:
        """Runs Algorithm 2 as it stands. The sums are left in `p`: zeros where an entry may exceed its limit."""
        for _ in range(self.steps):
            for s, product in zip(series, products(series), strict=True):
                s.step(product)
        reasons = [s.close(products, limit) for s, limit in zip(series, limits, strict=True)]
        worst = min(reasons, key=_WORST_FIRST.index)
        residuals = tuple(0.0 if reason == StopReason.TRIVIAL else math.nan for reason in reasons)
        return SolveStats(
            iterations=self.steps,
            matvecs=products.matvecs,
            residual=residuals[reasons.index(worst)],
            converged=worst == StopReason.TRIVIAL,
            stop_reason=worst,
            step_size=None if self.step_size == "auto" else self.step_size,
            residuals=residuals,
        )

    def _iterate(self, best: BestIterate, state: SolverState | None) -> dict[str, Any]:
        """See `IterativeSolver._iterate`; there is one cycle if all goes well."""
        products = RowProducts(best.system)
        spectrum = SpectrumBounds(best, state) if self.step_size == "auto" else None
        step_size = None if self.step_size == "auto" else self.step_size
        iterations, curvatures = 0, []
        rows = best.unsolved()
        while len(rows) and iterations < self.steps:
            if spectrum is not None:
                rows = spectrum.estimate(rows)
                if not len(rows):
                    break
                step_size = _best_step(spectrum)
            assert step_size is not None
            before = best.norms[rows]
            x, residual = best.current(rows)
            rounding = torch.finfo(residual.dtype).eps * before
            tolerances = np.maximum(best.tolerances[rows], rounding if self.tol else 0).tolist()
            starts = zip(residual, tolerances, rows.tolist(), strict=True)
            cycle = [Series([r], step_size, tolerance, row, best.system.space) for r, tolerance, row in starts]
            iterations += run(cycle, products, self.steps - iterations)
            again = spectrum is not None and any(s.grew for s in cycle) and spectrum.should_retry()
            for s in cycle:
                if s.grew and not again:
                    s.rewind(products)
                elif s.grew:
                    s.p[0] -= s.v[0]  # the residual of `p - v` is known to be little above the best, and not that of p
                s.finish()
            best.update(rows, x + torch.stack([s.p[0] for s in cycle]))
            _leave_out_a_last_term_that_grew(best, rows, x, cycle, rounding)
            rows = _rows_to_restart(best, rows, before, cycle, again)
            curvatures += [s.curvature for s in cycle]
        if spectrum is not None:
            limits = _SERVED * best.rhs_norms if self.tol is None else best.tolerances
            spectrum.save(good=bool((best.norms <= limits).all()))
        largest, negative = curvature_of_growth(curvatures, self.damping)
        if spectrum is not None:
            largest, negative = spectrum.largest_of_h, negative or spectrum.indefinite
        return {
            "iterations": iterations,
            "step_size": step_size,
            "largest_eigenvalue": largest,
            "negative_curvature": negative,
        }


def _best_step(spectrum: SpectrumBounds) -> float:
    """`2 / (largest + smallest)`, at which the extreme eigenvalues converge alike."""
    step_size = 1.0  # no step converges where nothing is positive: this one does little harm, as does that of -A
    if spectrum.largest > 0:
        step_size = 2 / (spectrum.upper + max(spectrum.smallest, 0.0))
    elif spectrum.smallest < 0:
        step_size = -1 / spectrum.smallest
    return max(step_size, sys.float_info.min)  # the eigenvalues may have overflowed


def _leave_out_a_last_term_that_grew(
    best: BestIterate, rows: Rows, x: Tensor, cycle: Sequence[Series], rounding: Floats
) -> None:
    """Tries the sums without their last terms, of which the series knows the residuals, where only the closing product
    has shown a larger one. That may also be rounding of the product; then they are hardly better.

    Args:
        rows: (k,); `x` (k, n) is where their cycles began.
        rounding: (k,), norms of which nothing can be told.
    """
    known = np.maximum([s.norm for s in cycle], 10 * rounding)
    with np.errstate(over="ignore"):
        late = np.flatnonzero(~np.array([s.grew for s in cycle]) & (best.norms[rows] > GROWTH * known))
    if not len(late):
        return
    grown = best.norms[rows[late]]
    best.update(rows[late], torch.stack([x[i] + (cycle[i].p[0] - cycle[i].v[0]) for i in late.tolist()]))
    for i, norm in zip(late.tolist(), grown, strict=True):
        cycle[i].grew = bool(GROWTH * best.norms[rows[i]] < norm and best.norms[rows[i]] < 1.01 * known[i])


def _rows_to_restart(best: BestIterate, rows: Rows, before: Floats, cycle: Sequence[Series], again: bool) -> Rows:
    """The rows for which another cycle makes sense; sets why the others have stopped."""
    going = []
    for row, norm, s in zip(rows, before, cycle, strict=True):
        if best.norms[row] <= best.tolerances[row]:
            continue
        if (s.grew and again) or (s.reached and best.norms[row] <= RESTART_GAIN * norm):
            going.append(row)
        elif s.grew or s.reached:
            best.stop_reasons[row] = StopReason.DIVERGED if s.grew else StopReason.STAGNATED
    return np.array(going, dtype=np.intp)


def curvature_of_growth(curvatures: Sequence[float | None], damping: float) -> tuple[float | None, bool]:
    """An estimate of the largest eigenvalue of H and whether there is negative curvature, from the series that grew."""
    known = [curvature for curvature in curvatures if curvature is not None]
    positive = [curvature - damping for curvature in known if curvature > 0]
    return max(positive, default=None), any(curvature < 0 for curvature in known)
