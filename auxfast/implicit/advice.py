"""Warnings about a hypergradient, with what to do about it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from auxfast._callers import stacklevel
from auxfast.implicit.finite import NotFiniteError, check_finite
from auxfast.solvers import DEFAULT_SOLVER, BlockDiagonal, GradientFlow, Identity, StopReason
from auxfast.solvers.base import Matvec, Solver, SolverState, SolveStats
from auxfast.solvers.known_solution import KnownSolution
from auxfast.solvers.space import LOCAL, VectorSpace, as_row

_LARGE_RESIDUAL = 0.5
_PARALLEL_COSINE = 0.99
_MAX_ELEMENTS = 4096  # to compare more of two vectors would cost what a cheap solver saves

# Neither these texts nor those of StopReason hold figures of the solve: Python shows a text once for each place that it
# comes from.
_IDENTITY = (
    "The hypergradient is little more than the identity approximation: the solution is nearly parallel to the outer "
    "loss's gradient, while the residual is large or not certified. The steps are too few or too small for the "
    "curvature to matter: take a larger step_size, step_size='auto', or MINRES(); or, if this is "
    "what you want, auxfast.solvers.Identity(), which is cheaper."
)
_ALONE = (
    "process_group is None, and the environment says that several processes run (WORLD_SIZE, by torchrun): each gets "
    "the result of its own data alone. torch.distributed.group.WORLD is None before "
    "torch.distributed.init_process_group(): call that first. If each process is to work alone, pass warn=False."
)
_DIRECT_ALONE = "so that nothing of the outer parameters reaches the outer loss through the inner ones"
_TEXTS = {
    "no part": (
        "The hypergradient is 0: no outer parameter plays a part in either loss. Was the inner loss computed without "
        "the combiner, from detached weights, or from parameters that were replaced since, or have they "
        "requires_grad=False? What acts on the training alone, such as a learning rate, has no hypergradient: the "
        "minimum does not depend on it."
    ),
    "no part in the inner loss": (
        "The hypergradient is only the direct gradient: no outer parameter plays a part in the gradient of the inner "
        f"loss, {_DIRECT_ALONE}. Are outer_loss and inner_loss exchanged, or is the combiner in the wrong one?"
    ),
    "no curvature": (
        "The inner loss has no curvature along the outer loss's gradient (H b = 0), and the solver has returned x = 0, "
        f"{_DIRECT_ALONE}. Are all weights of the losses, or of the samples, at 0? Add damping to the solver, as in "
        "MINRES(damping=0.1), or keep the main loss in with main=0 of the combiner."
    ),
    "no solution": (
        f"The solver has found nothing better than x = 0, whose residual is 1, {_DIRECT_ALONE}. See "
        "stats.stop_reason; damping makes a system easier to solve."
    ),
    **{reason.value: reason.advice for reason in StopReason},
    "disagreement": (
        "Finite differences and the recorded graph of the inner loss disagree about its second derivatives. Is there a "
        "detach() on the way from the parameters to the loss? Differences go through it, the graph does not, and "
        "neither need be right, since such a gradient is that of no loss: compute what is detached outside of "
        "inner_loss, or take curvature='hessian', which holds it constant. If not, the dtype is too narrow for the "
        "curvature: take parameters of float64, or curvature='hessian'."
    ),
    "unproven": (
        "The graph of inner_loss holds a torch.autograd.Function of yours, and whether its backward pass is the "
        "derivative of its forward pass cannot be seen on a tensor (that of a gradient reversal is not, and makes the "
        "hypergradient wrong). Pass inner_loss as a function, which is checked, or write twice_differentiable = True "
        "into the class."
    ),
    "kink": (
        "Some inner parameters are exactly 0, where abs() or relu() of them in inner_loss has a kink. Entries that "
        "stay at a kink are held there, and the theorem holds for the others alone: pass free=[w != 0 for w in "
        "inner_params], or what verify_hypergradient suggests."
    ),
    "no minimum": (
        "The inner parameters are not at a minimum: along the outer loss's gradient a Newton step would move them by "
        "more than a tenth of their length, and what is computed is the derivative of something else. Train them "
        "further before implicit_minimum, or pass the loss that they were trained with."
    ),
    "no root": (
        "The parameters are not at a root: along the outer loss's gradient a Newton step would move them by more than "
        "a tenth of their length, and what is computed is the derivative of something else. Solve function() = 0 "
        "further before implicit_root; of a fixed-point map f, function is f(W) - W."
    ),
    "not solved": (
        "The linear system of implicit_root is not solved to the solver's tol; on_solve is told its residual. Is "
        "function the F of F(W) = 0? Of a fixed-point map f pass f(W) - W. Else allow more steps, GMRES a larger "
        "restart, or take Dense() for few parameters; tol=None says that the number of steps is meant."
    ),
    "singular": (
        "The Jacobian of function in params is singular, or nearly so: the root is not isolated, or the residual "
        "cannot be made smaller in this precision. Add damping to the solver, or take parameters of float64."
    ),
    "no part in the function": (
        "No outer parameter plays a part in function, so that nothing of them reaches the outer loss through params. "
        "Was something detached on the way, or were they replaced since?"
    ),
    "identity": _IDENTITY,
    "flow": (
        "GradientFlow's estimate of its own relative error, stats.residual, is above its tol. Allow more steps, "
        "or set a larger tol; tol=None says that the number of steps is meant. Where stats.stop_reason is "
        "'stagnated', rounding is what limits it: take parameters of float64."
    ),
    "edge of stability": (
        "The inner training is at the edge of stability: its learning rate times the largest eigenvalue of the inner "
        "Hessian (stats.largest_eigenvalue) is 2 or nearly so. Descent goes to and fro along that direction, "
        "and no hypergradient says reliably where a change of the outer parameters would lead. Lower the inner "
        "learning rate, or the weights of the losses."
    ),
}


def warn_of(problem: str | None, solver: Solver, state: SolverState | None) -> None:
    """Gives a RuntimeWarning about the problem, if there is one; see `warn_once`. `warn=False` or a `warnings` filter
    turns it off."""
    if problem is not None:
        warn_once(problem, f"{_TEXTS[problem]} (solver={solver!r})", state)


def warn_once(kind: str, text: str, state: SolverState | None) -> None:
    """Gives a RuntimeWarning once for each kind and `state`; without a state, as often as Python's filters show the
    same text from the same line (by default once)."""
    warned = set() if state is None else state.warned
    if kind not in warned:
        warned.add(kind)
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel())


def warn_of_no_group(process_group: Any, state: SolverState | None) -> None:
    """Warns where `group.WORLD` was probably passed before there was one: it is None then, which means no group."""
    is_launched = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    distributed = torch.distributed
    if process_group is None and is_launched and distributed.is_available() and not distributed.is_initialized():
        warn_once("no group", _ALONE, state)


def missing_dependence(outer_loss: bool, inner_loss: bool) -> str | None:
    """The problem where one of the losses does not depend on the outer parameters."""
    if inner_loss:
        return None
    return "no part in the inner loss" if outer_loss else "no part"


def found_nothing(stats: SolveStats, solution: Sequence[Tensor], space: VectorSpace = LOCAL) -> bool:
    """Whether the solver returned x = 0 for a right-hand side that is not 0. Neumann(certify=False), whose residual is
    NaN, does so only where it diverged."""
    if math.isnan(stats.residual) and stats.stop_reason is StopReason.STEPS:
        return False
    if stats.residual < 1:
        return False
    return space.all(not any(bool(x.any()) for x in sorted(solution, key=Tensor.numel)))


def problem_of(
    solver: Solver, stats: SolveStats, curvature: Matvec, rhs: Sequence[Tensor], nothing: bool
) -> str | None:
    """The problem with a solve; `nothing` is what `found_nothing` says of it.

    Raises:
        NotFiniteError: x = 0 was returned because the products are not finite.
    """
    if nothing:
        space: VectorSpace = getattr(curvature, "space", LOCAL)
        largest = float(space.largest_entries(as_row(rhs))[0])
        product = curvature([b / largest for b in rhs])
        size = float(space.largest_entries(as_row(product))[0])
        if not math.isfinite(size):
            name = "The second derivatives of inner_loss in inner_params"
            check_finite(name, product)
            raise NotFiniteError(f"{name} hold NaN or inf, in the piece of another rank")
        if not size:
            return "no curvature"
    return problem_of_stats(solver, stats, nothing)


def problem_of_stats(solver: Solver, stats: SolveStats, nothing: bool) -> str | None:
    """The problem with a solve of a finite curvature that is not 0, by its stats alone; see `problem_of`."""
    if stats.stop_reason in (StopReason.DIVERGED, StopReason.NOT_SYMMETRIC):
        return str(stats.stop_reason)
    if isinstance(solver, GradientFlow):  # negative curvature is what it is for
        return _problem_of_flow(solver, stats)
    if stats.negative_curvature:
        return str(StopReason.NEGATIVE_CURVATURE)
    if nothing:
        return "no solution"
    if not stats.converged and getattr(solver, "tol", None) is not None and not _is_as_meant(solver, stats):
        stagnated = stats.stop_reason is StopReason.STAGNATED
        return str(StopReason.STAGNATED if stagnated else StopReason.STEPS)
    return None


def _is_as_meant(solver: Solver, stats: SolveStats) -> bool:
    """Whether a residual above the tolerance is what the default solver is for: a bound on the cost."""
    return solver == DEFAULT_SOLVER and stats.residual < _LARGE_RESIDUAL


def _problem_of_flow(solver: GradientFlow, stats: SolveStats) -> str | None:
    if solver.is_at_edge_of_stability(stats):
        return "edge of stability"
    return "flow" if not stats.converged and solver.tol is not None else None


def no_more_than_identity(
    solver: Solver,
    stats: SolveStats,
    rhs: Sequence[Tensor],
    solution: Sequence[Tensor],
    state: SolverState | None,
) -> str | None:
    """The problem that the solution is nearly parallel to the right-hand side, by the first elements of the largest
    tensor. `None` also where the `state` knows that a warning was given: the comparison costs as much as a check."""
    return identity_of(overlap(rhs, solution).tolist()) if may_be_identity(solver, stats, state) else None


def may_be_identity(solver: Solver, stats: SolveStats, state: SolverState | None) -> bool:
    """Whether the solution is to be compared with the right-hand side."""
    if stats.residual < _LARGE_RESIDUAL or (state and "identity" in state.warned):
        return False
    method = solver.solver if isinstance(solver, BlockDiagonal) else solver
    return not isinstance(method, (GradientFlow, Identity, KnownSolution))  # a short flow is right to be parallel


def overlap(rhs: Sequence[Tensor], solution: Sequence[Tensor]) -> Tensor:
    """`(b . b, b . x, x . x)` of the first elements of the largest tensor. Waits for no device."""
    b, x = max(zip(rhs, solution, strict=True), key=lambda pair: pair[0].numel())
    b, x = b.flatten()[:_MAX_ELEMENTS], x.flatten()[:_MAX_ELEMENTS]
    return torch.stack([torch.dot(*pair) for pair in ((b, b), (b, x), (x, x))])


def identity_of(products: Sequence[float]) -> str | None:
    """The problem that two vectors of such an `overlap` are nearly parallel."""
    bb, bx, xx = products
    return "identity" if bx > _PARALLEL_COSINE * math.sqrt(bb * xx) else None
