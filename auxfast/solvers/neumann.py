"""The truncated Neumann series (the paper's Algorithm 2, with the factor that makes it the inverse)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from auxfast.solvers.base import Matvec, SolverState, SolveStats, StopReason, check_positive
from auxfast.solvers.best_iterate import RESTART_GAIN, BestIterate, Floats, Rows
from auxfast.solvers.iterative import IterativeSolver
from auxfast.solvers.linear_system import LinearSystem, check_rhs
from auxfast.solvers.series import ListProducts, Products, RowProducts, Series, run, without_graph
from auxfast.solvers.spectrum import SpectrumBounds


@dataclass(frozen=True)
class Neumann(IterativeSolver):
    """`x = a (I + M + ... + M^steps) b`, `M = I - a A`, `A = H + damping I`: `steps + 1` terms, `steps` products.

    It converges to `A^-1 b` if all eigenvalues of `A` lie between 0 and `2 / a`, at the rate of the largest
    `|1 - a eigenvalue|`. The factor `a`, which the paper's Algorithm 2 leaves out, makes it the inverse: the
    solution does not scale with `1 / a`.

    **Growth.** The vector that the iteration carries is the exact residual of the sum without its last term. Once
    its norm grows it does so for ever (its squares are moments of `M^2`, hence log-convex). The sum is then cut where
    the norm was smallest, and summed once more up to there: rounding would spoil a way back. `stop_reason` is
    `diverged`, and the residual is that of the sum returned, at most 1.

    **Which residual.** With `tol`, `warm_start` or `step_size="auto"`, one closing product a solve tells the true one
    of what is returned. With none of them nothing is spent but `steps` products: this is Algorithm 2 as it stands, and
    the figure is that of the sum without its last term. The term is kept, because it makes a better solution (by
    the factor above, in every eigendirection). The figure is an upper bound then, wherever all eigenvalues are in
    `[0, 2 / a]`; elsewhere it is one step behind.

    **`step_size="auto"`** takes `2 / (1.1 largest + smallest)` of the extreme eigenvalues that 8 Lanczos steps find,
    and starts from the solution that they find as well: 9 products a right-hand side, on top of `steps`. `state`
    keeps the eigenvalues for the next solve. If the residual grows, they are estimated anew from there, once; so
    they are in the next solve if this one misses its tolerance.

    Args:
        steps: Hessian-vector products of the series at most (the paper's J), at least 1.
        step_size: the paper's alpha; above 0, and below `2 / (largest eigenvalue of A)` to converge.
        tol: stop once the relative residual is at most this, between 0 and 1; it is read after every step on a CPU
            and after every 8th on a GPU, where each reading waits for the device. `None`: always `steps` steps, unless
            the residual grows or is 0.
        damping, warm_start: see `IterativeSolver`.

    Raises:
        ValueError: a setting outside its range.
    """

    steps: int = 20
    step_size: float | Literal["auto"] = "auto"
    tol: float | None = None
    damping: float = 0.0
    warm_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size != "auto":
            check_positive('step_size, if it is not "auto",', self.step_size)

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `(H + damping I) x = rhs`; see `Solver.solve`.

        Raises:
            ValueError: `rhs` is empty or not finite, or (batched) of different numbers of right-hand sides.
            RuntimeError: `matvec` returns other shapes, dtypes or devices than it was given.
        """
        if self.step_size == "auto" or self.tol is not None or self.warm_start:
            return super().solve(matvec, rhs, batched=batched, state=state)
        if batched or self.damping:
            system = LinearSystem(matvec, rhs, self.damping, batched)
            series = [Series([b], self.step_size) for b in system.rhs]
            stats = self._plain(series, RowProducts(system), self.step_size)
            return system.unflatten(torch.stack([s.p[0] for s in series])), stats
        check_rhs(rhs)
        one = Series(without_graph(rhs), self.step_size)
        stats = self._plain([one], ListProducts(matvec), self.step_size)
        return one.p, stats

    def _plain(self, series: Sequence[Series], products: Products, step_size: float) -> SolveStats:
        """Runs Algorithm 2 as it stands, which leaves the solutions in `p`; the stats cost no further product."""
        iterations = run(series, products, self.steps)
        residuals, reasons = [], []
        for s in series:
            trivial = s.is_trivial()
            if s.grew:
                s.rewind(products)
            s.finish()
            residuals.append(0.0 if trivial else s.residual)
            if trivial:
                reasons.append(StopReason.TRIVIAL)
            elif s.reached:
                reasons.append(StopReason.CONVERGED)
            else:
                reasons.append(StopReason.DIVERGED if s.grew else StopReason.STEPS)
        worst = residuals.index(max(residuals))
        largest, negative = _curvature_of_growth([s.curvature for s in series], self.damping)
        return SolveStats(
            iterations=iterations,
            matvecs=products.matvecs,
            residual=residuals[worst],
            converged=residuals[worst] == 0,
            stop_reason=reasons[worst],
            step_size=step_size,
            largest_eigenvalue=largest,
            negative_curvature=negative,
            residuals=tuple(residuals),
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
            rounding = torch.finfo(residual.dtype).eps * before if self.tol else 0
            tolerances = np.maximum(best.tolerances[rows], rounding).tolist()
            cycle = [Series([r], step_size, tolerance) for r, tolerance in zip(residual, tolerances, strict=True)]
            iterations += run(cycle, products, self.steps - iterations)
            again = spectrum is not None and any(s.grew for s in cycle) and spectrum.should_retry()
            for s in cycle:
                if s.grew and not again:
                    s.rewind(products)
                elif s.grew:
                    s.p[0] -= s.v[0]  # the residual of `p - v` is known to be little above the best, and not that of p
                s.finish()
            best.update(rows, x + torch.stack([s.p[0] for s in cycle]))
            rows = _rows_to_restart(best, rows, before, cycle, again)
            curvatures += [s.curvature for s in cycle]
        if spectrum is not None:
            spectrum.save(good=self.tol is None or not len(best.unsolved()))
        largest, negative = _curvature_of_growth(curvatures, self.damping)
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
    if spectrum.largest > 0:
        return 2 / (spectrum.upper + max(spectrum.smallest, 0.0))
    return -1 / spectrum.smallest if spectrum.smallest < 0 else 1.0  # no step converges: this one does little harm


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


def _curvature_of_growth(curvatures: Sequence[float | None], damping: float) -> tuple[float | None, bool]:
    """An estimate of the largest eigenvalue of H and whether there is negative curvature, from the series that grew."""
    known = [curvature for curvature in curvatures if curvature is not None]
    positive = [curvature - damping for curvature in known if curvature > 0]
    return max(positive, default=None), any(curvature < 0 for curvature in known)
