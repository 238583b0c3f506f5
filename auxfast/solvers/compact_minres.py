"""MINRES with its vectors in few bytes, in bfloat16 or on the host, and the solution refined to full precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxfast.ops.krylov import row_dots
from auxfast.solvers.base import (
    RHS_NOT_FINITE,
    TRIVIAL,
    Matvec,
    SolverState,
    SolveStats,
    StopReason,
    check_damping,
    check_steps,
    check_tol,
    refuse_not_symmetric,
)
from auxfast.solvers.best_iterate import RESTART_GAIN
from auxfast.solvers.linear_system import check_product, check_rhs
from auxfast.solvers.space import LOCAL, VectorSpace

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)  # float16 would overflow


@dataclass(frozen=True)
class CompactMINRES:
    """MINRES for systems whose vectors are large beside the memory: 18 bytes a parameter of float32 in the first cycle
    and 22 in later ones, where `MINRES` has 64. Four of these are the solution, eight the operand and the product.

    The Lanczos vectors and the directions of the recurrence are kept in `dtype`, four of them, and the correction that
    they make; all arithmetic is done in float32, or in that of wider parameters, one parameter after the other. Vectors
    of bfloat16 lose the recurrence's way after some digits. So it runs in cycles: each ends where the residual is
    smaller by what `dtype` can tell, takes one product with the refined solution, and the next starts from the true
    residual. The solution itself is of the parameters' dtype, and reaches `tol` as that of `MINRES` does, in somewhat
    more products (iterative refinement; Carson & Higham 2018).

    A cycle that makes the residual larger is not taken. Every step reads its numbers from the device twice.

    Args:
        steps: products at most, those at the ends of cycles left aside; at least 1.
        tol: stop once the relative residual is at most this, between 0 and 1; `None`: go on to working precision.
        damping: at least 0; added to every eigenvalue of H.
        dtype: torch.bfloat16, torch.float32 or torch.float64: of the vectors that are kept.
        device: where they are kept, such as "cpu"; `None`: where the parameters are. They move to the parameters, and
            back, one at a time.

    Raises:
        ValueError: a setting outside its range.
    """

    steps: int = 100
    tol: float | None = 1e-3
    damping: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    device: str | None = None

    def __post_init__(self) -> None:
        check_steps("steps", self.steps)
        check_tol(self.tol)
        check_damping(self.damping)
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, not {self.dtype}")

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `(H + damping I) x = rhs`; see `Solver.solve`. It leaves `state` as it is.

        Raises:
            ValueError: `rhs` is empty, not finite or batched; or `matvec` says that it is not symmetric.
            RuntimeError: `matvec` returns other shapes or dtypes than it was given.
        """
        refuse_not_symmetric(self, matvec)
        check_rhs(rhs, batched)
        if batched:
            raise ValueError(
                "CompactMINRES solves for one right-hand side: take MINRES() for several, or one backward pass for each"
            )
        rhs = [b.detach() for b in rhs]
        system = _System(matvec, self.damping, rhs)
        norm = first = system.norm(rhs)
        if not math.isfinite(norm):
            raise ValueError(RHS_NOT_FINITE)
        if norm == 0:
            return [torch.zeros_like(b) for b in rhs], TRIVIAL
        tolerance, precision = (self.tol or 0.0) * norm, torch.finfo(self.dtype).eps
        x: list[Tensor] | None = None
        residual, iterations, reason, negative = rhs, 0, StopReason.STEPS, False
        while iterations < self.steps:
            cycle = _Cycle(system, residual, norm, self.dtype, self.device)
            goal = max(tolerance, precision * norm)
            del residual
            while cycle.phibar > goal and iterations < self.steps:
                iterations += 1
                if not cycle.step():
                    break
            negative |= cycle.negative
            better = cycle.corrected(x)
            met_goal = cycle.phibar <= goal
            del cycle
            residual = system.residual(better)
            before, after = norm, system.norm(residual)
            if after < before:  # not where it is NaN
                x, norm = better, after
            del better
            if not math.isfinite(after):
                reason = StopReason.NOT_FINITE if x is None else StopReason.DIVERGED
                break
            if norm <= tolerance:
                reason = StopReason.CONVERGED
                break
            if after > RESTART_GAIN * before and (met_goal or iterations < self.steps):
                reason = StopReason.STAGNATED
                break
        relative = norm / first
        return [torch.zeros_like(b) for b in rhs] if x is None else x, SolveStats(
            iterations=iterations,
            matvecs=system.matvecs,
            residual=relative,
            converged=reason is StopReason.CONVERGED,
            stop_reason=reason,
            negative_curvature=negative,
            residuals=(relative,),
        )


