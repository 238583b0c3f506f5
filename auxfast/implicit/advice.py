"""Warnings about a solve, with what to do about it."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from auxfast.solvers import Identity, StopReason
from auxfast.solvers.base import Solver, SolverState, SolveStats

_LARGE_RESIDUAL = 0.5
_PARALLEL_COSINE = 0.99
_MAX_ELEMENTS = 4096  # to compare more of two vectors would cost what a cheap solver saves

# Neither these texts nor those of StopReason hold figures of the solve: Python shows a text once for each place that it
# comes from.
_IDENTITY = (
    "The hypergradient is little more than the identity approximation: the solution is nearly parallel to the outer "
    "loss's gradient, while the residual is large or not certified. The steps are too few or too small for the "
    "curvature to matter: "
    "take a larger step_size, step_size='auto', or the default solver, MINRES(); or, if this is what you want, "
    "auxfast.solvers.Identity(), which is cheaper."
)
_TEXTS = {
    "diverged": StopReason.DIVERGED.advice,
    "negative curvature": StopReason.NEGATIVE_CURVATURE.advice,
    "unconverged": StopReason.STEPS.advice,
    "identity": _IDENTITY,
}


def warn_of(
    solver: Solver, stats: SolveStats, rhs: Sequence[Tensor], solution: Sequence[Tensor], state: SolverState | None
) -> None:
    """Gives at most one RuntimeWarning: each kind once for a `state`, and without one as often as Python's filters show
    the same text from the same line (by default once). `warn=False` or a `warnings` filter turns it off."""
    warned = set() if state is None else state.warned
    kind = _what_is_wrong(solver, stats)
    if kind is None and "identity" not in warned and _is_little_more_than_identity(solver, stats, rhs, solution):
        kind = "identity"
    if kind is None or kind in warned:
        return
    warned.add(kind)
    warnings.warn(f"{_TEXTS[kind]} (solver={solver!r})", RuntimeWarning, stacklevel=_frames_of_auxfast())


def _what_is_wrong(solver: Solver, stats: SolveStats) -> str | None:
    if stats.stop_reason == "diverged":
        return "diverged"
    if stats.negative_curvature:
        return "negative curvature"
    if not stats.converged and getattr(solver, "tol", None) is not None:
        return "unconverged"
    return None


def _is_little_more_than_identity(
    solver: Solver, stats: SolveStats, rhs: Sequence[Tensor], solution: Sequence[Tensor]
) -> bool:
    """Whether the solution is nearly parallel to the right-hand side, by the first elements of the largest tensor."""
    if stats.residual < _LARGE_RESIDUAL or isinstance(solver, Identity):
        return False
    b, x = max(zip(rhs, solution, strict=True), key=lambda pair: pair[0].numel())
    b, x = b.flatten()[:_MAX_ELEMENTS], x.flatten()[:_MAX_ELEMENTS]
    bb, bx, xx = (torch.dot(*pair).item() for pair in ((b, b), (b, x), (x, x)))
    return bx > _PARALLEL_COSINE * math.sqrt(bb * xx)


def _frames_of_auxfast() -> int:
    """`stacklevel` at which `warn_of` finds the first caller outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("auxfast."):
        level, frame = level + 1, frame.f_back
    return level
