"""The solver that makes one step of gradient descent on the linear system in each call: SOBA and AmIGO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxfast.ops.krylov import row_dots
from auxfast.solvers.base import Matvec, SolverState, SolveStats, StopReason, check_positive
from auxfast.solvers.known_solution import KnownSolution, without_certificate
from auxfast.solvers.linear_system import batched_matvec, check_rhs


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
        b = _rows(rhs, batched)
        norms = row_dots(b, b).sqrt().tolist()
        if not all(map(math.isfinite, norms)):
            raise ValueError("rhs is not finite: the gradient of the outer loss holds an inf or NaN")
        if not any(norms):
            return [torch.zeros_like(t) for t in rhs], without_certificate(rhs, batched, self.step_size)
        carried = None if state is None else _like(rhs, state.solution)
        x = torch._foreach_mul(list(rhs), self.step_size) if carried is None else carried
        product = (batched_matvec(matvec) if batched else matvec)(x)
        if (given := [t.shape for t in product]) != (wanted := [t.shape for t in rhs]):
            raise RuntimeError(f"matvec returned tensors of shapes {given} for parameters of shapes {wanted}")
        x_rows, product_rows = _rows(x, batched), _rows(product, batched)
        left = b.sub_(product_rows)
        pairs = (left, left), (x_rows, product_rows), (x_rows, x_rows)
        dots = torch.stack([row_dots(*pair) for pair in pairs]).tolist()
        of_rows = [self._of_row(*numbers) for numbers in zip(norms, *dots, strict=True)]
        useless = [reason in _USELESS for _, _, reason in of_rows]
        if state is not None:
            step = torch._foreach_sub(list(rhs), list(product))
            state.solution = None if any(useless) else [*torch._foreach_add(list(x), step, alpha=self.step_size)]
        if any(useless) or not all(norms):
            keep = torch.tensor([bool(norm) and not u for norm, u in zip(norms, useless, strict=True)])
            rows = keep.to(b.device) if batched else keep[0].to(b.device)
            x = [t.where(rows.view(-1, *[1] * (t.dim() - 1)) if batched else rows, 0) for t in x]
        residuals = tuple(residual for residual, _, _ in of_rows)
        curvatures = [curvature for _, curvature, _ in of_rows if math.isfinite(curvature)]
        worst = of_rows[residuals.index(max(residuals))]
        overflowed = worst[2] is StopReason.NOT_FINITE and carried is not None  # the product with b may be finite
        return list(x), SolveStats(
            iterations=1,
            matvecs=len(b),
            residual=worst[0],
            converged=worst[0] == 0,
            stop_reason=StopReason.DIVERGED if overflowed else worst[2],
            step_size=self.step_size,
            largest_eigenvalue=max(curvatures, default=None),
            negative_curvature=any(curvature < 0 for curvature in curvatures),
            residuals=residuals,
        )

    def _of_row(self, norm: float, left: float, x_product: float, x_x: float) -> tuple[float, float, StopReason]:
        """The residual, the curvature along x, and why the solve stopped, of one right-hand side.

        Args:
            norm: that of the right-hand side b.
            left, x_product, x_x: the dot products of `b - H x` with itself, and of x with `H x` and with itself.
        """
        if norm == 0:
            return 0.0, 0.0, StopReason.TRIVIAL
        if not math.isfinite(left + x_product + x_x):
            return 1.0, math.nan, StopReason.NOT_FINITE
        residual, curvature = math.sqrt(left) / norm, x_product / x_x if x_x else 0.0
        if residual >= 1 and self.step_size * curvature > 2:
            return 1.0, curvature, StopReason.DIVERGED
        return residual, curvature, StopReason.STEPS if residual else StopReason.CONVERGED


_USELESS = (StopReason.NOT_FINITE, StopReason.DIVERGED)


def _like(rhs: Sequence[Tensor], solution: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """The solution of an earlier call, where it has the shapes, dtypes and device of the right-hand side."""
    kinds = [[(t.shape, t.dtype, t.device) for t in tensors] for tensors in (rhs, solution or ())]
    return solution if kinds[0] == kinds[1] else None


def _rows(tensors: Sequence[Tensor], batched: bool) -> Tensor:
    """(k, n): tensors of k right-hand sides as rows, a copy of float32 at least."""
    rows = torch.cat([t.reshape(len(t) if batched else 1, -1) for t in tensors], dim=1)
    return rows if rows.dtype.itemsize >= 4 else rows.float()
