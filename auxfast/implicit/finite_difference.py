"""Products with second derivatives by differences of gradients, for networks with operators that have no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from auxfast.implicit.curvature import Hessian, one_by_one
from auxfast.implicit.losses import LossFn, add, check_connected, mean_gradient
from auxfast.solvers.base import SolveStats, StopReason

_GROWTH = 16.0  # of a step that rounding spoils: about as far as agreement to within that rounding vouches for
_SHRINKAGE = 8  # of a step that has crossed a kink
_NEAR = 4  # steps whose ratio is below this serve each other's parameters
_DETACHED = 0.01  # relative difference to recorded products that neither rounding nor truncation should reach
_ALLOWED_ERROR = 1e-3  # where the solver has no tolerance: the default of those that have one

_Grads = list[Tensor | None]


class FiniteDifference:
    """`H v` as a central difference of gradients, `(g(W + h v) - g(W - h v)) / 2h`, and the mixed product likewise.

    Only first derivatives are taken, two gradients for a product. The parameters are moved in place and have their old
    bits back after each product.

    **The step.** With machine precision `eps`, a relative error of about `eps^(2/3)` (2e-5 in float32, 4e-11 in
    float64) is the best there is: from there on a longer step loses by truncation what it gains in rounding. At the
    first product the step starts so short that rounding shows, and grows for as long as the products agree within that
    rounding; so no scale need be known. Parameters that are zero, or smaller than the largest by more than
    `eps^(-1/3)`, may have a scale of their own: they are moved on their own, at two more gradients for a product,
    unless the step of the largest is seen to serve them too.

    **Kinks.** A step across a kink, such as that of a ReLU, makes the differences ahead and behind unequal, which every
    product looks at: it takes a shorter step then, as far as rounding allows.

    **The error.** `mixed` takes the products with the solution at half the step too, and leaves the difference in
    `operator_error`. What float32 does not allow, near kinks above all, needs float64.

    **Paths through `detach()`** are differentiated as all others are, since the gradient depends on them; H is then the
    derivative of the gradient field, which need not be symmetric. Recorded graphs take them for constants. Where the
    loss has recorded second derivatives, `mixed` compares one product with theirs; where it has none, nothing tells.

    Args:
        loss_fns: functions that compute the loss of each micro-batch, the same at each call.
        params: tensors that it is differentiated in. Those that the gradient does not depend on are left out, which is
            seen by moving all along a pseudo-random direction, the same in every call.

    Attributes:
        operator_error: an estimate of the relative error of `H x` and of the mixed product with x, whichever is larger;
            0 before `mixed`.
        detached: whether `mixed` has found other second derivatives in the recorded graph.

    Raises:
        ValueError: the loss depends on none of `params`.
    """

    def __init__(self, loss_fns: Sequence[LossFn], params: Sequence[Tensor]) -> None:
        self._loss_fns = loss_fns
        self._eps = max(torch.finfo(w.dtype).eps for w in params)
        self._step = self._eps ** (1 / 3)  # relative to the size of what is moved, if that is its scale
        self._coarse, self._fine = 2 * self._eps ** (1 / 2), self._eps ** (2 / 3)  # errors: of a start, and of the best
        self.operator_error = 0.0
        self.detached = False
        before = mean_gradient(loss_fns, params)
        check_connected("inner_loss", before)
        self.in_system = self._which_vary(params, before)
        self.params = list(compress(params, self.in_system))
        self._gradient = list(compress(before, self.in_system))
        self._blocks = self._by_size()

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        total: _Grads = [None] * len(self.params)
        for block, unit, norm in self._parts(vectors):
            total = add(total, _times(norm, self._difference(block, unit).product))
        return [torch.zeros_like(v) if p is None else p.to(v.dtype) for p, v in zip(total, vectors, strict=True)]

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return one_by_one(self, vectors)

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        product: _Grads = [None] * len(self.params)
        mixed: _Grads = [None] * len(outer_params)
        product_error = mixed_error = mixed_scale = 0.0
        for block, unit, norm in self._parts(vectors):
            full = self._difference(block, unit, outer_params)
            half = self._at(full.distance / 2, block, unit, outer_params)
            product = add(product, _times(norm, full.product))
            product_error += norm * _norm(_minus(full.product, half.product))
            term, error, scale = self._mixed_along(block, unit, outer_params, full, half)
            mixed = add(mixed, _times(norm, term))
            mixed_error += norm * error
            mixed_scale += norm * scale
        product_error = _ratio(product_error, _norm(product))
        self.operator_error = max(product_error, _ratio(mixed_error, max(_norm(mixed), self._coarse * mixed_scale)))
        recorded = self._recorded(vectors)
        if recorded is not None:
            difference = _ratio(_norm(_minus(product, recorded)), _norm(recorded))
            self.detached = difference > max(_DETACHED, 10 * product_error)
        return mixed

    def certify(self, stats: SolveStats, tol: float | None) -> SolveStats:
        """`stats` with the `operator_error` that `mixed` has left; not converged if that is above the tolerance."""
        if stats.converged and not self.operator_error <= (_ALLOWED_ERROR if tol is None else tol):
            stats = replace(stats, converged=False, stop_reason=StopReason.STAGNATED)
        return replace(stats, operator_error=self.operator_error)

    def _which_vary(self, params: Sequence[Tensor], before: _Grads) -> list[bool]:
        """Whether the gradient in each parameter varies where all are moved by a part of the size of each; and where
        that leaves some as they are, by a part of the largest size, since a short move may be lost in rounding."""
        used = [w for w, grad in zip(params, before, strict=True) if grad is not None]
        sizes = [_size(w) for w in used]
        largest = max(sizes) or 1.0
        generator = torch.Generator().manual_seed(0)
        varies = [False] * len(params)
        for scales in ([size or largest for size in sizes], [largest] * len(used)):
            moves = [s * torch.randn(w.shape, generator=generator).to(w) for w, s in zip(used, scales, strict=True)]
            with _moved(used, moves, self._step):
                after = mean_gradient(self._loss_fns, params)
            for i, (a, b) in enumerate(zip(before, after, strict=True)):
                varies[i] |= a is not None and b is not None and not torch.equal(a, b)
            if sum(varies) == len(used):
                break
        return varies

    def _by_size(self) -> list[_Block]:
        """The parameters in blocks of similar size, the largest first, and those that are 0 last."""
        blocks: list[_Block] = []
        sizes = [_size(w) for w in self.params]
        largest = max(sizes, default=0.0) or 1.0
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            is_zero = sizes[i] == 0
            if not blocks or blocks[-1].is_zero != is_zero or sizes[i] < self._step * blocks[-1].size:
                size = sizes[i] or (self._step * min(1.0, largest) if blocks else 1.0)
                blocks.append(_Block([], size, is_zero))
            blocks[-1].members.append(i)
            blocks[-1].numel += self.params[i].numel()
        for block in blocks:
            block.distance = self._step * block.size * block.numel**0.5
        return blocks

    def _parts(self, vectors: Sequence[Tensor]) -> list[tuple[_Block, list[Tensor], float]]:
        """The part of `vectors` in each block, as a direction of norm 1 and its norm, where that is not 0."""
        for block in list(self._blocks):
            if (part := _part(block, vectors)) is not None:
                if not block.is_ready:
                    self._choose_distance(block, part[1])
                if block is not self._blocks[0] and block.is_ready and not block.was_compared:
                    self._merge(block, part[1])
        return [part for block in self._blocks if (part := _part(block, vectors)) is not None]

    def _choose_distance(self, block: _Block, unit: Sequence[Tensor]) -> None:
        self._measure_rounding(block)
        chosen = self._at(block.distance, block, unit)
        while 0 < chosen.rounding < self._coarse / 2:  # repeated, since far too long a step may see hardly any curvature
            chosen = self._at(chosen.distance * chosen.rounding / self._coarse, block, unit)
        longest, growth = self._longest(block), _GROWTH
        while chosen.rounding > self._fine and chosen.distance < longest and growth > 2:
            longer = self._at(min(longest, chosen.distance * growth), block, unit)
            if longer.differs_from(chosen) <= 3 * chosen.rounding + self._fine:
                chosen = longer
            else:
                growth **= 0.5
        if chosen.rounding > 0:  # otherwise this direction tells nothing
            block.distance, block.is_ready = chosen.distance, True

    def _longest(self, block: _Block) -> float:
        """A distance that moves the elements by as much as the largest parameters measure."""
        return max(self._blocks[0].size * block.numel**0.5, block.distance)

    def _measure_rounding(self, block: _Block) -> None:
        """Measures the gradient's change where the last bits of the block's parameters change, or those of all if these
        are 0."""
        moved = self.params if block.is_zero else block.select(self.params)
        with _moved(moved, [w.detach() for w in moved], 2 * self._eps):
            after = mean_gradient(self._loss_fns, self.params)
        block.rounding = max(_norm(_minus(after, self._gradient)), self._eps / 4 * _norm(self._gradient))

    def _merge(self, block: _Block, unit: Sequence[Tensor]) -> None:
        """Lets a block move with the largest one, if one step serves both: the shorter one, which has the rounding of the
        largest in any case, or that of the largest if it agrees."""
        largest = self._blocks[0]
        if not largest.is_ready:
            return
        block.was_compared = True
        if block.distance < largest.distance / _NEAR:
            own, common = (self._at(distance, block, unit) for distance in (block.distance, largest.distance))
            if not common.differs_from(own) <= 3 * own.rounding + self._coarse:
                return
            block.distance = largest.distance
        largest.members += block.members
        largest.numel += block.numel
        largest.distance = min(largest.distance, block.distance)
        largest.rounding = max(largest.rounding, block.rounding)
        self._blocks.remove(block)

    def _difference(self, block: _Block, unit: Sequence[Tensor], outer_params: Sequence[Tensor] = ()) -> _Difference:
        """The difference along `unit` over the block's distance, or over a shorter one that crosses fewer kinks."""
        best = last = self._at(block.distance, block, unit, outer_params)
        allowed = self._eps ** (1 / 4) / 2  # a smooth gradient bends by about the relative step
        while last.bend > max(allowed, 4 * last.rounding) and best.bend > _SHRINKAGE * last.rounding:
            last = self._at(last.distance / _SHRINKAGE, block, unit, outer_params)
            best = min(best, last, key=lambda difference: difference.bend)
        return best

    def _mixed_along(
        self,
        block: _Block,
        unit: Sequence[Tensor],
        outer_params: Sequence[Tensor],
        full: _Difference,
        half: _Difference,
    ) -> tuple[_Grads, float, float]:
        """The mixed product along `unit`, the norm of its error, and the norm to expect if nothing cancels. Across kinks the loss is continuous, and with it
        its gradient in outer parameters: longer steps than those of H serve it, and a few numbers need them."""
        term, error = full.mixed, max(_norm(_minus(full.mixed, half.mixed)), full.mixed_rounding)
        distance = full.distance * _NEAR
        while error > self._coarse * _norm(term) and distance <= self._longest(block):
            longer = self._at(distance, block, unit, outer_params)
            # Rounding falls, and truncation grows, by more than 2: the error is that of the shorter or the longer one.
            longer_error = max(_norm(_minus(longer.mixed, term)) / 2, longer.mixed_rounding)
            if not longer_error < error:
                break
            term, error, distance = longer.mixed, longer_error, distance * _NEAR
        return term, error, full.mixed_rounding / self._eps * 2 * full.distance / self._longest(block)

    def _at(
        self, distance: float, block: _Block, unit: Sequence[Tensor], outer_params: Sequence[Tensor] = ()
    ) -> _Difference:
        moved, wanted, n = block.select(self.params), [*self.params, *outer_params], len(self.params)
        with _moved(moved, unit, distance):
            ahead = mean_gradient(self._loss_fns, wanted)
        with _moved(moved, unit, -distance):
            behind = mean_gradient(self._loss_fns, wanted)
        derivative = _times(0.5 / distance, _minus(ahead, behind))
        bend = _norm(_minus(_minus(ahead[:n], self._gradient), _minus(self._gradient, behind[:n]))) / (2 * distance)
        length = _norm(derivative[:n])
        return _Difference(
            distance=distance,
            product=derivative[:n],
            mixed=derivative[n:],
            bend=_ratio(bend, length),
            rounding=length and block.rounding / (2 * distance) / length,
            mixed_rounding=self._eps * _norm(ahead[n:]) / (2 * distance),
        )

    def _recorded(self, vectors: Sequence[Tensor]) -> _Grads | None:
        """The product with the recorded second derivatives, or `None` where there are none."""
        total: _Grads = [None] * len(self.params)
        try:
            for loss_fn in self._loss_fns:
                hessian = Hessian(loss_fn(), self.params)
                terms = iter(hessian(list(compress(vectors, hessian.in_system))))
                total = add(total, [next(terms) if is_in else None for is_in in hessian.in_system])
        except (RuntimeError, ValueError):  # no second derivatives; or a micro-batch that depends on no parameter
            return None
        return _times(1 / len(self._loss_fns), total)


