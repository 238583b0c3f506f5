"""The solver that differentiates one step of the inner training: T1-T2 and DARTS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auxfast.solvers.base import Matvec, SolverState, SolveStats, check_flag, check_positive
from auxfast.solvers.known_solution import KnownSolution, MixedProduct, check_mixed, without_certificate


@dataclass(frozen=True)
class OneStep(KnownSolution):
    """`x = lr * b`: the hypergradient is the derivative of one step of gradient descent on the inner loss, with

        direct gradient  -  lr * d/dphi <v, d inner / dW (W, phi)>

    where v, the outer gradient in W, and the direct gradient are taken at W (T1-T2, Luketina et al. 2016), or with
    `lookahead` at the stepped parameters `W - lr * d inner / dW` (DARTS, Liu et al. 2019): that is exactly the
    derivative of `outer(W - lr * d inner / dW (W, phi), phi)`.

    No product with H is spent, so `stats.residual` is NaN, not known, and `converged` is False: the answer is that of
    one step, whatever the minimum does. `Identity` has the same x and certifies it by a product.

    Cost in gradients, of a forward and a backward pass: about four with "exact", three with "difference", and fewer
    where the way to the outer parameters is short; with look-ahead at most one more.

    With look-ahead `outer_loss` must be a function, for it is evaluated at the stepped parameters, which have their old
    bits back afterwards; `inner_loss` may be a tensor if `mixed` is "exact". "difference" needs functions for
    `inner_loss`, and no second derivatives.

    Args:
        lr: learning rate of the step, above 0.
        lookahead: whether to take the outer gradient after the step.
        mixed: "exact", or "difference" as DARTS has it, whose error is not estimated: it is of the order of the third
            derivatives times 1e-4, and of rounding / 0.01, which is too much for parameters of bfloat16.

    Raises:
        ValueError: a setting outside its range.
    """

    lr: float
    lookahead: bool = False
    mixed: MixedProduct = "exact"

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)
        check_flag("lookahead", self.lookahead)
        check_mixed(self.mixed)

    @property
    def lookahead_lr(self) -> float:
        return self.lr if self.lookahead else 0.0

    def without_lookahead(self) -> OneStep:
        return replace(self, lookahead=False) if self.lookahead else self

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """`lr * rhs`; see `Solver.solve`. `matvec` is not called, and `state` is left as it is.

        Raises:
            ValueError: `lookahead`, which needs the outer loss: only `hypergradient` and `HyperOptimizer` have it; or
                see `LinearSystem`.
        """
        if self.lookahead:
            raise ValueError(
                "OneStep(lookahead=True) evaluates the outer loss, which only hypergradient and HyperOptimizer have: "
                "take lookahead=False here"
            )
        stats = without_certificate(matvec, rhs, batched, self.lr)
        return [*torch._foreach_mul([b.detach() for b in rhs], self.lr)], stats
