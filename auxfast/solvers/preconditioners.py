"""Preconditioners: what one is, how solves of a slowly changing system share one, and Jacobi's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from auxfast.solvers.base import SolverState, as_written, check_seed, check_steps
from auxfast.solvers.linear_system import LinearSystem

Apply = Callable[[Tensor], Tensor]
"""Rows (k, n) -> new rows (k, n): multiplies each by one fixed symmetric positive definite matrix near
`(H + damping I)^-1`."""


class Preconditioner(Protocol):
    """A setting that makes an approximate inverse for each system; `ConjugateGradient`, `MINRES` and `Chebyshev` take
    one. It changes how many products a solve needs, and neither the solution nor what its residual says.

    It need not inherit from this class. One with a `refresh` above 1 is compared by value, as a frozen dataclass is:
    what it has built is used again where an equal one is given.
    """

    @property
    def refresh(self) -> int:
        """How many solves one `build` serves, at least 1, where the solver is given a `SolverState`."""
        ...

    def build(self, system: LinearSystem) -> Apply | None:
        """The function that multiplies rows (k, n) by a symmetric positive definite matrix near
        `(H + damping I)^-1`; None: solve without, as where the products are not finite.

        Args:
            system: `system.product(rows)` multiplies rows (m, n), for any m, by `H + damping I`, and counts in the
                stats; `system.rhs` (k, n) has the dtype and the device of all rows; `system.damping`,
                `system.shapes` (those of the parameters, whose entries are the columns, in order) and `system.params`.
        """
        ...


def check_preconditioner(given: object) -> None:
    """Raises TypeError where this is neither None nor a preconditioner, and says what would be."""
    if isinstance(given, type) and hasattr(given, "build"):
        raise TypeError(f"preconditioner must be a preconditioner and not its class: write {as_written(given)}")
    if given is not None and not (callable(getattr(given, "build", None)) and hasattr(given, "refresh")):
        what = repr(given)
        if isinstance(given, torch.optim.Optimizer):
            what = "the optimizer itself: take FromOptimizer(optimizer)"
        elif callable(given):
            what = f"{given!r}: take InverseOperator(function)"
        raise TypeError(f"preconditioner must be None or a preconditioner, such as Jacobi(), not {what}")


def prepare(preconditioner: Preconditioner | None, system: LinearSystem, state: SolverState | None) -> Apply | None:
    """The result of `preconditioner.build(system)`, or that of an earlier solve in `state` as long as it fits.

    It fits if it was built with equal settings and damping, for rows of the same size, dtype and device, fewer than
    `preconditioner.refresh` solves ago. The products of a build count in `system.matvecs`. None: solve without.
    """
    if preconditioner is None:
        return None
    if state is None or preconditioner.refresh == 1:  # none is held that no later solve can use
        return preconditioner.build(system)
    key = (preconditioner, system.damping, system.rhs.shape[1], system.rhs.dtype, system.rhs.device)
    if system.space.all(state.preconditioner is not None and state.preconditioner[0] == key):
        state.preconditioner_age += 1
        if state.preconditioner_age < preconditioner.refresh:
            held: Apply = state.preconditioner[1]
            return held
    built = preconditioner.build(system)
    state.preconditioner = None if built is None else (key, built)
    state.preconditioner_age = 0
    return built


@dataclass(frozen=True)
class Diagonal:
    """Multiplies rows by the diagonal `inverse` (n,)."""

    inverse: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """(k, n) -> (k, n)"""
        return self.inverse * rows


@dataclass(frozen=True)
class Jacobi:
    """The inverse of the diagonal of `H + damping I`, for parameters of very different curvature.

    The diagonal of H is the one given; else exact, of n unit vectors, if that is at most `probes` products; else
    Hutchinson's estimate, the mean of `z * H z` over `probes` random sign vectors z. An entry is taken by its modulus,
    and not below the standard error of its estimate; those that rounding alone could have made are set to the least of
    the others. Of few probes the estimate is noisy, which costs steps where the curvatures do not differ much.

    Args:
        diagonal: of H, one tensor per parameter, of its shape; read anew for each solve. None: from products.
        probes: products at most, at least 1.
        seed: of a private random generator.
        refresh: how many solves one estimate serves, at least 1.

    Raises:
        ValueError: a setting outside its range.
    """

    diagonal: Sequence[Tensor] | None = field(default=None, compare=False)  # tensors do not compare to one bool
    probes: int = 8
    seed: int = 0
    refresh: int = 10

    def __post_init__(self) -> None:
        check_steps("probes", self.probes)
        check_seed(self.seed)
        check_steps("refresh", self.refresh)
        if self.diagonal is not None:
            object.__setattr__(self, "refresh", 1)  # costs no products, and the user may have changed it

    def build(self, system: LinearSystem) -> Apply | None:
        """See `Preconditioner.build`; `min(n, probes)` products, none if the diagonal is given.

        Raises:
            ValueError: `diagonal` does not have the shapes of the parameters, or is not finite.
        """
        if self.diagonal is not None:
            diagonal = self._given(system)
            error = torch.zeros_like(diagonal)
        else:
            diagonal, error = self._estimate(system)
        if not system.space.are_finite(diagonal[None]).all():
            return None
        modulus = torch.maximum(diagonal.abs(), error)

        def largest(values: Tensor) -> Tensor:
            return system.space.max(torch.cat([values, values.new_full((1,), -math.inf)]).max())  # a piece may be empty

        certain = modulus > torch.finfo(system.rhs.dtype).eps * largest(modulus)
        least = -largest(torch.where(certain, -modulus, -math.inf))
        least = torch.where(least.isfinite(), least, 1)  # H is 0 if it is not
        inverse = torch.where(certain, modulus, least).reciprocal()
        return Diagonal(inverse.to(system.rhs.dtype))

    def _given(self, system: LinearSystem) -> Tensor:
        """The diagonal (n,) of `H + damping I`, from the one that was given."""
        assert self.diagonal is not None
        given, wanted = [tuple(t.shape) for t in self.diagonal], [tuple(shape) for shape in system.shapes]
        if given != wanted:
            raise ValueError(f"diagonal must have the shapes of the parameters, {wanted}, got {given}")
        diagonal = torch.cat([tensor.detach().reshape(-1) for tensor in self.diagonal]).to(system.rhs)
        if not system.space.are_finite(diagonal[None]).all():
            raise ValueError("diagonal is not finite")
        return diagonal + system.damping

    def _estimate(self, system: LinearSystem) -> tuple[Tensor, Tensor]:
        """The diagonal (n,) of `H + damping I`, and its standard error (n,)."""
        size, device = system.rhs.shape[1], system.rhs.device
        dtype = torch.promote_types(system.rhs.dtype, torch.float32)
        if system.space.is_whole and size <= self.probes:
            diagonal = system.product(torch.eye(size, dtype=system.rhs.dtype, device=device)).diagonal().to(dtype)
            return diagonal, torch.zeros_like(diagonal)
        generator = private_generator(device, (self.seed + system.space.piece) % 2**64)  # each has signs of its own
        coins = torch.randint(2, (self.probes, size), generator=generator, device=device)
        signs = (2 * coins - 1).to(system.rhs.dtype)  # (probes, n)
        samples = (signs * system.product(signs)).to(dtype)
        mean = samples.mean(dim=0)
        return mean, (samples - mean).square().sum(dim=0).sqrt() / math.sqrt(self.probes * max(self.probes - 1, 1))


def private_generator(device: torch.device, seed: int) -> torch.Generator:
    """A generator of its own, which leaves the global random state as it is."""
    return torch.Generator(device).manual_seed(seed)
