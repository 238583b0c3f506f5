"""Randomised Nystrom approximation of the Hessian: a solver of few products, and a preconditioner."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auxfast.solvers.base import (
    Matvec,
    SolverState,
    SolveStats,
    StopReason,
    check_damping,
    check_seed,
    check_steps,
    check_tol,
    refuse_not_symmetric,
)
from auxfast.solvers.best_iterate import BestIterate
from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.preconditioners import prepare, private_generator
from auxfast.solvers.space import refuse_pieces
from auxfast.solvers.symmetry import may_be_symmetric


@dataclass(frozen=True)
class LowRank:
    """`A = H + damping I` taken for `image diag(values) basis^T` on the span of `basis`, and for `rest I` across it.

    Calling it applies `basis diag(values)^-1 basis^T + rest^-1 (I - basis basis^T)`: symmetric positive definite.

    Attributes:
        basis: (n, r), orthonormal columns.
        image: (n, r), orthonormal columns; `basis` itself where A is positive definite as far as is known.
        values: (r,), above 0, descending.
        rest: above 0.
        inverts_rest: whether a solution has `rest^-1` across the span; else it has 0 there, as a pseudo-inverse.
        largest_eigenvalue: an estimate from below of the largest eigenvalue of H.
        negative_curvature: whether the sketch shows a negative eigenvalue of A.
        symmetry_error, symmetric: see `may_be_symmetric`.
    """

    basis: Tensor
    image: Tensor
    values: Tensor
    rest: float
    inverts_rest: bool
    largest_eigenvalue: float
    negative_curvature: bool
    symmetry_error: float = 0.0
    symmetric: bool = True

    def __call__(self, rows: Tensor) -> Tensor:
        """(k, n) -> (k, n)"""
        within = rows.to(self.basis.dtype) @ self.basis  # (k, r)
        return torch.addmm(rows / self.rest, within * (1 / self.values - 1 / self.rest), self.basis.T).to(rows.dtype)

    def solve(self, rows: Tensor) -> Tensor:
        """(k, n) -> (k, n), the solutions of `A x = rows`: by least squares in the span, if A is indefinite."""
        if self.inverts_rest:
            return self(rows)
        return ((rows.to(self.basis.dtype) @ self.image / self.values) @ self.basis.T).to(rows.dtype)


@dataclass(frozen=True)
class Nystrom:
    """H from its products with `rank` random vectors W, as `(H W) (W^T H W)^-1 (H W)^T`, and so inverted exactly.

    As a **solver** (Hataya & Yamada 2023) it costs `rank` products, and one for the residual of each right-hand side:
    for Hessians of which few eigenvalues matter, and exact from `rank = n` on. As a **preconditioner** (Frangella,
    Tropp & Udell 2023), `ConjugateGradient(preconditioner=Nystrom(20))`, it takes the large eigenvalues out of the
    condition number, and what it misses only costs steps. Given a state, either keeps the sketch for `refresh` solves.

    **Across the sketched eigenvectors** the inverse is `1 / (smallest sketched eigenvalue + damping)`, as in that
    preconditioner. The solver's original has `1 / damping`: the same thing where the sketch holds all of H; elsewhere
    far too large, and infinite without damping. A solution that still has a larger residual than x = 0 is scaled by the
    factor that makes that smallest.

    **Indefinite H.** Where the sketch shows a negative eigenvalue, that formula may divide by almost nothing. `rank`
    more products with an orthonormal basis Q of `H W` give the singular values of `(H + damping I) Q` instead. The
    preconditioner takes them for the moduli of eigenvalues, and stays positive definite; the solver solves in the
    span of Q by least squares. `rank = n` does so without more products, and is exact for these H too.

    Args:
        rank: vectors in the sketch, at least 1; more than n are not taken.
        damping: of the system that `solve` solves; a preconditioner has that of its solver.
        tol: the relative residual to call converged; nothing else depends on it.
        seed: of a private random generator.
        refresh: how many solves one sketch serves, at least 1.

    Raises:
        ValueError: a setting outside its range.
    """

    rank: int = 20
    damping: float = 0.0
    tol: float | None = None
    seed: int = 0
    refresh: int = 10

    def __post_init__(self) -> None:
        check_steps("rank", self.rank)
        check_damping(self.damping)
        check_tol(self.tol)
        check_seed(self.seed)
        check_steps("refresh", self.refresh)

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `(H + damping I) x = rhs` in that approximation; see `Solver.solve`.

        Raises:
            ValueError: `matvec` says that it is not symmetric; or see `LinearSystem`.
            RuntimeError: `matvec` returns other shapes than it was given.
        """
        refuse_not_symmetric(self, matvec)
        system = LinearSystem(matvec, rhs, self.damping, batched)
        best = BestIterate(system, self.tol)
        rows = best.unsolved()
        inverse = prepare(self, system, state) if len(rows) else None
        if not isinstance(inverse, LowRank):
            for row in rows:
                best.stop_reasons[row] = StopReason.DIVERGED
            return best.result(0)
        best.symmetry_error, best.symmetric = inverse.symmetry_error, inverse.symmetric
        _, b = best.current(rows)
        index = torch.from_numpy(rows).to(b.device)
        x = system.rounded(inverse.solve(b), index)
        product = system.product(x)
        dots = system.space.dots
        scale = dots(product, b) / dots(product, product)  # this factor makes the residual smallest
        # Below 0.5, x = 0 would be better than x; below 0, a better solution would point the other way.
        scale = torch.where(scale < 0.5, scale.clamp(min=0), 1).to(x.dtype)[:, None]
        x = scale * x
        exact = system.space.all(torch.equal(system.rounded(x, index), x))
        best.update(rows, x, scale * product if exact else None)
        return best.result(
            0, largest_eigenvalue=inverse.largest_eigenvalue, negative_curvature=inverse.negative_curvature
        )

    def build(self, system: LinearSystem) -> LowRank | None:
        """See `Preconditioner.build`; `rank` products, twice that if H is indefinite and `rank < n`.

        Raises:
            ValueError: this has a damping of its own, other than the solver's.
        """
        if self.damping not in (0, system.damping):
            raise ValueError(
                f"damping must be left to the solver ({system.damping:g}), not given to its preconditioner"
            )
        space = system.space
        refuse_pieces(space, "Nystrom", "take Jacobi() as a preconditioner, or MINRES() as a solver")
        size, dtype = system.rhs.shape[1], torch.promote_types(system.rhs.dtype, torch.float32)
        tests = self._tests(size, system.rhs)  # (m, n), m <= rank, orthonormal rows
        image = system.product(tests).to(dtype)
        tests = tests.to(dtype)
        core = (tests @ image.T).double()  # (m, m)
        if not space.are_finite(core).all():
            return None
        sizes = torch.stack([torch.linalg.vector_norm(t, dtype=core.dtype) for t in (image, core - core.T)])
        norm, asymmetry = space.read(sizes).tolist()
        error = asymmetry / norm if norm else 0.0
        symmetric = may_be_symmetric(system, error, tests, image, core)
        # An eigenvalue of 0 may seem to be as large as this: by rounding; or by finite differences, which are not
        # symmetric.
        noise = max(torch.finfo(system.rhs.dtype).eps * math.sqrt(size) * norm, asymmetry, sys.float_info.min)
        try:
            inverse = self._inverse(system, tests, image, core, noise)
        except RuntimeError:
            if noise < math.sqrt(torch.finfo(dtype).max):
                raise
            return None  # a number has overflowed on the way, and a decomposition does not take it
        return replace(inverse, symmetry_error=error, symmetric=symmetric)

    def _inverse(self, system: LinearSystem, tests: Tensor, image: Tensor, core: Tensor, noise: float) -> LowRank:
        """The inverse from the products `image` (m, n), overwritten, with `tests` (m, n), and their `core` (m, m)."""
        dtype = image.dtype
        eigenvalues = torch.linalg.eigvalsh((core + core.T) / 2)
        lowest = float(system.space.read(eigenvalues[0]))  # a Rayleigh quotient of H + damping I
        if len(tests) == image.shape[1]:
            return _indefinite(tests, image, system.damping, lowest, noise)
        image.sub_(tests, alpha=system.damping)  # H alone is nearer to low rank
        if lowest < system.damping - noise:
            basis = torch.linalg.qr(image.T)[0].T.to(system.rhs.dtype)
            return _indefinite(basis.to(dtype), system.product(basis).to(dtype), system.damping, lowest, noise)
        return _semidefinite(tests, image, system.damping, noise)

    def _tests(self, size: int, like: Tensor) -> Tensor:
        """(min(rank, n), n), orthonormal rows of the dtype and on the device of `like`."""
        if self.rank >= size:
            return torch.eye(size, dtype=like.dtype, device=like.device)
        dtype = torch.promote_types(like.dtype, torch.float32)
        generator = private_generator(like.device, self.seed)
        gaussian = torch.randn(size, self.rank, generator=generator, dtype=dtype, device=like.device)
        rows: Tensor = torch.linalg.qr(gaussian)[0].T.to(like.dtype).contiguous()
        return rows


