"""The curvature that the inner optimizer has seen, as a preconditioner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.param_groups import groups_of
from auxfast.solvers.preconditioners import Apply, Diagonal, private_generator
from auxfast.solvers.space import refuse_pieces

_SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum")
"""Names in `optimizer.state` of running squares of gradients: Adam's and its kin's, RMSprop's and Adagrad's."""


@dataclass(frozen=True, repr=False)
class FromOptimizer:
    """The state of the torch optimizer that trains the inner parameters, read anew at each solve.

    **Adam, AdamW, NAdam, RAdam, RMSprop, Adadelta, Adagrad**: the diagonal `c v^(1/4) + s`, where v holds the running
    squares of the gradients: these tell in which entries H is large, not how large. One product, with a random sign
    vector z, tells c and s: they fit `z * (H + damping I) z`, whose expectation is the diagonal, by least squares.
    It saves products where the scales of parameters differ, as by inputs of different units, and v is of mini-batches;
    elsewhere it may cost some. (The fourth root, since with `v^(1/2)`, which Adam divides by, it costs much more where
    v and H disagree.) Where the fit finds no relation between the two, the solve goes on without.

    **LBFGS**: its pairs of steps s and changes of the gradient y, by the two-loop recursion (Nocedal & Wright 2006,
    algorithm 7.4), without products. The pairs of `H + damping I` are `(s, y + damping s)`.

    Either is positive definite, and what is solved, and certified, stays the system with the Hessian.

    Args:
        optimizer: holds all inner parameters, and has taken a step.

    Raises:
        TypeError: `optimizer` is no torch optimizer, or SGD, whose state tells nothing of curvature.
        ValueError: at a solve, if it does not hold some parameter, has no state for it yet, or none that tells of
            curvature.
        TypeError: at a solve with a `matvec` that does not know its parameters; see `LinearSystem.params`.
    """

    optimizer: torch.optim.Optimizer

    refresh: ClassVar[int] = 1  # the state has changed by the next solve

    def __post_init__(self) -> None:
        given: Any = self.optimizer
        if not isinstance(given, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be the torch.optim.Optimizer of the inner parameters, not {given!r:.60}")
        if isinstance(given, torch.optim.SGD):
            raise TypeError(
                "optimizer must be one whose state tells of curvature, such as Adam, RMSprop, Adagrad or LBFGS, and "
                "not SGD: take Jacobi() or Nystrom() for it"
            )

    def __repr__(self) -> str:
        return f"FromOptimizer({type(self.optimizer).__name__})"  # that of an optimizer has many lines

    def build(self, system: LinearSystem) -> Apply | None:
        """See `Preconditioner.build`; one product, none for LBFGS."""
        if system.params is None:
            raise TypeError(
                "FromOptimizer must know whose state to read: matvec must have `params`, the list of parameters, as "
                "the curvature has that hypergradient solves with"
            )
        refuse_pieces(system.space, "FromOptimizer", "take Jacobi()")
        groups = groups_of(self.optimizer, system.params)
        if isinstance(self.optimizer, torch.optim.LBFGS):
            return self._pairs(system, system.params)
        pairs = zip(system.params, groups, strict=True)
        moments = torch.cat([self._second_moment(w, group).reshape(-1) for w, group in pairs])
        if moments.numel() != system.rhs.shape[1]:
            raise ValueError(
                f"FromOptimizer: the state of the {type(self.optimizer).__name__} has {moments.numel()} entries for "
                f"{system.rhs.shape[1]} unknowns"
            )
        return _fitted(moments.to(system.rhs.device, torch.float64) ** 0.25, system)

    def _second_moment(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        """The running mean of the squared gradients of `param`, of its shape, without Adam's bias towards 0."""
        state, name = self.optimizer.state.get(param, {}), type(self.optimizer).__name__
        if not state:
            raise ValueError(
                f"FromOptimizer: the {name} has no state yet for a parameter of shape {tuple(param.shape)}: let it "
                "take a step with a gradient of it before"
            )
        key = next((key for key in _SECOND_MOMENTS if isinstance(state.get(key), Tensor)), None)
        if key is None:
            raise ValueError(
                f"FromOptimizer: the state of {name} ({', '.join(state)}) tells nothing of curvature: take Jacobi() or "
                "Nystrom() for it"
            )
        moment: Tensor = state[key].double()
        return moment / (1 - float(group["betas"][1]) ** float(state["step"])) if "betas" in group else moment

    def _pairs(self, system: LinearSystem, params: Sequence[Tensor]) -> Apply:
        held = self.optimizer.param_groups[0]["params"]  # LBFGS has one group, and its state is with the first
        state = self.optimizer.state.get(held[0], {})
        if not state.get("old_stps"):
            raise ValueError("FromOptimizer: the LBFGS has no pairs yet: let it take a step of two iterations before")
        steps, changes = (torch.stack(state[key]).to(system.rhs) for key in ("old_stps", "old_dirs"))
        changes = changes.add_(steps, alpha=system.damping)
        starts, start = {}, 0
        for w in held:
            starts[id(w)], start = start, start + w.numel()
        columns = [torch.arange(w.numel(), device=steps.device) + starts[id(w)] for w in params]
        inner = system.space.dots(steps, changes)  # (m,), above 0, since LBFGS keeps no other pairs
        scale = float(inner[-1] / system.space.dots(changes[-1:], changes[-1:])[0])
        return LimitedMemory(steps, changes, (1 / inner).to(steps.dtype), scale, torch.cat(columns))


