"""Whether the recorded second derivatives of a loss are those of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

from torch import Tensor

from auxfast.implicit.batch_curvature import MeanCurvature
from auxfast.implicit.curvature import Hessian, in_dtypes_of
from auxfast.implicit.finite import NotFiniteError
from auxfast.implicit.finite_difference import FiniteDifference
from auxfast.implicit.losses import CheckedLoss, LossGraph
from auxfast.implicit.summed_curvature import SummedCurvature
from auxfast.solvers.base import SolverState, SolveStats, StopReason


def check_symmetry(
    stats: SolveStats,
    problem: str | None,
    state: SolverState | None,
    inner: CheckedLoss,
    curvature: Hessian | MeanCurvature | SummedCurvature,
    params: Sequence[Tensor],
    solution: Sequence[Tensor],
) -> tuple[SolveStats, str | None]:
    """`stats` and the problem with a solve, with what a comparison of the recorded product with the solution and of a
    difference of gradients says.

    A backward pass that is not the derivative of its forward pass makes the gradient that of no loss, and its
    derivative not symmetric; what is recorded may be symmetric all the same, and wrong. The comparison takes some 25
    gradients, and a loss that can be computed again. It is made where Functions of the user are in the graph, and else
    once for a `state`.

    Args:
        params, solution: the inner parameters that are in the system, and the solution of it.
    """
    known = None if state is None else state.symmetry_error
    if inner.kind == "tensor":
        return stats, problem or ("unproven" if curvature.unproven else None)
    if known is None and state is None and not curvature.unproven:
        return stats, problem
    if known is None:
        if stats.stop_reason is StopReason.TRIVIAL:
            return stats, problem
        assert not isinstance(inner, LossGraph)
        if isinstance(curvature, SummedCurvature):  # it may have pieces
            params, solution = curvature.whole_params, curvature.join(solution)
        try:
            differences = FiniteDifference(inner, params)
        except NotFiniteError:  # second derivatives may be finite where the gradient is not, and nothing tells
            return stats, problem
        differences.mixed(list(compress(in_dtypes_of(params, solution), differences.in_system)), ())
        known = differences.operator_error if differences.disagrees else 0.0
        if state is not None:
            state.symmetry_error = known
    stats = replace(stats, symmetry_error=max(known, stats.symmetry_error or 0.0))
    if known:
        stats, problem = replace(stats, converged=False, stop_reason=StopReason.NOT_SYMMETRIC), "not symmetric"
    return stats, problem
