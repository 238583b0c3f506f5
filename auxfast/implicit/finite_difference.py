"""Products with second derivatives by differences of gradients, for networks with operators that have no others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import compress

import torch
from torch import Tensor

from auxfast.autograd.engine import spread
from auxfast.implicit.central_difference import (
    Block,
    Difference,
    Direction,
    Grads,
    minus,
    moved_by,
    norm_of,
    norms_of,
    quotient,
)
from auxfast.implicit.curvature import Hessian, one_by_one
from auxfast.implicit.finite import check_finite
from auxfast.implicit.losses import LossFns, add, check_connected, mean_gradient, term_of_whole, times
from auxfast.implicit.ranks import attempt
from auxfast.solvers.base import SolveStats, StopReason

_GROWTH = 16.0  # A step that rounding spoils grows by this factor: agreement within that rounding vouches for no more.
_SHRINKAGE = 8  # A step that has crossed a kink shrinks by this factor.
_LENGTHENING = 4  # A step that leaves much rounding, and no kink, grows by this factor.
_DISAGREEMENT = 0.01  # Rounding and truncation should make less of a difference to recorded products.
_ALLOWED_ERROR = 1e-3  # A solver without a tolerance is held to the default of those that have one.


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
    loss has recorded second derivatives, `mixed` compares one product with theirs, and a difference counts as an
    error; where it has none, nothing tells.

    Args:
        loss_fns: functions that compute the loss of each micro-batch, the same at each call.
        params: tensors that it is differentiated in. Those in which the gradient is constant, whatever `params` and
            `outer_params` are, are left out. That is seen by moving all along a pseudo-random direction, the same in
            every call.
        outer_params: tensors for `mixed` to differentiate in.

    Attributes:
        operator_error: an estimate of the relative error of `H x` and of the mixed product with x, whichever is larger;
            0 before `mixed`.
        disagrees: whether `mixed` has found other second derivatives in the recorded graph.

    Raises:
        ValueError: the loss depends on none of `params`.
        NotFiniteError: NaN or inf in `params` or in the gradient.
    """

    def __init__(self, loss_fns: LossFns, params: Sequence[Tensor], outer_params: Sequence[Tensor] = ()) -> None:
        self._loss_fns = loss_fns
        before, self._eps = _gradient_and_precision(loss_fns, params)
        self._step = self._eps ** (1 / 3)  # relative to the size of what is moved, if that is its scale
        self._best_error = self._eps ** (2 / 3)
        self._good_error = _GROWTH * self._best_error
        self._allowed_bend = self._eps ** (1 / 4) / 2  # a smooth gradient bends by about the relative step
        self.operator_error = 0.0
        self.disagrees = False
        check_connected("inner_loss", before)
        check_finite("The gradients of inner_loss in inner_params", before)
        check_finite("The inner_params", [w for w, grad in zip(params, before, strict=True) if grad is not None])
        self.in_system = self._which_vary(params, outer_params, before)
        self.params = list(compress(params, self.in_system))
        self._gradient = list(compress(before, self.in_system))
        self._sizes = self._scales(self.params)
        self._blocks = self._by_scale()

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        total: Grads = [None] * len(self.params)
        for direction in self._directions(vectors):
            total = add(total, times(direction.norm, self._difference(direction).product))
        return [torch.zeros_like(v) if p is None else p.to(v.dtype) for p, v in zip(total, vectors, strict=True)]

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return one_by_one(self, vectors)

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        product: Grads = [None] * len(self.params)
        mixed: Grads = [None] * len(outer_params)
        product_error = mixed_error = mixed_scale = 0.0
        for direction in self._directions(vectors):
            norm = direction.norm
            full = self._difference(direction, outer_params)
            half = self._at(full.distance / 2, direction, outer_params)
            product = add(product, times(norm, full.product))
            product_error += norm * self._product_error(full, half, direction)
            term, error = self._mixed_along(direction, outer_params, full, half)
            mixed = add(mixed, times(norm, term))
            mixed_error += norm * error
            mixed_scale += norm * full.outer_norm / self._longest(direction.block)
        length = norm_of(product)
        # A mixed product far below its scale has cancelled: its relative error would mean nothing.
        mixed_length = max(norm_of(mixed), self._good_error * mixed_scale)
        errors = quotient(product_error, length), quotient(mixed_error, mixed_length)
        self.operator_error = max(errors)
        if (recorded := self._recorded(vectors, outer_params)) is not None:
            pairs = zip((product, mixed), recorded, (length, mixed_length), errors, strict=True)
            for found, other, size, error in pairs:
                distance = quotient(norm_of(add(found, times(-1.0, other))), size)
                if distance > max(_DISAGREEMENT, 10 * error):
                    self.operator_error, self.disagrees = max(self.operator_error, distance), True
        return term_of_whole(mixed, self._loss_fns)

    def certify(self, stats: SolveStats, problem: str | None, tol: float | None) -> tuple[SolveStats, str | None]:
        """`stats` and the problem with the solve, after `mixed`: `operator_error` stands in the stats, and where it is
        above both the tolerance and the residual they are not converged, but `inexact`."""
        stats = replace(stats, operator_error=self.operator_error)
        if not self.operator_error <= max(_ALLOWED_ERROR if tol is None else tol, stats.residual):
            stats, problem = replace(stats, converged=False, stop_reason=StopReason.INEXACT), "inexact"
        return stats, "disagreement" if self.disagrees else problem

    def _which_vary(self, params: Sequence[Tensor], outer: Sequence[Tensor], before: Grads) -> list[bool]:
        """Whether the gradient in each parameter varies where all are moved by a part of the size of each; and where
        that leaves some as they are, by a part of the largest size, and by all of it: a short move may be lost in
        rounding. At last the outer parameters are moved."""
        used = [w for w, grad in zip(params, before, strict=True) if grad is not None]
        scales = self._scales(used)
        largest, generator = max(scales), torch.Generator().manual_seed(0)
        varies = [False] * len(params)
        for lengths in (scales, [largest] * len(used), [max(1.0, largest) / self._step] * len(used)):
            moves = [s * _normal(generator, w) for w, s in zip(used, lengths, strict=True)]
            with moved_by(used, moves, self._step):
                after = mean_gradient(self._loss_fns, params)
            for i, (a, b) in enumerate(zip(before, after, strict=True)):
                if a is not None and b is not None and (lengths is scales or bool(b.isfinite().all())):
                    varies[i] |= not torch.equal(a, b)
            if sum(varies) == len(used):
                return varies
        if not outer:
            return varies
        pairs = zip(outer, self._scales(outer), strict=True)
        moves = [s * _normal(generator, phi) for phi, s in pairs]
        with moved_by(outer, moves, self._step):
            after = mean_gradient(self._loss_fns, params)
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            varies[i] |= a is not None and b is not None and not torch.equal(a, b)
        return varies

    def _scales(self, params: Sequence[Tensor]) -> list[float]:
        """The root mean square of the elements of each, or a guess where all are 0."""
        sizes = [norm_of([w]) / math.sqrt(max(w.numel(), 1)) for w in params]
        largest = max(sizes, default=0.0)
        return [size or (self._step * min(1.0, largest) or 1.0) for size in sizes]

    def _by_scale(self) -> list[Block]:
        """The parameters in blocks of similar scale, the largest first, and those that are 0 last."""
        blocks: list[Block] = []
        is_zero = [not bool(w.any()) for w in self.params]
        for i in sorted(range(len(self.params)), key=lambda i: (is_zero[i], -self._sizes[i])):
            block = blocks[-1] if blocks else None
            if block is None or block.is_zero != is_zero[i] or self._sizes[i] < self._step * block.size:
                blocks.append(Block([], self._sizes[i], is_zero[i]))
            blocks[-1].members.append(i)
            blocks[-1].numel += self.params[i].numel()
        return blocks

    def _directions(self, vectors: Sequence[Tensor]) -> list[Direction]:
        """The parts of `vectors` in each block, where they are not 0."""
        for block in list(self._blocks):
            if (direction := self._direction(block, vectors)) is not None:
                if not block.is_ready:
                    self._choose_distance(direction)
                if block is not self._blocks[0] and block.is_ready and not block.was_compared:
                    self._merge(direction)
        directions = [self._direction(block, vectors) for block in self._blocks]
        return [direction for direction in directions if direction is not None]

    def _direction(self, block: Block, vectors: Sequence[Tensor]) -> Direction | None:
        part = block.select(vectors)
        norms = norms_of(part)
        norm = math.hypot(*norms)
        if norm == 0:
            return None
        relative = math.hypot(*(n / self._sizes[i] for n, i in zip(norms, block.members, strict=True))) / norm
        return Direction(block, [v / norm for v in part], norm, relative)

    def _choose_distance(self, direction: Direction) -> None:
        block = direction.block
        block.rounding = self._rounding(block)
        chosen, start = self._at(direction.distance(self._step), direction), min(0.25, _GROWTH * self._good_error)
        longest, growth = self._longest(block), _GROWTH
        while chosen.length == 0 and chosen.distance < longest:  # lost in rounding, or along a null vector
            chosen = self._at(chosen.distance * growth, direction)
        block.rounding = max(block.rounding, self._eps * chosen.length)
        while 0 < chosen.rounding < start / 2:  # repeated, since far too long a step may see hardly any curvature
            chosen = self._at(chosen.distance * chosen.rounding / start, direction)
        while chosen.rounding > self._best_error and chosen.distance < longest and growth >= 2:
            factor = min(growth, max(2, chosen.rounding / self._best_error))
            longer = self._at(min(longest, chosen.distance * factor), direction)
            if longer.differs_from(chosen) <= 3 * chosen.rounding + self._best_error:
                chosen = longer
            else:
                growth **= 0.5
        if chosen.rounding > 0:  # otherwise this direction tells nothing
            block.distance, block.relative_distance = chosen.distance, chosen.distance * direction.relative
            block.is_ready = True

    def _longest(self, block: Block) -> float:
        """A distance that moves the elements by as much as the largest parameters measure, or 1."""
        return max(1.0, self._blocks[0].size) * math.sqrt(block.numel)

    def _noise(self) -> float:
        """Norm of what rounding within the computation makes of the gradient: the second difference where the last bits
        of all parameters change, in which what the gradient owes to them cancels."""
        values = [w.detach() for w in self.params]
        with moved_by(self.params, values, 2 * self._eps):
            ahead = minus(mean_gradient(self._loss_fns, self.params), self._gradient)
        with moved_by(self.params, values, -2 * self._eps):
            behind = minus(self._gradient, mean_gradient(self._loss_fns, self.params))
        return max(norm_of(minus(ahead, behind)), self._eps / 4 * norm_of(self._gradient))

    def _rounding(self, block: Block) -> float:
        """Norm of what rounding makes of the gradient where the block is moved: in the computation, or in the moves."""
        moved = block.select(self.params)
        with moved_by(moved, [w.detach() for w in moved], 2 * self._eps):
            after = mean_gradient(self._loss_fns, self.params)
        return max(norm_of(minus(after, self._gradient)), self._noise())

    def _merge(self, direction: Direction) -> None:
        """Lets a block move with the largest one, if one step serves both: the shorter one, since rounding is that of
        the largest in any case; or that of the largest, if the products agree."""
        block, largest = direction.block, self._blocks[0]
        if not largest.is_ready:
            return
        block.was_compared = True
        if block.distance < largest.distance / _SHRINKAGE:
            own, common = (self._at(distance, direction) for distance in (block.distance, largest.distance))
            if not common.differs_from(own) <= 3 * own.rounding + self._good_error:
                return
        else:
            largest.distance = min(largest.distance, block.distance)
        for i in block.members:
            self._sizes[i] = largest.size
        largest.members += block.members
        largest.numel += block.numel
        largest.rounding = max(largest.rounding, block.rounding)
        self._blocks.remove(block)

    def _difference(self, direction: Direction, outer_params: Sequence[Tensor] = ()) -> Difference:
        """The difference over the block's distance; over a shorter one if that has crossed a kink, over a longer one if
        little but rounding is left."""
        first = best = last = self._at(direction.distance(self._step), direction, outer_params)
        while last.bend > max(self._allowed_bend, 4 * last.rounding) and best.bend > _SHRINKAGE * last.rounding:
            last = self._at(last.distance / _SHRINKAGE, direction, outer_params)
            best = min(best, last, key=lambda difference: difference.bend)
            if last.distance < self._eps * first.distance:  # none is finite
                break
        ratio = best.distance / first.distance
        if best.bend > ratio / 2 * first.bend:  # it was no kink, and the next direction will bend as well
            direction.block.distance *= ratio
            direction.block.relative_distance *= ratio
        while best.rounding > self._allowed_bend and _LENGTHENING * best.distance < self._longest(direction.block):
            longer = self._at(_LENGTHENING * best.distance, direction, outer_params)
            if not longer.bend < best.bend:
                break
            best = longer
        return best

    def _product_error(self, full: Difference, half: Difference, direction: Direction) -> float:
        """Norm of the error of `full.product`: its distance to the product at half the step, or at a far shorter one if
        half is too long as well; and not less than half of what rounding may make, which may be the same in both."""
        short, length = half, norm_of(full.product)
        error = max(norm_of(minus(full.product, half.product)), full.rounding * length / 2)
        while error > 2 * _SHRINKAGE * short.rounding * length > 0:  # more than rounding in a shorter one would make
            short = self._at(short.distance / _SHRINKAGE, direction)
            if short.bend > max(full.bend, 4 * short.rounding):
                break
            error = max(error, norm_of(minus(full.product, short.product)))
        return error

    def _mixed_along(
        self, direction: Direction, outer_params: Sequence[Tensor], full: Difference, half: Difference
    ) -> tuple[Grads, float]:
        """The mixed product along `direction`, and the norm of its error. Across kinks the loss is continuous, and with
        it its gradient in outer parameters: longer steps than those of H serve it, and a few numbers need them."""
        rounding = self._eps / 2 * full.outer_norm
        term, error = full.mixed, max(norm_of(minus(full.mixed, half.mixed)), rounding / full.distance)
        distance = full.distance * _LENGTHENING
        while error > self._good_error * norm_of(term) and distance <= self._longest(direction.block):
            longer = self._at(distance, direction, outer_params).mixed
            # Rounding falls and truncation grows by more than 2, so one of the two products has half of the difference.
            longer_error = max(norm_of(minus(longer, term)) / 2, rounding / distance)
            if not longer_error < error:
                break
            term, error, distance = longer, longer_error, distance * _LENGTHENING
        return term, error

    def _at(self, distance: float, direction: Direction, outer_params: Sequence[Tensor] = ()) -> Difference:
        moved, wanted, n = direction.block.select(self.params), [*self.params, *outer_params], len(self.params)
        with moved_by(moved, direction.unit, distance):
            ahead = mean_gradient(self._loss_fns, wanted)
        with moved_by(moved, direction.unit, -distance):
            behind = mean_gradient(self._loss_fns, wanted)
        change = minus(ahead, behind)
        derivative = times(0.5 / distance, change)
        return Difference(
            block=direction.block,
            distance=distance,
            product=derivative[:n],
            mixed=derivative[n:],
            length=norm_of(change[:n]),
            second=norm_of(minus(minus(ahead[:n], self._gradient), minus(self._gradient, behind[:n]))),
            outer_norm=norm_of(ahead[n:]),
        )

    def _recorded(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> tuple[Grads, Grads] | None:
        """The product and the mixed product with the recorded second derivatives, or `None` where there are none."""
        ranks = self._loss_fns.ranks
        found = attempt(ranks, partial(self._recorded_terms, vectors, outer_params), None)
        if ranks is None:
            return found
        if ranks.any_rank(found is None) or found is None:
            return None
        terms = ranks.sum_where_any([*found[0], *found[1]], [*self.params, *outer_params])
        return terms[: len(self.params)], terms[len(self.params) :]

    def _recorded_terms(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> tuple[Grads, Grads] | None:
        """This process's terms of them."""
        product: Grads = [None] * len(self.params)
        mixed: Grads = [None] * len(outer_params)
        try:
            for loss_fn in self._loss_fns:
                hessian = Hessian(loss_fn(), self.params)
                chosen = list(compress(vectors, hessian.in_system))
                product = add(product, times(loss_fn.share, spread(hessian(chosen), hessian.in_system)))
                mixed = add(mixed, times(loss_fn.share, hessian.mixed(chosen, outer_params)))
                del hessian  # its graph goes before the next one is made
        except (RuntimeError, ValueError):  # no second derivatives; or a micro-batch that depends on no parameter
            return None
        return product, mixed


def _normal(generator: torch.Generator, like: Tensor) -> Tensor:
    """Random numbers of the CPU's `generator`, whatever torch's default device is."""
    return torch.randn(like.shape, generator=generator, device="cpu").to(like)


def _gradient_and_precision(loss_fns: LossFns, params: Sequence[Tensor]) -> tuple[Grads, float]:
    """The gradient, and the coarsest machine precision of `params` and of what the graphs keep: under autocast, a
    gradient in float32 has the rounding of a narrower dtype."""
    dtypes = {w.dtype for w in params}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            dtypes.add(tensor.dtype)
        return tensor.detach()  # a tensor would keep its own graph alive

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradient = mean_gradient(loss_fns, params)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):  # which transforms of torch.func refuse
            raise
        gradient = mean_gradient(loss_fns, params)
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return gradient, eps if loss_fns.ranks is None else max(row[0] for row in loss_fns.ranks.gather([eps]))
