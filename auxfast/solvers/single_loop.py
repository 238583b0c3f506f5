"""The solver that makes one step of gradient descent on the linear system in each call: SOBA and AmIGO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auxfast.ops.krylov import row_dots
from auxfast.solvers.base import Matvec, SolverState, SolveStats, StopReason, check_positive
from auxfast.solvers.known_solution import KnownSolution, without_certificate
from auxfast.solvers.linear_system import LinearSystem


@dataclass(frozen=True)
class SingleLoop(KnownSolution):
    """One step of `x <- x - step_size * (H x - b)` a call, for methods that move the inner parameters, x and the outer
    parameters by one step each: SOBA (Dagreou et al. 2022), AmIGO (Arbel and Mairal 2022).

    A call takes x as `state.solution` has it, multiplies it once, returns it, and leaves the stepped one in the state
    for the next call. The first call starts at `step_size * b`. `hypergradient` takes the product and the mixed product
    in one backward pass. Without a `state` nothing is carried, and every call is that of one step: `HyperOptimizer` has
    one.

    The residual is free with that product, and true: that of the x that is returned. It falls from call to call where
    `step_size` is below 2 / (largest eigenvalue of H), and the system changes slowly. Where x itself proves the step
    too large, by `x.Hx / x.x > 2 / step_size` and a residual above that of x = 0, or the product is not finite, the
    carried x is dropped and x = 0 is returned: `diverged`, or `not finite`. `stats.largest_eigenvalue` is that
    quotient, and `stats.negative_curvature` says that it is below 0.

    Args:
        step_size: above 0 and below 2 / (largest eigenvalue of H): the inner learning rate is a fair start.

    Raises:
        ValueError: a setting outside its range.
    """

    step_size: float

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """The carried solution, and its residual; see `Solver.solve` and above. A right-hand side of zeros has x = 0.

        Raises:
            ValueError: see `LinearSystem`.
            RuntimeError: `matvec` returns other shapes or dtypes than it was given.
        """
        system = LinearSystem(matvec, rhs, 0.0, batched)
        b, norms = system.rhs, system.rhs_norms
        if not norms.any():
            return system.unflatten(b), without_certificate(rhs, batched, self.step_size)
        carried = None if state is None else _like(rhs, state.solution)
        x = b * self.step_size if carried is None else system.flatten(carried)
        x = system.rounded(x, torch.arange(len(b), device=b.device))
        product = system.product(x)
        left = b - product
        dots = torch.stack([row_dots(left, left), row_dots(x, product), row_dots(x, x)]).cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            residuals = np.where(norms > 0, np.sqrt(dots[0]) / norms, 0.0)
            curvatures = np.where(norms > 0, dots[1] / dots[2], 0.0)
        finite = np.isfinite(residuals) & np.isfinite(dots[2])
        useless = ~finite | ((self.step_size * curvatures > 2) & (residuals >= 1))
        if useless.any() or not norms.all():
            zero = torch.from_numpy(useless | (norms == 0)).to(b.device)[:, None]
            x, left = torch.where(zero, 0, x), torch.where(zero, 0, left)
        if state is not None:
            state.solution = None if useless.any() else system.unflatten(x + self.step_size * left)
        residuals = np.where(useless, 1.0, residuals)
        worst = int(residuals.argmax())
        known = curvatures[finite]
        return system.unflatten(x), SolveStats(
            iterations=1,
            matvecs=system.matvecs,
            residual=float(residuals[worst]),
            converged=not residuals.any(),
            stop_reason=_reason(bool(useless[worst]), bool(finite[worst]), carried is None, residuals[worst]),
            step_size=self.step_size,
            largest_eigenvalue=float(known.max()) if len(known) else None,
            negative_curvature=bool((known < 0).any()),
            residuals=tuple(residuals.tolist()),
        )


def _reason(useless: bool, finite: bool, is_first: bool, residual: float) -> StopReason:
    if not finite and is_first:  # the product is one with the right-hand side
        return StopReason.NOT_FINITE
    if useless:
        return StopReason.DIVERGED
    return StopReason.STEPS if residual else StopReason.CONVERGED


def _like(rhs: Sequence[Tensor], solution: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """The solution of an earlier call, where it has the shapes, dtypes and device of the right-hand side."""
    kinds = [[(t.shape, t.dtype, t.device) for t in tensors] for tensors in (rhs, solution or ())]
    return solution if kinds[0] == kinds[1] else None
