"""The Chebyshev iteration: the Neumann series accelerated, without inner products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from auxfast.ops.krylov import linear_combination_
from auxfast.solvers.base import SolverState, StopReason
from auxfast.solvers.best_iterate import RESTART_GAIN, BestIterate, Floats, Rows
from auxfast.solvers.iterative import IterativeSolver, steps_per_check
from auxfast.solvers.preconditioners import Apply, Preconditioner, check_preconditioner, prepare
from auxfast.solvers.spectrum import SpectrumBounds

# Residuals are compared in logarithms, with the fall that the bounds promise.
_WINDOW = math.log(2)  # promised fall after which the actual one is judged: over less, it says little about the rate
_SLOW = 0.6  # share of the promised fall below which the residual counts as slow: eigenvalues lie below the bounds
_GROWTH = 2.0  # factor by which a residual may rise within a window, which it also does without growing for good
_ALLOWANCE = math.log(2)  # excess over the promised residual that rounding may cause
_LOWEST = 1e-3  # lower bound relative to the upper one at the start; eigenvalues below it are found on the way


@dataclass(frozen=True)
class Chebyshev(IterativeSolver):
    """The polynomial of `A = H + damping I` that is smallest on `bounds`, the interval of its eigenvalues, by its
    three-term recurrence (Golub & Varga 1961).

    It needs about `sqrt(largest / smallest)` products where the Neumann series needs `largest / smallest`, and in place
    of the inner products of conjugate gradients it needs to know the interval: nothing waits for the device but a look
    at the residuals, every 8th step.

    **`bounds="auto"`** starts from the extreme eigenvalues that 8 Lanczos steps find, and from the solution that they
    find as well: 9 products a right-hand side, on top of `steps`. The upper bound is 1.1 times the largest. The
    smallest cannot be found like this; but if there are eigenvalues below the lower bound, the residual soon falls at
    the rate of the smallest of them, which tells it, and the recurrence begins anew. `state` keeps both for the next
    solve. If the residual grows, they are estimated once more from there; so they are in the next solve if this
    one misses its tolerance.

    What is returned is the best iterate that was looked at, and its residual is the true one, for one product.

    Args:
        steps, damping, warm_start: see `IterativeSolver`.
        bounds: `"auto"`, or two numbers `0 < lower < upper`. An eigenvalue below `lower` slows it down; one above
            `upper` or below 0 makes the residual grow.
        tol: stop once the relative residual is at most this, between 0 and 1; `None`: `steps` steps.
        preconditioner: `bounds` are then those of its product with `A`.

    Raises:
        ValueError: a setting outside its range.
        TypeError: a preconditioner that is none.
    """

    steps: int = 100
    bounds: tuple[float, float] | Literal["auto"] = "auto"
    tol: float | None = 1e-3
    damping: float = 0.0
    warm_start: bool = False
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preconditioner(self.preconditioner)
        _check_bounds(self.bounds)

    def _iterate(self, best: BestIterate, state: SolverState | None) -> dict[str, Any]:
        rows = best.unsolved()
        precondition = prepare(self.preconditioner, best.system, state) if len(rows) else None
        spectrum = SpectrumBounds(best, state, precondition) if self.bounds == "auto" else None
        iterations = 0
        while len(rows) and iterations < self.steps:
            if spectrum is not None:
                rows = spectrum.estimate(rows)
                if not len(rows):
                    break
                if spectrum.largest <= 0:
                    best.set_stop_reason(StopReason.NEGATIVE_CURVATURE if spectrum.indefinite else StopReason.STAGNATED)
                    break
            cycle = _Cycle(best, rows, precondition)
            iterations += cycle.run(self._bounds(spectrum), self.steps - iterations, adaptive=spectrum is not None)
            if spectrum is not None:
                spectrum.smallest = min(spectrum.smallest, cycle.lower)
            rows = np.array(cycle.again, dtype=np.intp)
            if cycle.grew and spectrum is not None and spectrum.should_retry():
                rows = np.union1d(rows, cycle.rows)  # in order
            elif cycle.grew:
                for row in np.intersect1d(cycle.rows, best.unsolved()):
                    best.stop_reasons[row] = StopReason.DIVERGED
        if spectrum is not None:
            spectrum.save(good=self.tol is None or not len(best.unsolved()))
        return {
            "iterations": iterations,
            "largest_eigenvalue": None if spectrum is None else spectrum.largest_of_h,
            "negative_curvature": spectrum is not None and spectrum.indefinite,
        }

    def _bounds(self, spectrum: SpectrumBounds | None) -> tuple[float, float]:
        if spectrum is None:
            assert self.bounds != "auto"
            return self.bounds
        return max(spectrum.smallest, _LOWEST * spectrum.upper), spectrum.upper


class _Cycle:
    """k rows with the same bounds, and so the same coefficients (Saad, Iterative Methods, algorithm 12.1).

    With the bounds' center c and half width h, and `t = c / h`, the residual after j steps is the first times
    `T_j((c - A) / h) / T_j(t)`, with the Chebyshev polynomial T_j: of what belongs to an eigenvalue in the bounds, at
    most `1 / T_j(t) = 1 / cosh(j acosh t)` is left.

    Attributes:
        rows: those that are still iterated.
        norms: (k,), of the residuals; `first_norms` at the start of the cycle, `saved_norms` of the `saved` iterates.
        sizes: (k,), the residuals in the norm in which the bounds promise something; `first_sizes` where the recurrence
            began, `window_sizes` where the window did.
        again: rows that are done but for the drift of the residual that is carried.
        grew: whether the residual of one of `rows` grew.
        lower: the lower bound, as far as it is known by now.
    """

    def __init__(self, best: BestIterate, rows: Rows, precondition: Apply | None) -> None:
        self.best, self.rows, self.precondition = best, rows, precondition
        self.x, self.residual = best.current(rows)  # (k, n)
        self.direction, self.saved = torch.zeros_like(self.x), self.x.clone()  # (k, n)
        self.norms: Floats = best.norms[rows]  # (k,)
        self.first_norms = self.saved_norms = self.norms
        self.tolerances = np.maximum(best.tolerances[rows], torch.finfo(self.x.dtype).eps * self.norms)
        self.grew = False
        self.again: list[int] = []

    def run(self, bounds: tuple[float, float], steps: int, adaptive: bool) -> int:
        """Takes at most `steps` steps, fewer if all rows reach their tolerances or one grows, and updates `best`.
        Returns how many it took."""
        every = steps_per_check(self.x.device)
        self._begin(*bounds)
        taken = 0
        while taken < steps and len(self.rows) and not self.grew:
            count = min(every, steps - taken)
            self._advance(count)
            taken += count
            self._retire(self.norms <= self.tolerances)
            if len(self.rows):
                with np.errstate(all="ignore"):  # comparisons with what is not finite say so
                    self._judge(adaptive)
        if len(self.rows):
            self._save()
            self.best.update(self.rows, self.saved)
        return taken

    def _begin(self, lower: float, upper: float) -> None:
        """Starts the recurrence, or starts it anew, from the present residual."""
        self.lower, self.upper = lower, upper
        self.center, self.half = (upper + lower) / 2, (upper - lower) / 2
        self.rate = math.acosh(self.center / self.half)
        self.ratio = self.half / self.center  # T_j(t) / T_{j + 1}(t)
        self.taken = 0
        image = self._preconditioned()
        linear_combination_(self.direction, [image], self._coefficients([(0.0, 1 / self.center)])[0])
        self.first_sizes = self.sizes = self._sizes(image)
        self._open_window()

    def _advance(self, count: int) -> None:
        coefficients = []
        for _ in range(count):
            following = 1 / (2 * self.center / self.half - self.ratio)
            coefficients.append((following * self.ratio, 2 * following / self.half))
            self.ratio = following
        index = None if len(self.rows) == len(self.best.norms) else torch.from_numpy(self.rows).to(self.x.device)
        add, subtract, *turns = self._coefficients([(1.0, 1.0), (1.0, -1.0), *coefficients])
        for turn in turns:
            product = self.best.system.product(self.direction, index)
            linear_combination_(self.x, [self.direction], add)
            squares = linear_combination_(self.residual, [product], subtract)
            image = self._preconditioned()
            linear_combination_(self.direction, [image], turn)
        self.taken += count
        space = self.best.system.space
        self.norms = np.sqrt(space.read(space.sum(squares)))
        self.sizes = self._sizes(image)

    def _preconditioned(self) -> Tensor:
        return self.residual if self.precondition is None else self.precondition(self.residual)

    def _sizes(self, image: Tensor) -> Floats:
        """The residuals (k,) in the norm in which the bounds promise something: the preconditioner's."""
        if self.precondition is None:
            return self.norms
        space = self.best.system.space
        sizes: Floats = np.sqrt(space.read(space.dots(self.residual, image)).clip(min=0))
        return sizes

    def _coefficients(self, pairs: list[tuple[float, float]]) -> Tensor:
        """(number of pairs, 2, k): each pair for all rows alike, in one transfer to the device."""
        return torch.tensor(pairs, dtype=torch.float64)[..., None].repeat(1, 1, len(self.rows)).to(self.x.device)

    def _retire(self, reached: npt.NDArray[np.bool_]) -> None:
        """Updates `best` with the rows that reached their tolerances, and goes on without them."""
        if not reached.any():
            return
        done, going = (torch.from_numpy(np.flatnonzero(mask)).to(self.x.device) for mask in (reached, ~reached))
        self.best.update(self.rows[reached], self.x[done])
        for row, first in zip(self.rows[reached], self.first_norms[reached], strict=True):
            if self.best.stop_reasons[row] != StopReason.STEPS:
                continue
            if self.best.norms[row] <= RESTART_GAIN * first:
                self.again.append(row)
            else:
                self.best.stop_reasons[row] = StopReason.STAGNATED
        for name in ("x", "residual", "direction", "saved"):
            setattr(self, name, getattr(self, name)[going])
        norms = ("norms", "first_norms", "saved_norms", "tolerances")
        for name in ("rows", *norms, "sizes", "first_sizes", "window_sizes"):
            setattr(self, name, getattr(self, name)[~reached])

    def _judge(self, adaptive: bool) -> None:
        """Detects eigenvalues outside the bounds: only they leave more of the residual than `1 / T_j(t)`. If it grows
        they are above or negative, and if it falls too slowly, below."""
        promised = _log_cosh(self.taken * self.rate)
        outside = ~(np.log(self.sizes) < np.log(self.first_sizes) - promised + _ALLOWANCE)  # a NaN is outside too
        self.grew = bool((outside & ~(self.sizes <= _GROWTH * self.window_sizes)).any())
        promised -= _log_cosh(self.window_start * self.rate)
        if self.grew or promised < _WINDOW:
            return
        fallen = float(np.log(self.window_sizes / self.sizes)[outside].min(initial=math.inf))
        if fallen < 0:
            self.grew = True
        elif adaptive and fallen < _SLOW * promised:
            # An eigenvalue below the bounds leaves cosh(j acosh((c - eigenvalue) / h)) / cosh(j acosh t).
            excess = (promised - fallen) / (self.taken - self.window_start)
            slowest = self.center - self.half * math.cosh(excess)
            # The new bound lies a little below that. It moves by a factor of 1.5 at least, or little would change, and
            # of 20 at most, for the estimate is rough.
            self._begin(min(max(0.8 * slowest, self.lower / 20), self.lower / 1.5), self.upper)
        else:
            self._open_window()

    def _open_window(self) -> None:
        self.window_start, self.window_sizes = self.taken, self.sizes
        self._save()

    def _save(self) -> None:
        """Keeps the iterates that are better than what was kept."""
        better = self.norms < self.saved_norms
        if better.all():
            self.saved.copy_(self.x)
        elif better.any():
            index = torch.from_numpy(np.flatnonzero(better)).to(self.x.device)
            self.saved[index] = self.x[index]
        self.saved_norms = np.where(better, self.norms, self.saved_norms)


def _log_cosh(x: float) -> float:
    return x + math.log1p(math.exp(-2 * x)) - math.log(2)


def _check_bounds(bounds: tuple[float, float] | Literal["auto"]) -> None:
    if bounds == "auto":
        return
    numbers = isinstance(bounds, tuple) and len(bounds) == 2 and all(isinstance(b, (int, float)) for b in bounds)
    if not numbers or not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f'bounds must be "auto" or two numbers, 0 < lower < upper, not {bounds!r}')