@dataclass(eq=False)
class _Block:
    """Parameters that are moved together.

    Attributes:
        members: their indices.
        size: root mean square of the elements of the largest of them, or a guess where all are 0.
        is_zero: whether all are 0.
        numel: how many elements they have.
        distance: norm of a move; a guess until `is_ready`.
        rounding: norm of the change that rounding makes in the gradient.
        was_compared: whether the distance of the largest block was tried.
    """

    members: list[int]
    size: float
    is_zero: bool
    numel: int = 0
    distance: float = 0.0
    rounding: float = 0.0
    is_ready: bool = False
    was_compared: bool = False

    def select(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in self.members]


@dataclass(frozen=True)
class _Difference:
    """Derivatives along a direction of norm 1, by a central difference.

    Attributes:
        distance: half the length of the difference.
        product: the derivative of the gradient in the parameters.
        mixed: the derivative of the gradient in the outer parameters.
        bend: the difference ahead without the one behind, relative to their sum. For a smooth gradient it is of the
            order of the step; if it comes from kinks or rounding, of the relative error.
        rounding: what rounding may make of `product`, relative to it.
        mixed_rounding: the least that rounding may make of `mixed`, in norm.
    """

    distance: float
    product: _Grads
    mixed: _Grads
    bend: float
    rounding: float
    mixed_rounding: float

    def differs_from(self, other: _Difference) -> float:
        """Distance of the products, relative to the other one."""
        return _ratio(_norm(_minus(self.product, other.product)), _norm(other.product))


