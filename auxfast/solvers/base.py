"""The interface of all solvers: what they are given, what they return, and the checks of their settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Matvec = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""`v -> H v`, one tensor per parameter. It must not keep `v`, which the solver goes on to change. A `LinearOperator` is
one that also has batched products; without them a solver multiplies one vector after the other."""


@runtime_checkable
class LinearOperator(Protocol):
    """A square matrix H, known by its products.

    Four attributes, here and of any `Matvec`, may say more of it, and need not be there:

    - `symmetric`, a bool: whether H is its own transpose. Without it, it is. `GMRES`, `NormalEquations`, `Dense` and
      `Identity` take other matrices too; the other solvers refuse them.
    - `transposed`, a method or a `Matvec`: `v -> H^T v`, which `NormalEquations` needs where H is not symmetric. A
      `LinearOperator` there multiplies several vectors at once, too.
    - `exact = True`: all products are those of one matrix, up to rounding: nothing in them is random, estimated or
      computed anew from something that may have changed. A solver may then know a residual from a recurrence, without
      a product of its own.
    - `space`, an `auxfast.solvers.space.VectorSpace`: how processes that solve the system together form dot products,
      and agree on the numbers that they decide from. Without it, one process solves alone.
    """

    def __call__(self, vectors: Sequence[Tensor], /) -> Sequence[Tensor]:
        """`H v`, one tensor per parameter."""
        ...

    def batched(self, vectors: Sequence[Tensor], /) -> Sequence[Tensor]:
        """`H v` for k vectors: each tensor has one more axis of size k in front, in `vectors` and in the result."""
        ...


def batched_matvec(matvec: Matvec) -> Matvec:
    """Products with k vectors, see `LinearOperator.batched`, one after the other where `matvec` has no others."""
    return matvec.batched if isinstance(matvec, LinearOperator) else partial(_one_after_the_other, matvec)


def _one_after_the_other(matvec: Matvec, vectors: Sequence[Tensor]) -> list[Tensor]:
    products = [[t.detach() for t in matvec(list(vector))] for vector in zip(*vectors, strict=True)]
    return [torch.stack(tensors) for tensors in zip(*products, strict=True)]


class StopReason(str, Enum):
    """Why a solve stopped. Each member equals its text, and `advice` says what to do about it."""

    advice: str

    CONVERGED = "converged"
    """The residual is within the tolerance."""
    STEPS = (
        "steps",
        "The hypergradient's linear system is not solved to the solver's tol: see stats.residual. Allow more "
        "steps (MINRES() takes up to 100), add damping or a preconditioner, or set a larger tol; tol=None says that "
        "the number of steps is meant.",
    )
    """The allowed number of steps is done."""
    NEGATIVE_CURVATURE = (
        "negative curvature",
        "The inner loss curves downwards in some direction: the inner parameters are not at a minimum, and the "
        "hypergradient is that of a stationary point nearby. Train them further, add damping to the solver, or take "
        "curvature='gauss-newton' (with outputs=), which has no negative curvature.",
    )
    """A direction of negative curvature ended the method."""
    DIVERGED = (
        "diverged",
        "The solve of the hypergradient's linear system diverged, and the best solution on the way was taken (with "
        "certify=False: the whole sum). A fixed step_size must be below 2 / (largest eigenvalue of the inner Hessian): "
        "take a smaller one, step_size='auto', or MINRES(). See stats.",
    )
    """The residual grew, and the best solution that was seen is returned."""
    STAGNATED = (
        "stagnated",
        "The residual cannot be made smaller in this precision: the inner Hessian is singular, or nearly so. Add "
        "damping to the solver, or take parameters of float64; GMRES may lack a larger restart.",
    )
    """The residual cannot be made smaller in this precision."""
    NOT_FINITE = (
        "not finite",
        "The products with the inner Hessian hold NaN or inf, so no linear system can be solved: the inner loss, its "
        "gradient or its second derivatives are not finite at these parameters and data, or overflow in their dtype.",
    )
    """Not even the first product was finite."""
    NOT_SYMMETRIC = (
        "not symmetric",
        "The second derivatives are not those of a loss: some backward pass is not the derivative of its forward pass "
        "(gradient reversal, a straight-through estimator, a detach() within the loss, a hook that changes a "
        "gradient), and the hypergradient is not to be trusted. See stats.symmetry_error.",
    )
    """Products contradict each other, or the gradient, by more than rounding."""
    INEXACT = (
        "inexact",
        "The products by finite differences have a larger error than the solver's tol: see "
        "stats.operator_error. Take parameters of float64, give those of very different sizes similar ones, "
        "replace what has kinks (ReLU by GELU or softplus), or take curvature='hessian' where there are second "
        "derivatives.",
    )
    """The products have a larger error than the tolerance and the residual."""
    TRIVIAL = "trivial"
    """The right-hand side is zero, and so is the exact solution."""

    def __new__(cls, text: str, advice: str = "") -> StopReason:
        member = str.__new__(cls, text)
        member._value_ = text
        member.advice = advice
        return member

    @classmethod
    def _missing_(cls, value: object) -> StopReason:
        raise ValueError(f"stop_reason must be one of {', '.join(cls)}, not {value!r}")

    def __str__(self) -> str:
        return str.__str__(self)

    def __repr__(self) -> str:
        return str.__repr__(self)


