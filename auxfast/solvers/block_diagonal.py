"""A solver of several independent problems at once, each with its own Hessian and its own certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from auxfast.solvers.base import Matvec, Solver, SolverState, SolveStats, check_solver
from auxfast.solvers.block_operator import BlockOperator
from auxfast.solvers.chebyshev import Chebyshev
from auxfast.solvers.conjugate_gradient import ConjugateGradient
from auxfast.solvers.gmres import GMRES
from auxfast.solvers.identity import Identity
from auxfast.solvers.linear_system import check_rhs
from auxfast.solvers.minres import MINRES
from auxfast.solvers.neumann import Neumann
from auxfast.solvers.normal_equations import NormalEquations
from auxfast.solvers.space import LOCAL, refuse_pieces

_BY_ROWS = (MINRES, ConjugateGradient, GMRES, NormalEquations, Neumann, Chebyshev, Identity)
_SCALES, _SCALES_OF_HALF = 32, 8  # powers of two that tell problems apart: more would leave the range of the dtype


@dataclass(frozen=True)
class BlockDiagonal:
    """Solves T problems of one kind side by side, of which none depends on another's parameters: one network adapted to
    each of T tasks, as in iMAML (Rajeswaran et al. 2019), with outer parameters that they share.

    **How to write such a problem.** Every inner parameter has one more axis in front, of size T; the inner loss is the
    sum of the losses of all (a mean of them is 1 / T of that, and the damping then T times as much beside it). H is
    block diagonal then, so one backward pass gives every problem the product with its own block. `solver` works on them
    as on T systems: each has its own Krylov space, stops on its own, and has its own entry in `stats.residuals`. One
    system of all, as any solver takes it by itself, needs as many steps as all the spectra together ask for.

    **Whether the problems are independent** is checked by two products (another one for more than 32 problems, or 8 in
    float16), once for a `state`, or in every call without one: scaling the vector of one problem must not change the
    products of the others.

    Args:
        solver: one that treats right-hand sides one by one, without a preconditioner: MINRES, ConjugateGradient,
            GMRES, NormalEquations, Neumann, Chebyshev or Identity. Neumann and Chebyshev estimate one step size or one
            pair of bounds for all.

    Raises:
        TypeError: another solver, or none. ValueError: a preconditioner, which would be one matrix for all.
    """

    solver: Solver = field(default_factory=MINRES)

    def __post_init__(self) -> None:
        check_solver(self.solver)
        if not isinstance(self.solver, _BY_ROWS):
            names = ", ".join(kind.__name__ for kind in _BY_ROWS)
            raise TypeError(f"solver must be one of {names}, which solve each problem by itself, not {self.solver!r}")
        if getattr(self.solver, "preconditioner", None) is not None:
            raise ValueError(
                f"solver must have preconditioner=None, for one matrix does not serve all problems, not {self.solver!r}"
            )

    @property
    def tol(self) -> float | None:
        """That of `solver`, for each of the problems."""
        tol: float | None = getattr(self.solver, "tol", None)
        return tol

    def solve(
        self, matvec: Matvec, rhs: Sequence[Tensor], *, batched: bool = False, state: SolverState | None = None
    ) -> tuple[list[Tensor], SolveStats]:
        """Solves `(H + damping I) x = rhs` for a block diagonal H; see `Solver.solve`.

        `stats.residuals` has an entry for each problem; with `batched`, for those of the first right-hand side, then of
        the second, and so on. `stats.matvecs` counts products with H, each of which is one with all blocks.

        Raises:
            ValueError: tensors of `rhs` that do not agree in the size of their first axis (the second, if batched);
                problems that depend on each other; or see `solver`.
            RuntimeError: see `solver`.
        """
        refuse_pieces(getattr(matvec, "space", LOCAL), "BlockDiagonal", "take the solver itself")
        check_rhs(rhs, batched)
        blocks = _number_of_blocks(rhs, batched)
        operator = BlockOperator(matvec, blocks)
        if state is None or state.blocks != blocks:
            _refuse_dependent(operator, [b[0].detach() if batched else b.detach() for b in rhs], blocks)
        rows = [b.flatten(0, 1) for b in rhs] if batched else rhs
        solution, stats = self.solver.solve(operator, rows, batched=True, state=state)
        if state is not None:
            state.blocks = blocks
        solution = [x.reshape(b.shape) for x, b in zip(solution, rhs, strict=True)]
        return solution, replace(stats, matvecs=operator.products)


def _number_of_blocks(rhs: Sequence[Tensor], batched: bool) -> int:
    sizes = {b.shape[batched] if b.dim() > batched else 0 for b in rhs}
    if len(sizes) > 1 or 0 in sizes:
        shapes = ", ".join(str(tuple(b.shape[batched:])) for b in rhs)
        raise ValueError(
            "BlockDiagonal needs inner parameters that all have the same number of problems as their first axis, got "
            f"shapes {shapes}"
        )
    return sizes.pop()


def _refuse_dependent(operator: BlockOperator, vectors: Sequence[Tensor], blocks: int) -> None:
    """Raises ValueError where blocks beside the diagonal are not 0: scaling the vectors of the problems by different
    powers of two, which is exact, then changes more than the scale of the products.

    Args:
        vectors: each tensor has `blocks` entries along its first axis.
    """
    largest = max((float(v.abs().max()) for v in vectors if v.numel()), default=0.0)
    if not operator.space.all(0 < largest < math.inf):
        return
    vectors = [v / largest for v in vectors]
    products = operator.batched([v.clone() for v in vectors])
    num_scales = _SCALES_OF_HALF if vectors[0].dtype == torch.float16 else _SCALES
    changes, stride = 0.0, 1
    while stride == 1 or stride < blocks:  # any two problems differ in a digit of their numbers
        digits = torch.arange(blocks, device=vectors[0].device) // stride % num_scales
        columns = [(2.0**digits).to(v.dtype).reshape(-1, *[1] * (v.dim() - 1)) for v in vectors]
        scaled = operator.batched([v * column for v, column in zip(vectors, columns, strict=True)])
        pairs = zip(products, scaled, columns, strict=True)
        found = max((float((s.detach() / c - p.detach()).abs().max()) for p, s, c in pairs if p.numel()), default=0.0)
        changes, stride = max(changes, found), stride * num_scales
    size = max((float(p.detach().abs().max()) for p in products if p.numel()), default=0.0)
    rounding = math.sqrt(torch.finfo(vectors[0].dtype).eps) * size
    if not operator.space.all(not rounding < changes < math.inf):
        raise ValueError(
            f"the {blocks} problems of BlockDiagonal depend on each other: second derivatives mix entries of the first "
            f"axis of inner_params (by {changes / size:.1e} of the largest product). Statistics over all of them do "
            "that, as in BatchNorm, or a penalty on their differences; if it is meant, take the solver itself"
        )
