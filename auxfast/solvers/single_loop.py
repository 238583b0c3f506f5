"""The solver that makes one step of gradient descent on the linear system in each call: SOBA and AmIGO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxfast.solvers.base import (
    RHS_NOT_FINITE,
    Matvec,
    SolverState,
    SolveStats,
    StopReason,
    are_alike,
    batched_matvec,
    check_positive,
)
from auxfast.solvers.known_solution import KnownSolution, without_certificate
from auxfast.solvers.linear_system import check_product, check_rhs
from auxfast.solvers.space import LOCAL, VectorSpace

_USELESS = (StopReason.NOT_FINITE, StopReason.DIVERGED)


@dataclass(frozen=True)
class SingleLoop(KnownSolution):
    """One step of `x <- x - step_size * (H x - b)` a call, for methods that move the inner parameters, x and the outer
    parameters by one step each: SOBA (Dagreou et al. 2022), AmIGO (Arbel and Mairal 2022).

    A call takes x as `state.solution` has it, multiplies it once, returns it, and leaves the stepped one in the state
    for the next call. The first call starts at `step_size * b`. `hypergradient` takes the product and the mixed product
    in one backward pass. Without a `state` nothing is carried, and every call is that of one step: `HyperOptimizer` has
    one.

    The residual is free with that product, and true: that of the x that is returned. It falls from call to call where
    `step_size` is below 2 / (largest eigenvalue of H), and the system changes slowly. Where it is 1 or more, no better
    than x = 0, the quotient `x.Hx / x.x` is looked at: it is `stats.largest_eigenvalue`, and may be
    `stats.negative_curvature`. If it is above 2 / step_size, which proves the step too large, or if the product is not
    finite, the carried x is dropped and x = 0 is returned: `diverged`, or `not finite`.

    Args:
        step_size: above 0 and below 2 / (largest eigenvalue of H): the inner learning rate is a fair start.

    Raises:
        ValueError: a setting outside its range.
    """

    step_size: float

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)

    @torch.no_grad()
    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """The carried solution, and its residual; see `Solver.solve` and above. A right-hand side of zeros has x = 0.

        Raises:
            ValueError: see `LinearSystem`.
            RuntimeError: `matvec` returns other shapes or dtypes than it was given.
        """
        check_rhs(rhs, batched)
        space: VectorSpace = getattr(matvec, "space", LOCAL)
        norms = _norms(rhs, batched, space)
        if not all(map(math.isfinite, norms)):
            raise ValueError(RHS_NOT_FINITE)
        if not any(norms):
            return [torch.zeros_like(t) for t in rhs], without_certificate(matvec, rhs, batched, self.step_size)
        carried = state.solution if state is not None and space.all(are_alike(state.solution or (), rhs)) else None
        x = torch._foreach_mul(list(rhs), self.step_size) if carried is None else carried
        product = (batched_matvec(matvec) if batched else matvec)(x)
        check_product(product, rhs)
        left = torch._foreach_sub(list(rhs), list(product))
        lengths = _norms(left, batched, space)
        residuals = [length / norm if norm else 0.0 for length, norm in zip(lengths, norms, strict=True)]
        curvatures = [0.0] * len(norms) if max(residuals) < 1 else _curvatures(x, product, batched, space)
        reasons = [*map(self._reason, norms, residuals, curvatures)]
        useless = [reason in _USELESS for reason in reasons]
        if state is not None:
            state.solution = None if any(useless) else [*torch._foreach_add(list(x), left, alpha=self.step_size)]
        if any(useless) or not all(norms):
            keep = torch.tensor([bool(norm) and not u for norm, u in zip(norms, useless, strict=True)])
            rows = (keep if batched else keep[0]).to(rhs[0].device)
            x = [t.where(rows.view(-1, *[1] * (t.dim() - 1)) if batched else rows, 0) for t in x]
            residuals = [1.0 if u else residual for u, residual in zip(useless, residuals, strict=True)]
        worst = residuals.index(max(residuals))
        overflowed = reasons[worst] is StopReason.NOT_FINITE and carried is not None  # that with b may be finite
        known = [curvature for curvature in curvatures if curvature and math.isfinite(curvature)]
        return list(x), SolveStats(
            iterations=1,
            matvecs=len(norms),
            residual=residuals[worst],
            converged=residuals[worst] == 0,
            stop_reason=StopReason.DIVERGED if overflowed else reasons[worst],
            step_size=self.step_size,
            largest_eigenvalue=max(known, default=None),
            negative_curvature=any(curvature < 0 for curvature in known),
            residuals=tuple(residuals),
        )

    def _reason(self, norm: float, residual: float, curvature: float) -> StopReason:
        """Why the solve of one right-hand side, of this norm, stopped."""
        if norm == 0:
            return StopReason.TRIVIAL
        if not math.isfinite(residual):
            return StopReason.NOT_FINITE
        if residual >= 1 and self.step_size * curvature > 2:
            return StopReason.DIVERGED
        return StopReason.STEPS if residual else StopReason.CONVERGED


def _norms(tensors: Sequence[Tensor], batched: bool, space: VectorSpace) -> list[float]:
    """The norms of k right-hand sides."""
    if space is LOCAL and not batched and tensors[0].dtype.itemsize >= 4:
        norm = math.hypot(*map(float, torch._foreach_norm(list(tensors))))
        if 1e-15 < norm < 1e15:  # else squares may have left the range of float32
            return [norm]
    rows = _rows(tensors, batched)
    norms: list[float] = space.read(space.dots(rows, rows).sqrt_()).tolist()
    return norms


def _curvatures(x: Sequence[Tensor], product: Sequence[Tensor], batched: bool, space: VectorSpace) -> list[float]:
    """`x . H x / x . x`, a bound of the eigenvalues of H from within; 0 where x is 0."""
    rows, products = _rows(x, batched), _rows(product, batched)
    quotients = (space.dots(rows, products) / space.dots(rows, rows)).nan_to_num(0.0)
    curvatures: list[float] = space.read(quotients).tolist()
    return curvatures


def _rows(tensors: Sequence[Tensor], batched: bool) -> Tensor:
    """(k, n): tensors of k right-hand sides as rows, a copy of float32 at least."""
    rows = torch.cat([t.reshape(len(t) if batched else 1, -1) for t in tensors], dim=1)
    return rows if rows.dtype.itemsize >= 4 else rows.float()
