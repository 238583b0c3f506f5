"""The Chebyshev iteration: the Neumann series accelerated, without inner products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from auxfast.ops.krylov import linear_combination_, row_dots
from auxfast.solvers.base import Block, Matvec, SolverState, SolveStats, check_damping, check_steps, check_tol
from auxfast.solvers.certificate import PROGRESS, Certified, Floats, Rows
from auxfast.solvers.preconditioners import Apply, Preconditioner, prepare
from auxfast.solvers.series import steps_per_look
from auxfast.solvers.spectrum import Estimate

_WINDOW = math.log(2)  # by how much the residual should have fallen before its fall is judged
_SLOW = 0.6  # of the fall that the bounds promise, in logarithms
_GROWTH = 2.0  # of a residual over less than a window
_ALLOWANCE = math.log(2)  # for rounding


@dataclass(frozen=True)
class Chebyshev:
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
        steps: products of the recurrence at most, at least 1.
        bounds: `"auto"`, or two numbers `0 < lower < upper`. An eigenvalue below `lower` slows it down; one above
            `upper` or below 0 makes the residual grow.
        tol: stop once the relative residual is at most this, between 0 and 1; `None`: `steps` steps.
        damping: at least 0.
        warm_start: start from the solution in `state`, at one product, if that has a smaller residual than 0 has.
        preconditioner: `bounds` are then those of its product with `A`.

    Raises:
        ValueError: a setting outside its range.
    """

    steps: int = 100
    bounds: tuple[float, float] | Literal["auto"] = "auto"
    tol: float | None = 1e-3
    damping: float = 0.0
    warm_start: bool = False
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_steps("steps", self.steps)
        _check_bounds(self.bounds)
        check_tol(self.tol)
        check_damping(self.damping)

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `(H + damping I) x = rhs`; see `Solver.solve`.

        Raises:
            ValueError: see `Block`.
            RuntimeError: `matvec` returns other shapes than it was given.
        """
        block = Block(matvec, rhs, self.damping, batched)
        best = Certified(block, self.tol)
        if self.warm_start:
            best.warm_start(state)
        rows = best.unsolved()
        precondition = prepare(self.preconditioner, block, state) if len(rows) else None
        estimate = Estimate(best, state, precondition) if self.bounds == "auto" else None
        iterations = 0
        while len(rows) and iterations < self.steps:
            if estimate is not None:
                rows = estimate.explore(rows)
                if not len(rows):
                    break
                if estimate.largest <= 0:
                    best.blame("negative curvature" if estimate.indefinite else "stagnated")
                    break
            cycle = _Cycle(best, rows, precondition)
            iterations += cycle.run(self._bounds(estimate), self.steps - iterations, adaptive=estimate is not None)
            if estimate is not None:
                estimate.smallest = min(estimate.smallest, cycle.lower)
            rows = np.array(cycle.again, dtype=np.intp)
            if cycle.grew and estimate is not None and estimate.renew():
                rows = np.concatenate([rows, cycle.rows])
            elif cycle.grew:
                for row in cycle.rows:
                    best.reasons[row] = "diverged"
        if estimate is not None:
            estimate.leave(good=self.tol is None or not len(best.unsolved()))
        if self.warm_start and state is not None:
            state.solution = block.unflatten(best.solution.clone())
        return best.result(
            iterations,
            largest_eigenvalue=None if estimate is None else estimate.largest_of_h,
            negative_curvature=estimate is not None and estimate.indefinite,
        )

    def _bounds(self, estimate: Estimate | None) -> tuple[float, float]:
        if estimate is None:
            assert self.bounds != "auto"
            return self.bounds
        return max(estimate.smallest, 1e-3 * estimate.upper), estimate.upper


class _Cycle:
    """k rows with the same bounds, and so the same coefficients (Saad, Iterative Methods, algorithm 12.1).

    With the bounds' center c and half width h, and `t = c / h`, the residual after j steps is the first times
    `T_j((c - A) / h) / T_j(t)`, with the Chebyshev polynomial T_j: of what belongs to an eigenvalue in the bounds, at
    most `1 / T_j(t) = 1 / cosh(j acosh t)` is left.
    """

    def __init__(self, best: Certified, rows: Rows, precondition: Apply | None) -> None:
        self.best, self.rows, self.precondition = best, rows, precondition
        self.x, self.residual = best.at(rows)  # (k, n)
        self.direction, self.saved = torch.zeros_like(self.x), self.x.clone()  # (k, n)
        self.norms: Floats = best.norms[rows]  # (k,)
        self.first = self.saved_norms = self.norms
        self.goals = np.maximum(best.goals[rows], torch.finfo(self.x.dtype).eps * self.norms)
        self.grew = False
        self.again: list[int] = []  # rows that are done but for the drift of the residual that is carried

    def run(self, bounds: tuple[float, float], steps: int, adaptive: bool) -> int:
        """At most `steps` steps, less if all rows reach their goals or one grows; returns how many. Offers the rows'
        best iterates."""
        every = steps_per_look(self.x.device)
        self._begin(*bounds)
        taken = 0
        while taken < steps and len(self.rows) and not self.grew:
            count = min(every, steps - taken)
            self._advance(count)
            taken += count
            self._retire(self.norms <= self.goals)
            if len(self.rows):
                with np.errstate(all="ignore"):  # comparisons with what is not finite say so
                    self._judge(adaptive)
        if len(self.rows):
            self._save()
            self.best.offer(self.rows, self.saved)
        return taken

    def _begin(self, lower: float, upper: float) -> None:
        """The recurrence anew, from the present residual."""
        self.lower, self.upper = lower, upper
        self.center, self.half = (upper + lower) / 2, (upper - lower) / 2
        self.rate = math.acosh(self.center / self.half)
        self.ratio = self.half / self.center  # T_j(t) / T_{j + 1}(t)
        self.taken = 0
        image = self._preconditioned()
        linear_combination_(self.direction, [image], self._coefficients([(0.0, 1 / self.center)])[0])
        self.begun = self.sizes = self._sizes(image)
        self._open_window()

    def _advance(self, count: int) -> None:
        coefficients = []
        for _ in range(count):
            following = 1 / (2 * self.center / self.half - self.ratio)
            coefficients.append((following * self.ratio, 2 * following / self.half))
            self.ratio = following
        add, subtract, *turns = self._coefficients([(1.0, 1.0), (1.0, -1.0), *coefficients])
        for turn in turns:
            product = self.best.block.product(self.direction)
            linear_combination_(self.x, [self.direction], add)
            squares = linear_combination_(self.residual, [product], subtract)
            image = self._preconditioned()
            linear_combination_(self.direction, [image], turn)
        self.taken += count
        self.norms = squares.sqrt().cpu().numpy()
        self.sizes = self._sizes(image)

    def _preconditioned(self) -> Tensor:
        return self.residual if self.precondition is None else self.precondition(self.residual)

    def _sizes(self, image: Tensor) -> Floats:
        """(k,), of the residuals, in the norm in which the bounds promise something: the preconditioner's."""
        if self.precondition is None:
            return self.norms
        squares: Floats = row_dots(self.residual, image).clamp(min=0).cpu().numpy()
        return np.sqrt(squares)

    def _coefficients(self, pairs: list[tuple[float, float]]) -> Tensor:
        """(number of pairs, 2, k), for all rows alike; in one transfer to the device."""
        return torch.tensor(pairs, dtype=torch.float64)[..., None].repeat(1, 1, len(self.rows)).to(self.x.device)

    def _retire(self, reached: npt.NDArray[np.bool_]) -> None:
        """Offers the rows that reached their goals, and goes on without them."""
        if not reached.any():
            return
        done, going = (torch.from_numpy(np.flatnonzero(mask)).to(self.x.device) for mask in (reached, ~reached))
        self.best.offer(self.rows[reached], self.x[done])
        for row, first in zip(self.rows[reached], self.first[reached], strict=True):
            if self.best.reasons[row] == "steps" and self.best.norms[row] <= PROGRESS * first:
                self.again.append(row)
            elif self.best.reasons[row] == "steps":
                self.best.reasons[row] = "stagnated"
        for name in ("x", "residual", "direction", "saved"):
            setattr(self, name, getattr(self, name)[going])
        for name in ("rows", "first", "norms", "saved_norms", "sizes", "begun", "window_sizes", "goals"):
            setattr(self, name, getattr(self, name)[~reached])

    def _judge(self, adaptive: bool) -> None:
        """Looks for eigenvalues outside the bounds: only they leave more of the residual than `1 / T_j(t)`. If it grows
        they are above or negative, and if it falls too slowly, below."""
        promised = _log_cosh(self.taken * self.rate)
        outside = ~(np.log(self.sizes) < np.log(self.begun) - promised + _ALLOWANCE)  # so is NaN
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
            self._begin(min(max(0.8 * slowest, self.lower / 20), self.lower / 1.5), self.upper)
        else:
            self._open_window()

    def _open_window(self) -> None:
        self.window_start, self.window_sizes = self.taken, self.sizes
        self._save()

    def _save(self) -> None:
        """Keeps the iterates that are better than what was kept."""
        better = self.norms < self.saved_norms
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
