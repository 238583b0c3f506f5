"""The truncated Neumann series (the paper's Algorithm 2, with the factor that makes it the inverse)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auxfast.ops.neumann import neumann_step_
from auxfast.solvers.base import (
    TRIVIAL,
    Matvec,
    SolveStats,
    check_positive,
    check_rhs,
    relative_residual,
)

_DIVERGED = 1.001  # relative residual: 1 is that of x = 0, the rest is for rounding
_STEPS_PER_CHECK = 8  # on a GPU, where reading a norm waits for all that was launched


@dataclass(frozen=True)
class Neumann:
    """`x = a (I + M + ... + M^steps) b`, `M = I - a H`: `steps + 1` terms, `steps` Hessian-vector products.

    It converges to `H^-1 b` if all eigenvalues of `H` lie between 0 and `2 / a`, at the rate of the largest
    `|1 - a eigenvalue|`. The factor `a`, which the paper's Algorithm 2 leaves out, makes it the inverse: the
    solution does not scale with `1 / a`.

    **Which solution the residual is for.** The vector that the iteration carries is the exact residual of the
    sum one term before the one returned, so it costs nothing. It would be that of the returned sum if the
    last term were left off. The term is kept, because at the same number of products it is a better solution
    (by the factor above, in every eigendirection) and the one of Algorithm 2. While the iteration contracts,
    the figure is an upper bound of the residual of what is returned. Where `H` has eigenvalues outside
    `[0, 2 / a]` it is one step behind.

    Args:
        steps: Hessian-vector products at most (the paper's J), at least 1.
        step_size: the paper's alpha; above 0, and below `2 / (largest eigenvalue of H)` to converge.
        tol: stop once the relative residual is at most this, between 0 and 1; it is looked at after every
            step on a CPU and after every 8th on a GPU, where each look waits for the device. `None`: always
            `steps` steps, and nothing waits before the end.

    Raises:
        ValueError: a setting outside its range.
    """

    steps: int
    step_size: float
    tol: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, not {self.steps!r}")
        check_positive("step_size", self.step_size)
        if self.tol is not None:
            check_positive("tol", self.tol)
            if self.tol >= 1:
                raise ValueError(f"tol must be below 1, the relative residual of x = 0, not {self.tol!r}")

    def solve(self, matvec: Matvec, rhs: Sequence[Tensor]) -> tuple[list[Tensor], SolveStats]:
        """Solves `H x = rhs`; see `Solver.solve`. If it diverges, which is when the residual exceeds 1 and
        returning zeros would have been better, it says so: a RuntimeWarning, and `stop_reason="diverged"`.

        Raises:
            ValueError: `rhs` is empty or not finite.
            RuntimeError: `matvec` returns other shapes, dtypes or devices than it was given.
        """
        check_rhs(rhs)
        b = [tensor.detach() for tensor in rhs]
        v, p = [torch.zeros_like(t) for t in b], [torch.zeros_like(t) for t in b]
        squared_rhs = neumann_step_(v, b, p, -1.0)  # from zeros: v = p = b, and the norm, in one pass
        if self.tol is not None and squared_rhs.item() == 0:
            return p, replace(TRIVIAL, step_size=self.step_size)
        every = 1 if v[0].device.type == "cpu" else _STEPS_PER_CHECK
        for step in range(1, self.steps + 1):
            product = matvec(v)
            with torch.no_grad():
                squared_v = neumann_step_(v, product, p, self.step_size)
            if self.tol is not None and step % every == 0:
                residual = relative_residual(*torch.stack([squared_v, squared_rhs]).tolist())
                if residual <= self.tol or residual > _DIVERGED:
                    break
        torch._foreach_mul_(p, self.step_size)
        squared_residual, squared_b = torch.stack([squared_v, squared_rhs]).tolist()
        residual = relative_residual(squared_residual, squared_b)
        stats = SolveStats(step, step, residual, residual <= (self.tol or 0), self.step_size, "steps")
        if squared_b == 0:
            return [torch.zeros_like(tensor) for tensor in p], replace(stats, stop_reason="trivial")
        if residual > _DIVERGED:
            self._warn_of_divergence(stats)
            return p, replace(stats, stop_reason="diverged")
        return p, replace(stats, stop_reason="converged") if stats.converged else stats

    def _warn_of_divergence(self, stats: SolveStats) -> None:
        warnings.warn(
            f"The Neumann series diverged: after {stats.iterations} steps of size {self.step_size:g} the "
            f"relative residual is {stats.residual:.3g}, and that of x = 0 is 1. Take a smaller step_size: "
            "it must be below 2 / (largest eigenvalue of the inner Hessian). Where the inner loss curves "
            "downwards, as it may far from a minimum, none is small enough for many steps: take fewer.",
            RuntimeWarning,
            stacklevel=3,
        )
