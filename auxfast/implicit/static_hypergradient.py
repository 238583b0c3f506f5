"""The hypergradient as the same operations in every call, whatever the numbers are: what a CUDA graph can replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import compress

import torch
from torch import Tensor

from auxfast.autograd.batched_backward import BatchingUnsupported, SingleBackward
from auxfast.autograd.engine import in_own_task, run_engine, spread, zeros_for_none
from auxfast.autograd.hooks import HookDetector
from auxfast.autograd.pullback import agree, engine_only, is_engine_only, rounding_of_pass
from auxfast.implicit.advice import identity_of, may_be_identity, missing_dependence, overlap, problem_of_stats
from auxfast.implicit.curvature import GaussNewton, Hessian, in_dtypes_of, in_widest_dtype
from auxfast.implicit.finite import not_finite
from auxfast.implicit.hypergradient import difference
from auxfast.implicit.inner_problem import GivenParams
from auxfast.implicit.losses import LossFn
from auxfast.solvers.base import Solver, SolverState, SolveStats, StopReason
from auxfast.solvers.space import Floats
from auxfast.solvers.static_solve import StaticSolve, largest_entry

CURVATURES: dict[str, type[Hessian]] = {"hessian": Hessian, "gauss-newton": GaussNewton}

_DIRECT, _SOLUTION, _MIXED, _GRADS, _AT_KINK, _OVERLAP = range(6)
"""Numbers of a call, before those of its solve: the largest entries of the direct gradient, the solution, the mixed
product and the hypergradient; whether a parameter is at a kink; and the three of `overlap`."""
_NUMBERS = _OVERLAP + 3


class StaticHypergradient:
    """`hypergradient` of two functions, in three parts: `begin`, then `steps`, once for each chunk of the `solve`, then
    `end`. All that the parts hand on to each other stays at its place in memory, so that they may be recorded once, in
    this order, and be replayed.

    Args:
        outer, inner: the losses.
        params: those that they depend on.
        solve: the solver.
        curvature: a key of `CURVATURES`.

    Attributes:
        solve: as given.
        flat_grads: after `end`, the hypergradients, as one vector for each dtype that outer parameters have.
        numbers: after `end`, float64, what `outcome` reads.
    """

    flat_grads: list[Tensor]
    numbers: Tensor

    def __init__(self, outer: LossFn, inner: LossFn, params: GivenParams, solve: StaticSolve, curvature: str) -> None:
        self._outer, self._inner = outer, inner
        self._params = params
        self.solve = solve
        self._kind = CURVATURES[curvature]
        self._has_own_pass: bool | None = None  # not known before the first call
        self._dtypes = [*dict.fromkeys(phi.dtype for phi in params.outer)]

    @torch.no_grad()
    def begin(self) -> None:
        """Evaluates the losses and begins the solve. The first call compares a product of a pass of our own with one of
        autograd's engine, and waits for the device."""
        inner_params, outer_params = self._params.active_inner, self._params.active_outer
        term = self._outer().gradient([*inner_params, *outer_params])
        rhs, self._direct = term[: len(inner_params)], term[len(inner_params) :]
        is_first = self._has_own_pass is None
        self._derivatives = derivatives = self._kind(self._inner(), inner_params, is_known=not is_first)
        if not derivatives.params:
            raise ValueError(
                "inner_loss has no second derivatives in inner_params, so that there is no linear system to solve"
            )
        planned = self._planned_pass(derivatives)
        if is_first:
            self._has_own_pass = planned is not None and _agrees(planned, derivatives)
        self._product = _Product(derivatives, planned if self._has_own_pass else None)
        pairs = zip(compress(rhs, derivatives.in_system), derivatives.params, strict=True)
        self._rhs = in_widest_dtype([torch.zeros_like(w) if grad is None else grad for grad, w in pairs])
        self.solve.begin(self._product, self._rhs)

    def _planned_pass(self, derivatives: Hessian) -> SingleBackward | None:
        """A pass of our own, with fewer launches than the engine's, and none of its threads; `None` where it cannot be,
        or was found to disagree."""
        if self._has_own_pass is False or type(derivatives) is not Hessian or not _may_pass(derivatives):
            return None
        try:
            return SingleBackward(_outputs(derivatives), derivatives.params)
        except BatchingUnsupported:
            return None

    @torch.no_grad()
    def steps(self, count: int) -> None:
        self.solve.steps(count)

    @torch.no_grad()
    def end(self) -> None:
        """Takes the mixed product with the solution, and leaves `flat_grads` and `numbers`."""
        params, derivatives = self._params, self._derivatives
        solution, of_solve = self.solve.end()
        mixed = derivatives.mixed(in_dtypes_of(derivatives.params, solution), params.active_outer)
        self._takes_part = [any(term is not None for term in terms) for terms in (self._direct, mixed)]
        active = [difference(*terms) for terms in zip(params.active_outer, self._direct, mixed, strict=True)]
        grads = zeros_for_none(spread(active, [phi.requires_grad for phi in params.outer]), params.outer)
        self.flat_grads = [
            torch.cat([grad.reshape(-1) for grad in grads if grad.dtype == dtype]) for dtype in self._dtypes
        ]
        at_kink = [(w == 0).any() for w in derivatives.kinked if any(w is own for own in params.active_inner)]
        like = of_solve.new_zeros(())
        given = [[term for term in terms if term is not None] for terms in (self._direct, solution, mixed, active)]
        own = torch.stack(
            [
                *(largest_entry(tensors) if tensors else like for tensors in given),
                torch.stack(at_kink).any().double() if at_kink else like,
                *overlap(self._rhs, solution).double(),
            ]
        )
        self.numbers = torch.cat([own, of_solve])
        # The graph is done with, and with it the nodes that would tie the parameters to this stream.
        self._product.forget()
        del self._derivatives, self._product, self._direct

    def grads_of(self, flat_grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Views of `flat_grads`, or of copies of them, like the outer parameters."""
        of_dtype = {}
        for dtype, flat in zip(self._dtypes, flat_grads, strict=True):
            sizes = [phi.numel() for phi in self._params.outer if phi.dtype == dtype]
            of_dtype[dtype] = iter(flat.split_with_sizes(sizes))
        return tuple(next(of_dtype[phi.dtype]).view(phi.shape) for phi in self._params.outer)

    def outcome(
        self, numbers: Floats, steps: int, solver: Solver, state: SolverState
    ) -> tuple[SolveStats, bool, str | None]:
        """What `hypergradient` says of a call that left these `numbers` on the host, after so many steps: the stats,
        `direct_only`, and the problem to warn of, a key of the texts in `advice`.

        Raises:
            NotFiniteError: see `hypergradient`.
        """
        own, of_solve = numbers[:_NUMBERS].tolist(), numbers[_NUMBERS:]
        self._check_finite(own, of_solve, steps)
        stats = self.solve.stats(of_solve, steps)
        unknown = math.isnan(stats.residual) and stats.stop_reason is StopReason.STEPS
        direct_only = not unknown and not stats.residual < 1 and not own[_SOLUTION]
        if direct_only and self.solve.has_no_curvature(of_solve):
            problem: str | None = "no curvature"
        else:
            problem = problem_of_stats(solver, stats, direct_only)
        if own[_AT_KINK] and not direct_only:
            problem = "kink"
        problem = missing_dependence(*self._takes_part) or problem
        if problem is None and may_be_identity(solver, stats, state):
            problem = identity_of(own[_OVERLAP:])
        return stats, direct_only, problem

    def _check_finite(self, own: Sequence[float], of_solve: Floats, steps: int) -> None:
        direct, solution, mixed, grads = own[: _GRADS + 1]
        if not math.isfinite(of_rhs := self.solve.largest_of_rhs(of_solve)):
            raise _error("The gradients of outer_loss in inner_params", of_rhs)
        if self.solve.stats(of_solve, steps).stop_reason is StopReason.NOT_FINITE:
            raise not_finite("The second derivatives of inner_loss in inner_params", "NaN or inf")
        for what, largest in (
            ("The gradients of outer_loss in outer_params", direct),
            ("The solver's solutions", solution),
            ("The mixed second derivatives of inner_loss, in inner_params and outer_params,", mixed),
            ("The hypergradients", grads),
        ):
            if not math.isfinite(grads) and not math.isfinite(largest):
                raise _error(what, largest)


class _Product:
    """Products with second derivatives, by a pass of our own, or by autograd's engine. A solve may keep this for longer
    than the graph should live: `forget` lets that go."""

    def __init__(self, derivatives: Hessian, planned: SingleBackward | None) -> None:
        self._derivatives, self._pass = derivatives, planned

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        given = in_dtypes_of(self._derivatives.params, vectors)
        if self._pass is not None:
            return in_widest_dtype(zeros_for_none(in_own_task(partial(self._pass, given)), given))
        with engine_only():
            return in_widest_dtype(self._derivatives(given))

    def forget(self) -> None:
        del self._derivatives, self._pass


def _error(what: str, largest: float) -> Exception:
    return not_finite(what, "NaN" if math.isnan(largest) else "inf")


def _may_pass(derivatives: Hessian) -> bool:
    """Autocast changes the dtypes of the engine's operations, and not of ours; a GradScaler's scale is taken out of the
    gradients after the graph."""
    is_scaled = len(_outputs(derivatives)) < len(derivatives.params)
    return not (is_scaled or is_engine_only() or torch.is_autocast_enabled(derivatives.params[0].device.type))


def _outputs(derivatives: Hessian) -> list[Tensor]:
    """The gradients that have a graph."""
    return [grad for grad in derivatives.gradient if grad is not None and grad.requires_grad]


def _agrees(planned: SingleBackward, derivatives: Hessian) -> bool:
    """Whether the pass finds what the engine finds, up to rounding, for a vector of random signs, and no hook computes
    with gradients. Whatever goes wrong in a pass of ours is a reason to ask the engine, which then answers, or raises
    its own error."""
    outputs = _outputs(derivatives)
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(2, w.shape, generator=generator, device="cpu").to(w) * 2 - 1 for w in derivatives.params]
    with HookDetector(planned.nodes) as hooks:
        expected = zeros_for_none(run_engine(outputs, derivatives.params, signs), signs)
    if hooks.found:
        return False
    try:
        found = zeros_for_none(in_own_task(partial(planned, signs)), signs)
    except Exception:
        return False
    return agree(found, expected, max(rounding_of_pass(planned, w) for w in derivatives.params))