@dataclass(frozen=True)
class SolveStats:
    """How a solve of `(H + damping I) x = b` went.

    Attributes:
        iterations: steps of the method.
        matvecs: Hessian-vector products spent, those for eigenvalues, preconditioners and the certificate included. A
            batched product counts once for each of its vectors.
        residual: `||b - (H + damping I) x|| / ||b||` over all tensors together, of the x that is returned, rounded to
            its dtype; true to the rounding of the products, and not estimated; the largest of `residuals`. 0 is exact,
            and 1 is what `x = 0` has. NaN where it is not known: `Neumann(certify=False)`, `OneStep`, `SAMA`.
            `GradientFlow` solves no linear system: there it is an estimate of the relative error of what it computes.
        converged: whether the residual is within the solver's tolerance; where that is `None`, whether it is 0. False
            where it is not known, or where H is not symmetric.
        stop_reason: a `StopReason`; a text that equals one becomes it. `converged`; `steps`: the allowed number is
            done; `negative curvature`; `diverged`: the residual grew, and what is returned is the best that was seen;
            `stagnated`: the residual cannot be made smaller in this precision; `not finite`: not even the product with
            `b` was, and x = 0 is returned; `not symmetric`: see `symmetry_error`; `inexact`: see `operator_error`;
            `trivial`: `b` is zero, and so is the exact solution. With several right-hand sides it is the reason of the
            worst; they share an H that is not symmetric.
        step_size: the step size that was used; `None` where the method has none.
        largest_eigenvalue: an estimate from below of the largest eigenvalue of H, where the solver makes one.
        negative_curvature: whether a direction with `v . (H + damping I) v < 0` was met: the inner parameters are not
            at a minimum.
        residuals: the relative residual of each right-hand side.
        residual_from: what `residual` was computed from: `product`, one with the solution; or `recurrence`, that of the
            method, of products with other vectors. This is so only where a bound of their difference is at most 3% of
            the residual or of the tolerance, and the bound is added (in quadrature) to what is reported. `None` where
            `residual` is NaN.
        symmetry_error: `|<v, H w> - <w, H v>|` for unit vectors v and w whose products the solver has, relative to the
            largest product that it has seen (`Dense`, `Nystrom`: by Frobenius norms, of all their products); `None`
            where it has no two products that tell. Rounding alone makes it some machine epsilons, more where the
            products are little but rounding. Where it is above the square root of epsilon, products that such solves
            spend tell whether that is rounding; if not, the reason is `not symmetric`. `hypergradient` compares with
            a difference of gradients too, where losses are functions, and the larger figure stands here.
        operator_error: an estimate of the relative error of the products themselves, where they are not exact
            (`curvature="finite-difference"`); `None` where they are.
    """

    iterations: int
    matvecs: int
    residual: float
    converged: bool
    stop_reason: StopReason
    step_size: float | None = None
    largest_eigenvalue: float | None = None
    negative_curvature: bool = False
    residuals: tuple[float, ...] = ()
    residual_from: Literal["product", "recurrence"] | None = "product"
    symmetry_error: float | None = None
    operator_error: float | None = None

    def __post_init__(self) -> None:
        if type(self.stop_reason) is not StopReason:
            object.__setattr__(self, "stop_reason", StopReason(self.stop_reason))
        if math.isnan(self.residual):
            object.__setattr__(self, "residual_from", None)


@dataclass
class SolverState:
    """What a solve learns and the next one of a slowly changing system may reuse; the solver reads and updates it.

    Give every bilevel problem its own, as `HyperOptimizer` does. What it holds can be saved by `torch.save` and loaded
    by `torch.load`, if the preconditioner is one of auxfast's.

    Attributes:
        solution: the last solution, if the solver has `warm_start`.
        largest_eigenvalue: the largest eigenvalue of H (of its product with the preconditioner, if there is one).
        smallest_eigenvalue: the smallest one.
        preconditioner: what `preconditioner.build` made last, with the settings that it was made for.
        preconditioner_age: how many solves ago that was.
        blocks: into how many independent problems `BlockDiagonal` has found H to fall.
        symmetry_error: what the first `hypergradient` with functions for losses found; see `SolveStats`.
        warned: the kinds of warnings that `hypergradient` has given.
    """

    solution: list[Tensor] | None = None
    largest_eigenvalue: float | None = None
    smallest_eigenvalue: float | None = None
    preconditioner: Any = None
    preconditioner_age: int = 0
    blocks: int | None = None
    symmetry_error: float | None = None
    warned: set[str] = field(default_factory=set)

    def summary(self) -> str:
        """What of it decides how many products a solve takes: for ranks that must take as many to compare."""
        numbers = self.largest_eigenvalue, self.smallest_eigenvalue, self.blocks, self.symmetry_error
        return (
            f"{'no ' if self.solution is None else ''}solution, eigenvalues, blocks and symmetry_error {numbers}, "
            f"{type(self.preconditioner).__name__} of age {self.preconditioner_age}"
        )