def _part(block: _Block, vectors: Sequence[Tensor]) -> tuple[_Block, list[Tensor], float] | None:
    part = block.select(vectors)
    norm = _norm(part)
    return None if norm == 0 else (block, [v / norm for v in part], norm)


@contextmanager
def _moved(params: Sequence[Tensor], directions: Sequence[Tensor], step: float) -> Iterator[None]:
    """Moves `params` to `params + step * directions`, through `.data`, so that graphs that the user made before stay
    valid, and back."""
    data = [w.data for w in params]
    saved = [tensor.clone() for tensor in data]
    try:
        torch._foreach_add_(data, list(directions), alpha=step)
        yield
    finally:
        torch._foreach_copy_(data, saved)


def _minus(tensors: _Grads, others: _Grads) -> _Grads:
    return [None if a is None or b is None else a - b for a, b in zip(tensors, others, strict=True)]


def _times(factor: float, tensors: _Grads) -> _Grads:
    return [None if t is None else factor * t for t in tensors]


def _size(tensor: Tensor) -> float:
    """Root mean square of the elements."""
    return _norm([tensor]) / max(tensor.numel(), 1) ** 0.5


def _ratio(part: float, whole: float) -> float:
    """`part / whole`, where 0 / 0 is 0."""
    return part and (part / whole if whole else float("inf"))


def _norm(tensors: Sequence[Tensor | None]) -> float:
    """Euclidean norm of all elements together; `None` has none."""
    norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in tensors if t is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