def _semidefinite(tests: Tensor, image: Tensor, damping: float, noise: float) -> LowRank:
    """Frangella et al., algorithm 2.1, which is Nystrom's formula for `H + noise I`: that for H is unstable.

    Args:
        tests: (m, n), orthonormal rows.
        image: (m, n), each of them times H; overwritten.
        noise: the eigenvalue of H that may be 0.
    """
    core = (tests @ image.T).double()
    weights, vectors = torch.linalg.eigh((core + core.T) / 2)  # (m,), (m, m); for their Cholesky factor, which may fail
    basis, triangle = torch.linalg.qr(image.add_(tests, alpha=noise).T)  # (n, m), (m, m)
    left, singular, _ = torch.linalg.svd(triangle.double() @ vectors / (weights.clamp(min=0) + noise).sqrt())
    eigenvalues = (singular.square() - noise).clamp(min=0)
    values = eigenvalues + damping
    kept = int((values > noise).sum())
    basis = basis @ left[:, :kept].to(basis.dtype)
    return LowRank(
        basis=basis,
        image=basis,
        values=values[:kept].to(basis.dtype),
        rest=float(values[kept - 1]) if kept else 1.0,
        inverts_rest=kept == len(values),
        largest_eigenvalue=float(eigenvalues[0]),
        negative_curvature=False,
    )


def _indefinite(basis: Tensor, image: Tensor, damping: float, lowest: float, noise: float) -> LowRank:
    """The least-squares inverse of `A = H + damping I`, definite or not, on a space.

    Args:
        basis: (m, n), orthonormal rows.
        image: (m, n), each of them times A.
        lowest: a Rayleigh quotient of A.
        noise: the eigenvalue of A that may be 0.
    """
    ritz = torch.linalg.eigvalsh((basis @ image.T).double())  # (m,)
    orthonormal, triangle = torch.linalg.qr(image.T)  # (n, m), (m, m)
    left, values, right = torch.linalg.svd(triangle.double())
    kept = int((values > noise).sum())
    return LowRank(
        basis=basis.T @ right[:kept].T.to(basis.dtype),
        image=orthonormal @ left[:, :kept].to(basis.dtype),
        values=values[:kept].to(basis.dtype),
        rest=float(values[kept - 1]) if kept else 1.0,
        inverts_rest=False,
        largest_eigenvalue=float(ritz[-1]) - damping,
        negative_curvature=min(float(ritz[0]), lowest) < -noise,
    )
