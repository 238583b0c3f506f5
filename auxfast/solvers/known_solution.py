"""What the solvers share that take their solution from elsewhere than from products with H."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from auxfast.solvers.base import RHS_NOT_FINITE, Matvec, SolverState, SolveStats, StopReason
from auxfast.solvers.linear_system import check_rhs
from auxfast.solvers.space import LOCAL, VectorSpace

MixedProduct = Literal["exact", "difference"]
"""How to take the derivative of `<x, d inner / d W>` in the outer parameters: through the recorded gradient; or by the
central difference of two gradients at `W +- e x`, with `e = 0.01 / |x|`."""


class KnownSolution:
    """Solver that knows x before any product with H. It multiplies the x that it returns, at most, and that once.

    `hypergradient` can then take the mixed product in the same pass, or without H, and looks for nothing that only more
    products would tell: whether H is symmetric, or a parameter at a kink.

    Attributes:
        mixed: see `MixedProduct`. Where it is "difference", `hypergradient` records no second derivatives at all;
            `implicit_minimum`, whose backward pass evaluates no loss, takes the exact one in any case.
        lookahead_lr: learning rate of the step of the inner training after which the outer gradient is to be taken; 0
            where that is the one at the inner parameters as they are.
    """

    mixed: MixedProduct = "exact"

    @property
    def lookahead_lr(self) -> float:
        return 0.0

    def without_lookahead(self) -> KnownSolution:
        """The same solver for an outer gradient that is given."""
        return self

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """The solution; see `Solver.solve`."""
        raise NotImplementedError


def check_mixed(value: str) -> None:
    if value not in ("exact", "difference"):
        raise ValueError(f"mixed must be 'exact' or 'difference', not {value!r}")


def without_certificate(
    matvec: Matvec, rhs: Sequence[Tensor], batched: bool, step_size: float | None = None
) -> SolveStats:
    """The stats of a solve that has spent no product: residuals are unknown, but where the right-hand side is zero.

    Raises:
        ValueError: see `LinearSystem`.
    """
    check_rhs(rhs, batched)
    space: VectorSpace = getattr(matvec, "space", LOCAL)
    sizes = _norms_of_rows(rhs) if batched else [_norm([b.detach() for b in rhs])]
    if space is not LOCAL:
        sizes = space.read(space.max(torch.tensor(sizes, dtype=torch.float64, device=rhs[0].device))).tolist()
    if not all(map(math.isfinite, sizes)):
        raise ValueError(RHS_NOT_FINITE)
    residuals = tuple(math.nan if size else 0.0 for size in sizes)
    trivial = not any(sizes)
    return SolveStats(
        iterations=0,
        matvecs=0,
        residual=0.0 if trivial else math.nan,
        converged=trivial,
        stop_reason=StopReason.TRIVIAL if trivial else StopReason.STEPS,
        step_size=step_size,
        residuals=residuals,
    )


def _norm(tensors: list[Tensor]) -> float:
    """A norm of all elements together: 0 where all are 0, and not finite where one is not."""
    norm: float = sum(torch.stack(torch._foreach_norm(tensors)).tolist())  # NaN does not get lost in a sum
    if 0 < norm < math.inf:
        return norm
    # Squares may have left the range of their dtype. The largest element takes ten times as long.
    return sum(float(tensor.abs().amax()) for tensor in tensors if tensor.numel())


def _norms_of_rows(tensors: Sequence[Tensor]) -> list[float]:
    rows = [tensor.detach().reshape(len(tensor), -1).abs().amax(dim=1) for tensor in tensors if tensor.numel()]
    norms: list[float] = torch.stack(rows).amax(dim=0).tolist() if rows else [0.0] * len(tensors[0])
    return norms