class Solver(Protocol):
    """A setting of a method, reusable and without state of its own."""

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `(H + damping I) x = rhs`, which stays as it is.

        Args:
            matvec: the matrix H, symmetric unless it says otherwise; see `Matvec` and `LinearOperator`.
            rhs: tensors of one floating dtype on one device.
            batched: the tensors of `rhs` have one more axis in front, one entry for each of several right-hand sides.
            state: what earlier solves of similar systems learnt; updated.

        Returns:
            The solution, with the shapes and the dtype of `rhs` and no graph; and how it went.
        """
        ...


def check_solver(solver: object, name: str = "solver") -> None:
    """Raises TypeError where `solver` is none, and says what would be."""
    if isinstance(solver, type) and hasattr(solver, "solve"):
        raise TypeError(f"{name} must be a solver and not its class: write {as_written(solver)}")
    if not callable(getattr(solver, "solve", None)):
        raise TypeError(f"{name} must be a solver, such as auxfast.solvers.MINRES(), not {solver!r}")


def as_written(setting: type) -> str:
    """How an instance of the class is written: `MINRES()`; `OneStep(...)`, which has an argument without a default."""
    needed = any(p.default is p.empty for p in inspect.signature(setting).parameters.values())
    return f"{setting.__name__}({'...' if needed else ''})"


def is_symmetric(matvec: Matvec) -> bool:
    """Whether the operator does not say that it is not; see `LinearOperator`."""
    return bool(getattr(matvec, "symmetric", True))


def refuse_not_symmetric(solver: Solver, matvec: Matvec) -> None:
    """Raises ValueError where the operator says that it is not symmetric, for a `solver` that is right for no other."""
    if not is_symmetric(matvec):
        raise ValueError(
            f"the matrix is not symmetric (a Jacobian of implicit_root, or an operator with symmetric = False), and "
            f"{type(solver).__name__} solves symmetric systems alone: take GMRES(), NormalEquations() or, for few "
            "parameters, Dense()"
        )


def checked_solve(
    solver: Solver, matvec: Matvec, rhs: Sequence[Tensor], state: SolverState | None, batched: bool = False
) -> tuple[Sequence[Tensor], SolveStats]:
    """What `solver.solve` returns.

    Raises:
        TypeError: a solver of one's own returns something else than a solution like `rhs` and SolveStats.
    """
    result: Any = solver.solve(matvec, rhs, batched=batched, state=state)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise _wrong_result(solver, f"{result!r:.60}")
    solution, stats = result
    if not isinstance(stats, SolveStats):
        raise _wrong_result(solver, f"{stats!r:.60} for the stats")
    if not isinstance(solution, (tuple, list)) or len(solution) != len(rhs):
        count = f"{len(solution)} tensors" if isinstance(solution, (tuple, list)) else f"a {type(solution).__name__}"
        raise _wrong_result(solver, f"{count} for the solution, of {len(rhs)} tensors")
    for i, (x, b) in enumerate(zip(solution, rhs, strict=True)):
        if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device) != (b.shape, b.dtype, b.device):
            given, wanted = (
                f"{t.dtype} {tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else f"{t!r:.60}" for t in (x, b)
            )
            raise _wrong_result(solver, f"{given} for tensor {i} of the solution, of {wanted}")
    return solution, stats


def _wrong_result(solver: Solver, given: str) -> TypeError:
    name = type(solver).__name__
    return TypeError(f"{name}.solve must return (solution, SolveStats), the solution a list like rhs; it gave {given}")


def are_alike(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether they agree in shapes, dtypes and devices, one by one."""
    kinds, wanted = ([(t.shape, t.dtype, t.device) for t in each] for each in (tensors, others))
    return kinds == wanted


RHS_NOT_FINITE = "rhs is not finite: the gradient of the outer loss holds an inf or NaN"
TRIVIAL = SolveStats(iterations=0, matvecs=0, residual=0.0, converged=True, stop_reason=StopReason.TRIVIAL)
NOT_FINITE = SolveStats(iterations=0, matvecs=0, residual=math.inf, converged=False, stop_reason=StopReason.NOT_FINITE)


def check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, not {value!r}")


def check_steps(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")


def check_damping(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"damping must be a finite number of at least 0, not {value!r}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


def check_seed(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {value!r}")


def check_tol(value: float | None) -> None:
    if value is not None:
        check_positive("tol", value)
        if value >= 1:
            raise ValueError(f"tol must be below 1, the relative residual of x = 0, not {value!r}")
