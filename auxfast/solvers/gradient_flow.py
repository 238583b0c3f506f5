"""The solver for training of finite length: what gradient flow of that length makes of a small change of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from auxfast.solvers.base import (
    Matvec,
    SolverState,
    SolveStats,
    StopReason,
    check_damping,
    check_flag,
    check_positive,
    check_steps,
    check_tol,
    refuse_not_symmetric,
)
from auxfast.solvers.best_iterate import Floats
from auxfast.solvers.iterative import steps_per_check
from auxfast.solvers.lanczos import Lanczos
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.symmetry import check_pair

_COMPARED = 1 / 3  # of the steps, whose approximations the last one is compared with: fewer miss slow convergence
_SOLVED = (StopReason.CONVERGED, StopReason.TRIVIAL)
_EDGE = 0.95  # of 2 / learning_rate: a Ritz value is a little below the eigenvalue, and that goes up and down


@dataclass(frozen=True)
class GradientFlow:
    """`x = f(H) b` with `f(l) = (1 - exp(-l T)) / l` for eigenvalues l above 0, and `f(l) = T` at and below 0, where T
    is the `time` of the inner training: its learning rate times its steps.

    That is what training does, at a minimum or not: where a small -b is added to the gradient of the inner loss for all
    of that time, gradient flow ends x away from where it ended before, and so does gradient descent of K steps, but for
    about 0.3 / K of x (on a quadratic loss, with `learning_rate * l` up to 1). Long training tends to `H^-1 b`, short
    training to `T b`. Where the inner loss curves downwards, x is as long as a flat direction makes it, and does not
    turn round. The hypergradient is then right as far as the Hessian and the mixed derivatives at the end of training
    stand for those on the way. SOURCE (Bae et al. 2024, arXiv 2405.12186) has the same function for data attribution.

    **What is certified.** x is no solution of `H x = b`, so it has no residual. `stats.residual` is an estimate of its
    relative error `|x - f(H) b| / |f(H) b|`, of which x = 0 has 1: the largest difference to the approximations of the
    last third of the steps, and what the products' rounding makes of it in the time T. Against dense matrices it was
    from half of the true error to three times that of two thirds of the steps; the first few steps may see too little
    of small eigenvalues for it. `stats.converged` compares it with `tol`.

    Lanczos steps with full reorthogonalisation, about `sqrt(T * largest eigenvalue)` of them for a flat spectrum, and
    fewer where few eigenvalues stand out. They hold `steps + 1` vectors a right-hand side.

    Args:
        time: T, above 0. See `of`. With a schedule it is the sum of the learning rates of all steps. `None`: the
            trainer reads it, at each outer step, from its inner optimizer and the steps so far; nobody else does.
        steps: at most, each of one product; at least 1.
        floored: take the floored inverse, `f(l) = 1 / max(l, 1 / T)`, instead.
        tol: stop once the estimated relative error is at most this, between 0 and 1. `None`: take all steps.
        damping: at least 0; added to every eigenvalue of H, as weight decay by the inner optimizer is.
        learning_rate: that of plain descent with the same largest stable eigenvalue, `2 / learning_rate`, if known. It
            is there for `is_at_edge_of_stability` alone.

    Raises:
        ValueError: a setting outside its range.
    """

    time: float | None = None
    steps: int = 20
    floored: bool = False
    tol: float | None = 0.1
    damping: float = 0.0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.time is not None:
            check_positive("time", self.time)
        check_steps("steps", self.steps)
        check_flag("floored", self.floored)
        check_tol(self.tol)
        check_damping(self.damping)
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, inner_steps: int, **settings: Any) -> GradientFlow:
        """The solver for parameters that `optimizer`, a `torch.optim.SGD`, has trained for `inner_steps` steps with its
        learning rate as it is.

        Momentum m makes the time about `learning rate * steps / (1 - m)`, less what it takes to get going. The weight
        decay becomes the `damping`.

        Args:
            optimizer: its groups agree in what matters here.
            inner_steps: at least 1.
            settings: those of `GradientFlow`; they go before what the optimizer says.

        Raises:
            TypeError: an optimizer other than SGD; or an unknown setting.
            ValueError: SGD with `dampening`, `maximize` or a momentum of 1 or more, groups that differ, or
                `inner_steps` outside its range.
        """
        check_steps("inner_steps", inner_steps)
        if not isinstance(optimizer, torch.optim.SGD):
            raise TypeError(
                f"optimizer must be a torch.optim.SGD, not {type(optimizer).__name__}, under which every parameter has "
                "a time of its own: pass GradientFlow(time=...), or take another solver"
            )
        lr, m, nesterov, decay = (_common(optimizer, name) for name in ("lr", "momentum", "nesterov", "weight_decay"))
        for name in ("dampening", "maximize"):
            if _common(optimizer, name):
                raise ValueError(f"optimizer must be without {name}: pass GradientFlow(time=...)")
        if not m < 1:
            raise ValueError(f"optimizer must have a momentum below 1, not {m}: pass GradientFlow(time=...)")
        started = m * (1 - m**inner_steps) / (1 - m)  # steps' worth of velocity that is still missing
        time = lr * (inner_steps - started * (m if nesterov else 1)) / (1 - m)
        stable = lr * (1 + 2 * m if nesterov else 1) / (1 + m)
        return cls(**{"time": time, "damping": decay, "learning_rate": stable, **settings})

    def is_at_edge_of_stability(self, stats: SolveStats) -> bool:
        """Whether descent with `learning_rate` is stable no longer, or hardly, along the largest eigenvalue: it goes to
        and fro there, and neither this nor any other solver says where a change of the loss would lead. False where
        the learning rate is unknown."""
        if self.learning_rate is None or stats.largest_eigenvalue is None:
            return False
        return self.learning_rate * (stats.largest_eigenvalue + self.damping) >= 2 * _EDGE

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """`f(H + damping I) rhs`; see `Solver.solve`, and above for what the stats say. `state` is left as it is.

        Where a product is not finite, the steps before it are what counts: `stop_reason` is `diverged`, or `not finite`
        where that leaves x = 0. It is `stagnated` where more steps would change nothing, but rounding is above `tol`.

        Raises:
            ValueError: `time` is not given, or `matvec` says that it is not symmetric; or see `LinearSystem`.
            RuntimeError: `matvec` returns other shapes than it was given.
        """
        if self.time is None:
            raise ValueError("time must be given: GradientFlow(time=...), or GradientFlow.of(optimizer, inner_steps)")
        refuse_not_symmetric(self, matvec)
        system = LinearSystem(matvec, rhs, self.damping, batched)
        process = Lanczos(system, system.rhs, self.steps)
        rows = [_Row(self, self.time, norm, torch.finfo(system.dtype).eps) for norm in system.rhs_norms.tolist()]
        check_every = steps_per_check(system.rhs.device)
        while any(row.stop_reason is None for row in rows):
            process.step()
            if process.taken % check_every == 0 or process.taken == self.steps:
                table = system.space.read(process.coefficients[:, : process.taken + 1])
                for i, row in enumerate(rows):
                    row.read(table[:, :, i])
        weights = torch.from_numpy(np.stack([row.weights[row.steps] for row in rows])[:, None])  # (k, 1, steps + 1)
        x = (weights.to(system.rhs) @ process.basis)[:, 0]
        x = system.rounded(x, torch.arange(len(x), device=x.device))
        usable = system.space.are_finite(x)
        for row, is_usable in zip(rows, usable.tolist(), strict=True):
            if not is_usable:
                row.error, row.stop_reason = 1.0, StopReason.DIVERGED
        symmetry_error = max((row.symmetry_error for row in rows if row.symmetry_error is not None), default=None)
        symmetric = symmetry_error is None or check_pair(system, symmetry_error)
        ritz_values = np.concatenate([row.ritz_values for row in rows])
        largest, size = (float(part.max(initial=-math.inf)) for part in (ritz_values, abs(ritz_values)))
        worst = max(rows, key=lambda row: row.error)
        stats = SolveStats(
            iterations=max(row.steps for row in rows),
            matvecs=system.matvecs,
            residual=worst.error,
            converged=symmetric and all(row.stop_reason in _SOLVED for row in rows),
            stop_reason=worst.stop_reason or StopReason.STEPS if symmetric else StopReason.NOT_SYMMETRIC,
            largest_eigenvalue=largest - self.damping if len(ritz_values) else None,
            negative_curvature=bool((ritz_values < -10 * torch.finfo(system.rhs.dtype).eps * size).any()),
            residuals=tuple(row.error for row in rows),
            symmetry_error=symmetry_error,
        )
        return system.unflatten(torch.where(torch.from_numpy(usable)[:, None].to(x.device), x, 0)), stats


class _Row:
    """What the Lanczos process of one right-hand side says of `f(H) b`.

    Attributes:
        weights: (solver.steps + 1, solver.steps + 1): row m holds, of the approximation after m steps, its coefficients
            in the Lanczos basis.
        steps: of the approximation that counts.
        error: the estimated relative error of that.
        ritz_values: (steps,), the eigenvalues of its tridiagonal matrix.
        symmetry_error: see SolveStats.
        stop_reason: None while another step may help.
    """

    def __init__(self, solver: GradientFlow, time: float, norm: float, eps: float) -> None:
        self._solver, self._time, self._norm, self._eps = solver, time, norm, eps
        self.weights = np.zeros((solver.steps + 1, solver.steps + 1))
        self.steps = 0
        self.error = 1.0 if norm else 0.0
        self.ritz_values: Floats = np.zeros(0)
        self.symmetry_error: float | None = None
        self.stop_reason = None if norm else StopReason.TRIVIAL

    def read(self, table: Floats) -> None:
        """Takes the coefficients (3, taken + 1) of the process, see `Lanczos`, as far as they are new and of use."""
        diagonal, beside, above = table
        for m in range(self.steps + 1, len(diagonal)):
            if self.stop_reason is not None:
                return
            if not math.isfinite(diagonal[m - 1]):
                self.stop_reason = StopReason.DIVERGED if self.steps else StopReason.NOT_FINITE
                return
            lower = np.diag(diagonal[:m]) + np.diag(beside[1:m], -1)
            self.ritz_values, vectors = np.linalg.eigh(lower)
            self.weights[m, :m] = self._norm * vectors @ (self._f(self.ritz_values) * vectors[0])
            self.steps = m
            size = float(abs(self.ritz_values).max())
            if m == 2:
                self.symmetry_error = float(abs(above[1] - beside[1])) / size
            self.error = self._eps * self._time * size
            if beside[m]:
                earlier = self.weights[m - math.ceil(_COMPARED * m) : m]
                differences = np.linalg.norm(self.weights[m] - earlier, axis=1)
                self.error += float(differences.max() / np.linalg.norm(self.weights[m]))
            if self.error <= (self._solver.tol or 0):
                self.stop_reason = StopReason.CONVERGED
            elif not beside[m]:
                self.stop_reason = StopReason.STAGNATED
            elif m == self._solver.steps:
                self.stop_reason = StopReason.STEPS

    def _f(self, values: Floats) -> Floats:
        x = self._time * values.clip(0)
        with np.errstate(all="ignore"):  # 0 / 0 at 0 is replaced
            inverse = 1 / x.clip(1) if self._solver.floored else np.where(x > 0, -np.expm1(-x) / x, 1)
        return self._time * inverse


def _common(optimizer: torch.optim.Optimizer, name: str) -> float:
    """The value of a setting, which all groups of parameters have.

    Raises:
        ValueError: they have several.
    """
    values = {float(group[name]) for group in optimizer.param_groups}
    if len(values) > 1:
        raise ValueError(
            f"optimizer must have one {name} for all groups, not {sorted(values)}: pass GradientFlow(time=...)"
        )
    return values.pop()