class _System:
    """Products with `H + damping I`, and norms, of lists of tensors like `rhs`."""

    def __init__(self, matvec: Matvec, damping: float, rhs: Sequence[Tensor]) -> None:
        self._matvec, self._damping, self._rhs = matvec, damping, rhs
        self._space: VectorSpace = getattr(matvec, "space", LOCAL)
        self.dtype = rhs[0].dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.matvecs = 0

    def product(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """H times them, without the damping."""
        self.matvecs += 1
        found = self._matvec(vectors)
        check_product(found, vectors)
        return found

    def damped(self, product: Tensor, vector: Tensor) -> Tensor:
        """`H v + damping v` of one parameter, in the wide dtype; both of its arguments stay as they are."""
        return torch.add(product.detach().to(self.wide), vector, alpha=self._damping)

    def residual(self, x: Sequence[Tensor]) -> list[Tensor]:
        product = self.product(x)
        return [b.to(self.wide) - self.damped(p, w) for b, p, w in zip(self._rhs, product, x, strict=True)]

    def norm(self, tensors: Sequence[Tensor]) -> float:
        return math.sqrt(self.sum([self.dot(tensor, tensor) for tensor in tensors]))

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(1,), of one parameter's part, and of the piece that this process has."""
        return row_dots(a.reshape(1, -1).to(self.wide), b.reshape(1, -1).to(self.wide))

    def sum(self, numbers: Sequence[Tensor]) -> float:
        return float(self._space.read(self._space.sum(torch.cat([*numbers]).sum(dim=0, keepdim=True)))[0])


class _Cycle:
    """MINRES (Paige & Saunders 1975) from the residual r, for a correction d of the solution; names are theirs.

    Attributes:
        phibar: norm of the residual that the recurrence believes in.
        negative: whether a pivot of the Lanczos matrix is negative, and with it an eigenvalue of `H + damping I`.
    """

    def __init__(
        self, system: _System, residual: Sequence[Tensor], norm: float, dtype: torch.dtype, device: str | None
    ) -> None:
        self._system = system
        self._devices = [r.device for r in residual]
        self._v = [(r.to(system.wide) / norm).to(device or r.device, dtype) for r in residual]
        self._v_old, self._w, self._w_old, self._d = ([torch.zeros_like(v) for v in self._v] for _ in range(4))
        self._beta = self._dbar = self._epsln = self._sn = 0.0
        self._cs, self.phibar, self._pivot, self.negative = -1.0, norm, 0.0, False

    def _here(self, kept: Tensor, i: int) -> Tensor:
        """`kept`, or a copy of it, where the parameter is and in the wide dtype."""
        return kept.to(device=self._devices[i], dtype=self._system.wide)

    def step(self) -> bool:
        """One step; False where there is none left: the Krylov space is used up, or a number is not finite."""
        system = self._system
        operand = [self._here(v, i).to(system.dtype) for i, v in enumerate(self._v)]
        product = system.product(operand)
        del operand
        dots = []
        for i, p in enumerate(product):
            v = self._here(self._v[i], i)
            dots.append(system.dot(v, system.damped(p, v)))
        alpha, beta = system.sum(dots), self._beta
        squares = []
        for i, p in enumerate(product):  # the next vector takes the place of the last but one
            v = self._here(self._v[i], i)
            rest = system.damped(p, v).sub_(v, alpha=alpha).sub_(self._here(self._v_old[i], i), alpha=beta)
            squares.append(system.dot(rest, rest))
            self._v_old[i].copy_(rest)
        del product
        self._beta = math.sqrt(system.sum(squares))
        self._pivot = alpha - (beta**2 / self._pivot if beta and self._pivot else 0.0)
        self.negative |= self._pivot < 0
        epsln, delta = self._epsln, self._cs * self._dbar + self._sn * alpha
        gbar = self._sn * self._dbar - self._cs * alpha
        self._epsln, self._dbar = self._sn * self._beta, -self._cs * self._beta
        gamma = math.hypot(gbar, self._beta)
        if not 0 < gamma < math.inf:
            return False
        self._cs, self._sn = gbar / gamma, self._beta / gamma
        phi, self.phibar = self._cs * self.phibar, self._sn * self.phibar
        for i, (kept, w_old, d) in enumerate(zip(self._v, self._w_old, self._d, strict=True)):
            w = torch.sub(self._here(kept, i), self._here(w_old, i), alpha=epsln)
            w.sub_(self._here(self._w[i], i), alpha=delta).div_(gamma)
            w_old.copy_(w)
            d.copy_(torch.add(self._here(d, i), w, alpha=phi))
            self._v_old[i].copy_(self._here(self._v_old[i], i) / (self._beta or 1.0))
        self._w, self._w_old = self._w_old, self._w
        self._v, self._v_old = self._v_old, self._v
        return self._beta > 0

    def corrected(self, x: Sequence[Tensor] | None) -> list[Tensor]:
        """`x + d`, of the parameters' dtype; `None` is 0."""
        found = []
        for i, d in enumerate(self._d):
            here = self._here(d, i)
            found.append((here if x is None else here + x[i]).to(self._system.dtype))
        return found
