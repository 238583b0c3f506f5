"""Parameters at a kink of the inner loss: seen in its graph, or entry by entry from gradients on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_PROBES = 8
"""Random directions. A kink across several entries pushes each of them back along half of the directions, so that
2^-7 of such entries would pass for kinks of their own. One that is only near is not met in all directions."""
_CLEAR = 10
"""How many times a jump must be as large as what a smooth gradient or rounding could have made of it."""
_RESISTANCE = 0.05
"""Part of the jump by which an entry may fail to be pushed back: as much as the finite step may have changed."""


class Kinks(NamedTuple):
    """What `find_kinks` found."""

    held: Tensor
    """(n,), bool: the gradient jumps across the entry such that both sides push it back. None where `oblique` is not 0,
    since such a kink may seem to be that of an entry which it depends on more than on others."""
    oblique: int
    """Number of entries in which the gradient jumps, where some kink lies across several."""


def is_at_kink(kinked: Sequence[Tensor], inner: Sequence[Tensor], masks: Sequence[Tensor | None]) -> bool:
    """Whether a free entry of an inner parameter that goes into a function with a kink at 0 is exactly 0."""
    ids = {id(tensor) for tensor in kinked}
    return any(
        id(w) in ids and bool(((w == 0) if mask is None else (w == 0) & mask).any())
        for w, mask in zip(inner, masks, strict=True)
    )


def find_kinks(gradient_at: Callable[[Tensor], Tensor], point: Tensor, scale: Tensor, eps: float) -> Kinks:
    """Kinks of a function at `point`, by at most 50 gradients, however many entries there are.

    All entries are moved by random numbers s at once, to both sides: `D(h) = g(w + h s) - g(w - h s)` goes to 0 with h
    where g is smooth, and to the jump where it is not. At a kink of a single entry (an L1 penalty), or of a group at
    its tip (a group lasso), `s_i D_i > 0` for all s; at one of another direction (a hinge at its margin, a ReLU at
    its boundary) the sign of `D_i` depends on the other entries. An entry is held if the loss does not fall to the side
    to which its gradient at `point` would send it.

    Args:
        gradient_at: (n,) -> (n,), NaN where it is not defined.
        point: (n,).
        scale: (n,): lengths that the parameters differ by; 0 for entries that stay as they are.
        eps: machine precision of the parameters.
    """
    far, ratio = eps**0.5 * scale, eps**0.25
    near = ratio * far  # no other kink is likely to be so near
    generator = torch.Generator().manual_seed(0)
    jumps = torch.ones_like(point, dtype=torch.bool)  # in every direction so far
    least, most = torch.full_like(point, torch.inf), torch.full_like(point, -torch.inf)  # these bound what pushes back
    for _ in range(_PROBES):
        direction = torch.rand(point.shape, generator=generator, dtype=point.dtype) * 2 - 1
        direction += direction.sign()  # entries of 1 to 2: no sum of few is 0

        def difference(step: Tensor, direction: Tensor = direction) -> Tensor:
            result = gradient_at(point + step * direction) - gradient_at(point - step * direction)
            return torch.where(scale > 0, result, 0).nan_to_num(0, 0, 0)

        smooth = difference(far)
        jump, again = difference(near) - ratio * smooth, difference(0.9 * near) - 0.9 * ratio * smooth
        rounding = torch.maximum(eps**0.5 * smooth.abs().amax(), (jump - again).abs().amax())
        clear = jump.abs() > _CLEAR * torch.maximum(ratio * smooth.abs(), rounding)
        jumps &= clear
        if not bool(jumps.any()):
            return Kinks(jumps, 0)
        push = direction.sign() * jump
        least, most = torch.minimum(least, push), torch.maximum(most, push)
    inward, outward = jumps & (least > 0), jumps & (most < 0)
    if not torch.equal(inward | outward, jumps):
        return Kinks(torch.zeros_like(jumps), int(jumps.sum()))
    descent = torch.where(inward, -gradient_at(point).nan_to_num(0, 0, 0), 0)
    relative = descent.abs() / descent.abs().amax().clamp(min=torch.finfo(point.dtype).tiny)
    slope = gradient_at(point + far * descent.sign() * relative.clamp(min=0.01)) * descent.sign()
    return Kinks(inward & (slope >= -_RESISTANCE * least), 0)