def _fitted(pattern: Tensor, system: LinearSystem) -> Diagonal | None:
    """The inverse of the diagonal `c pattern + s` nearest to that of `H + damping I`; None where c is not above 0.

    Args:
        pattern: (n,), at least 0, float64.
    """
    generator = private_generator(pattern.device, 0)
    signs = 2 * torch.randint(2, system.rhs.shape[1:], generator=generator, device=pattern.device) - 1
    rows = signs.to(system.rhs.dtype)[None]
    sample = (rows * system.product(rows))[0].double()  # (n,), its expectation is the diagonal
    pattern = pattern / pattern.mean()
    # Relative errors of the diagonal cost steps, absolute ones do not. Where the pattern is below a hundredth of its
    # mean they count alike, or a few entries that hardly ever had a gradient would decide.
    weight = (pattern + 0.01) ** -2
    weight /= weight.sum()
    middle, level = weight @ pattern, weight @ sample
    c = (weight * (pattern - middle)) @ (sample - level) / (weight @ (pattern - middle).square())
    s = level - c * middle
    if s < system.damping:  # H itself has no diagonal below 0 at a minimum
        s = torch.full_like(s, system.damping)
        c = (weight * pattern) @ (sample - s) / (weight @ pattern.square())
    if not 0 < float(system.space.read(c)) < float("inf"):
        return None
    diagonal = c * pattern + s
    least = torch.finfo(system.rhs.dtype).eps ** 0.5 * diagonal.max()  # what has had no gradient is no more curved
    return Diagonal(diagonal.clamp(min=least).reciprocal().to(system.rhs.dtype))


@dataclass(frozen=True)
class LimitedMemory:
    """Multiplies rows by the inverse Hessian of LBFGS, in the columns that are asked for.

    Attributes:
        steps: (m, N), differences of the parameters, the oldest first.
        changes: (m, N), those of the gradients.
        rho: (m,), the inverse of their inner products.
        scale: what the recursion starts from, times the identity.
        columns: (n,), the entries of the optimizer's parameters that rows have.
    """

    steps: Tensor
    changes: Tensor
    rho: Tensor
    scale: float
    columns: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """(k, n) -> (k, n)"""
        x = rows.new_zeros(len(rows), self.steps.shape[1]).index_copy_(1, self.columns, rows)
        parts = []
        for step, change, rho in zip(self.steps.flip(0), self.changes.flip(0), self.rho.flip(0), strict=True):
            parts.append(rho * (x @ step))  # (k,)
            x.addr_(parts[-1], change, alpha=-1)
        x *= self.scale
        for step, change, rho in zip(self.steps, self.changes, self.rho, strict=True):
            x.addr_(parts.pop() - rho * (x @ change), step)
        return x.index_select(1, self.columns)
