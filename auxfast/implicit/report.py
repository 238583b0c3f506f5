"""What a check of the hypergradient found, and its verdict in one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from auxfast.solvers import SolveStats

RIGHT = 0.05
"""Largest relative error of what is called right."""
_TRUSTED = 0.1
"""Largest estimated relative error of finite differences that are taken for the truth."""
_SYMMETRIC, _SYMMETRIC_DIFFERENCES = 1e-3, 0.05
"""Largest symmetry error of what is called symmetric, of recorded second derivatives, in which rounding makes 1e-6 in
float32, and of differences."""
_RECORDED = 0.01
"""Largest relative error, beyond that of the difference quotient, of second derivatives that are called right."""
_SMOOTH = 3
"""Largest `gradient_change` of what is called smooth."""
_SAME_DIRECTION, _WRONG_DIRECTION = 0.95, 0.5
"""Least cosine of what is called the same direction, and of what is not called a wrong one."""


@dataclass(frozen=True)
class Agreement:
    """How near one gradient is to another that is held for true."""

    cosine: float
    """Cosine of the angle between them; 1 is the same direction. NaN if one of them is zero."""
    relative_error: float
    """`||gradient - truth|| / ||truth||`; 0 if both are zero."""

    @staticmethod
    def of(gradient: Tensor, truth: Tensor) -> Agreement:
        """gradient, truth: (n,)"""
        norms = float(gradient.norm()) * float(truth.norm())
        error = float((gradient - truth).norm())
        scale = float(truth.norm())
        return Agreement(
            cosine=float(gradient @ truth) / norms if norms else math.nan,
            relative_error=error / scale if scale else (math.inf if error else 0.0),
        )

    def __str__(self) -> str:
        return f"cosine {self.cosine:.6f}, relative error {self.relative_error:.2e}"


@dataclass(frozen=True)
class Unrolled:
    """Derivatives of the outer loss after some steps of an inner optimizer, of what training really does."""

    derivatives: Tensor
    """(m,)"""
    steps: int
    optimizer: str
    """Name of its class."""


@dataclass(frozen=True)
class HypergradientReport:
    """What `verify_hypergradient` found; `print` it for a reading, which ends with `verdict`.

    Derivatives are along `directions` of the outer parameters, all flattened behind one another in their order.
    """

    directions: Tensor
    """(m, n): unit vectors; the coordinate axes if there are few outer parameters, else random and orthogonal."""
    hypergradient: Tensor
    """(m,): the solver's hypergradient at the given inner parameters; NaN if it is not finite."""
    dense: Tensor | None
    """(m,): the hypergradient with an exact solve at the same parameters; `None` if the system was too large or not
    finite."""
    finite_differences: Tensor
    """(m,): differences of the outer loss, with the inner problem solved anew on both sides."""
    finite_difference_error: float
    """An estimate of their relative error, from what was left of the inner gradient and from rounding."""
    at_minimum: Tensor | None
    """(m,): the solver's hypergradient where the inner problem was solved anew at the given outer parameters; `None`
    if the one at the given inner parameters agrees with the finite differences."""
    curvature: str
    """Curvature that was verified, as given to `verify_hypergradient`."""
    stats: SolveStats
    """Statistics of the linear solve."""
    inner_gradient_norm: float
    """Norm of the inner gradient at the given parameters, over the free entries. The implicit function theorem assumes
    0."""
    resolved_gradient_norm: float
    """Largest norm of the inner gradient where the inner problem was solved anew. It limits how far the finite
    differences can be trusted."""
    symmetry_error: float
    """`||H - H^T|| / ||H||` (about: from random vectors) of the inner Hessian, recorded or (with
    `curvature="finite-difference"`) from differences: large where some backward pass is not the derivative of its
    forward pass."""
    recorded_error: float | None
    """Distance of the recorded `H v` to a central difference of the inner gradient along v, for the solution and a
    random vector, relative, less three times the difference's own estimated error. `None` where there is nothing to
    compare: with `curvature="finite-difference"`, or at kinks across several entries."""
    held: int
    """Number of free inner entries that look held: at a kink with both sides of the inner loss pushing back, or left in
    place by `solve_inner` against an inner gradient, as at a bound."""
    oblique: int
    """Number of free inner entries in which the inner gradient jumps, if at a kink that no mask describes."""
    suggested_free: tuple[Tensor | None, ...] | None
    """Masks without the entries that look held, to be passed as `free`; `None` if there are none."""
    gradient_change: float
    """Change of the inner gradient over a step of 1e-4 of the parameters' size, in a random direction, relative to what
    the second derivatives say of it: far above 1 where kinks are near."""
    inner_entries: int
    """Number of the inner parameters' entries that were free."""
    unrolled: Unrolled | None = None
    """Derivatives, along the same directions, of the outer loss after steps of training from the inner parameters as
    given; `None` where none were asked for."""

    @property
    def solver(self) -> Agreement | None:
        """The solver's hypergradient against the dense solve: is the linear system solved?"""
        return None if self.dense is None else Agreement.of(self.hypergradient, self.dense)

    @property
    def total(self) -> Agreement:
        """The solver's hypergradient against the finite differences: is it the derivative of what training does?"""
        return Agreement.of(self.hypergradient, self.finite_differences)

    @property
    def training(self) -> Agreement | None:
        """The solver's hypergradient against the steps of training: does the inner problem converge in so many?"""
        return None if self.unrolled is None else Agreement.of(self.hypergradient, self.unrolled.derivatives)

    @property
    def verdict(self) -> str:
        """Whether the hypergradient is right, by how much it is off, and the first reason that the numbers show; and
        how it compares with steps of training, if any were asked for."""
        return self._of_the_minimum() + self._of_training()

    def _of_training(self) -> str:
        if self.unrolled is None or self.training is None or not bool(self.hypergradient.isfinite().all()):
            return ""
        name = f"{self.unrolled.steps} step{'s' if self.unrolled.steps > 1 else ''} of {self.unrolled.optimizer}"
        if self.training.relative_error <= RIGHT:
            return f"; {_percent(self.training.relative_error)} off the derivative of {name}"
        if not bool(self.unrolled.derivatives.isfinite().all()):
            return f"; the derivative of {name} is not finite: training diverges"
        return f"; against the derivative of {name}, {self._size(self.unrolled.derivatives, self.training)}"

    def _of_the_minimum(self) -> str:
        total, fault = self.total, self._fault()
        if not bool(self.hypergradient.isfinite().all()):
            return f"not finite: {fault or 'a loss has NaN or infinite derivatives at these parameters'}"
        if not bool(self.hypergradient.any()) and not bool(self.finite_differences.any()):
            return "zero, and so are the finite differences: do outer_params play a part in the losses?"
        if total.relative_error <= RIGHT and self.finite_difference_error <= 1:
            right = f"right: {_percent(total.relative_error)} off the finite differences"
            return f"{right}, but {fault}" if fault else right
        if not self.finite_difference_error <= _TRUSTED:
            return fault or self._why_not_trusted()
        return f"{self._size(self.finite_differences, total)}: {fault or self._other_cause()}"

    def _fault(self) -> str | None:
        """What is wrong, by numbers that do not need the finite differences of the outer loss. An error of NaN tells
        nothing."""
        by_differences = self.curvature == "finite-difference"
        if self.symmetry_error > (_SYMMETRIC_DIFFERENCES if by_differences else _SYMMETRIC):
            return (
                f"not symmetric: the inner Hessian differs from its transpose by {_percent(self.symmetry_error)}: some "
                "backward pass is not the derivative of its forward pass (gradient reversal, a straight-through "
                "estimator, a hook)"
            )
        if self.held and self.held == self.inner_entries:
            return "kinks: all inner entries stay at a kink or a bound: what acts is the direct gradient alone"
        if self.held:
            return (
                f"kinks: {self.held} of {self.inner_entries} inner entries stay at a kink or a bound and must be held "
                "fixed: pass free=report.suggested_free"
            )
        if self.oblique:
            return (
                f"kinks: the inner gradient jumps in {self.oblique} of {self.inner_entries} entries at once, which no "
                "mask describes: smooth the inner loss (softplus for ReLU, a squared hinge)"
            )
        if self.recorded_error is not None and self.recorded_error > _RECORDED:
            return (
                f"the recorded second derivatives are {_percent(self.recorded_error)} off those of the inner gradient: "
                "a detach() that cuts the graph, or a backward pass that is not the derivative of its forward pass "
                "(gradient reversal, a straight-through estimator, a saved value without its graph); in float32 it may "
                "be rounding alone: repeat it in float64"
            )
        if self.solver is None:
            unsolved, error = not self.stats.residual <= RIGHT, ""
        else:
            unsolved = not self.solver.relative_error <= RIGHT
            error = f", {_percent(self.solver.relative_error)} off the dense solve"
        residual = "not known" if math.isnan(self.stats.residual) else f"{self.stats.residual:.2g}"
        return f"the linear system is not solved: residual {residual}{error}" if unsolved else None

    def _why_not_trusted(self) -> str:
        start = "finite differences cannot be trusted"
        if not math.isfinite(self.resolved_gradient_norm) or not bool(self.finite_differences.isfinite().all()):
            return f"{start}: a loss or the inner gradient is not finite where the inner problem was solved anew"
        if not bool(self.finite_differences.any()):
            return f"{start}: they are zero: does solve_inner change inner_params?"
        if self.gradient_change > _SMOOTH:
            return (
                f"{start}: the inner gradient changes {self.gradient_change:.3g} times as fast as its second "
                "derivatives say, so kinks (ReLU, L1) are near and keep the inner problem from being solved: smooth "
                "the inner loss, or hold by free what is at a kink"
            )
        return (
            f"{start}: their estimated error is {_percent(self.finite_difference_error)}, with an inner gradient of "
            f"norm {self.resolved_gradient_norm:.2g} where solved anew: pass a solve_inner that goes nearer to the "
            "minimum, parameters of float64, or a larger step"
        )

    def _size(self, truth: Tensor, agreement: Agreement) -> str:
        norm, true_norm, cosine = float(self.hypergradient.norm()), float(truth.norm()), agreement.cosine
        if not norm:
            return "zero, where the finite differences are not"
        if not true_norm:
            return "not zero, where the finite differences are"
        if cosine < _SAME_DIRECTION:
            opposite, wrong = cosine < -_SAME_DIRECTION, cosine < _WRONG_DIRECTION
            return f"direction {'opposite' if opposite else 'wrong' if wrong else 'off'} (cosine {cosine:.2f})"
        ratio = norm / true_norm
        times, how = (ratio, "large") if ratio > 1 else (1 / ratio, "small")
        if times < 1 + RIGHT:
            return f"direction and size nearly right, {_percent(agreement.relative_error)} off"
        return f"direction right, size {times:.3g} times too {how}"

    def _other_cause(self) -> str:
        if self.at_minimum is not None:
            there = Agreement.of(self.at_minimum, self.finite_differences).relative_error
            if there <= max(RIGHT, self.total.relative_error / 10):
                return (
                    "the inner parameters are not at a minimum (if that is one within bounds, pass solve_inner or free)"
                )
        if self.curvature != "hessian":
            return f"curvature={self.curvature!r} is too far from the inner Hessian"
        return (
            "the linear system is solved, so a path from outer_params to a loss may be missing (a detach(), a copy), "
            "or the minimum jumps to another"
        )

    def _training_line(self) -> list[str]:
        if self.unrolled is None:
            return []
        steps = f"against {self.unrolled.steps} of {self.unrolled.optimizer}"
        return [f"{steps:<29} {self.training}"]

    def __str__(self) -> str:
        solver = "not done: the system is too large or not finite" if self.solver is None else str(self.solver)
        error = f"estimated error {self.finite_difference_error:.2e}"
        lines = [
            f"against the dense solve       {solver}",
            f"against finite differences    {self.total} ({error})",
            *self._training_line(),
            f"linear system                 residual {self.stats.residual:.2e} after {self.stats.matvecs} "
            f"products, {self.stats.stop_reason}",
            f"norm of the inner gradient    {self.inner_gradient_norm:.2e} as given, "
            f"{self.resolved_gradient_norm:.2e} where solved anew",
        ]
        if self.recorded_error is None:
            recorded = "not compared with differences of the gradient"
        else:
            recorded = f"{self.recorded_error:.2e} off differences of the gradient"
        lines.append(f"second derivatives            symmetric to {self.symmetry_error:.2e}, {recorded}")
        if self.held or self.oblique:
            lines.append(
                f"kinks and bounds              {self.held} of {self.inner_entries} entries look held, "
                f"{self.oblique} are at kinks across several"
            )
        return "\n".join([*lines, f"verdict                       {self.verdict}"])


def _percent(part: float) -> str:
    if part < 1e-4:
        return "less than 0.01%"
    return f"{100 * part:.2g}%" if part < 0.1 else f"{100 * part:.0f}%" if part < 10 else "over 1000%"
