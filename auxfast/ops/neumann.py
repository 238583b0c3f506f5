"""The Neumann step: both updates of the series and its squared residual norm, over a whole list at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from auxfast._native import use_native

SCHEMA = "neumann_step_(Tensor(a!)[] v, Tensor[] hv, Tensor(b!)[] p, float step_size) -> Tensor"

SQUARE, BEFORE, SMALLEST, OF_PRODUCT, GREW, STEPS = range(6)
"""Numbers of a guarded series: the squared norm of the last v and of the one before; the smallest so far; that of the
last product; 1 once the norm has grown or is not finite; and how many steps were taken."""
GUARDED_NUMBERS = 6
GROWTH = 1.002
"""Factor by which a squared norm must rise to count as growing: less may be rounding."""

_KERNEL_DTYPES = (torch.float32, torch.float64)
_LIBRARY = torch.library.Library("auxfast", "FRAGMENT")
_LIBRARY.define(SCHEMA)


def neumann_step_(v: Sequence[Tensor], hv: Sequence[Tensor], p: Sequence[Tensor], step_size: float) -> Tensor:
    """One step of the Neumann series (the loop body of the paper's Algorithm 2), in place:

        v <- v - step_size * hv        p <- p + v        returns sum of v^2

    If `v = b - H x` before the step with `x = step_size * (p - v)`, as it is when both start as clones of
    `b`, then after it the new `v` is the residual of the solution that `p` held before
    (csrc/neumann/neumann_math.h proves it).

    Args:
        v: list of tensors of any shapes, all of one dtype and on one device; dense in memory.
        hv: `H v`, of the shapes, dtype and device of `v`; any strides (other than `v`'s cost a copy).
        p: like `v`, with its strides; shares no memory with it.
        step_size: the paper's alpha.

    Returns:
        The squared Euclidean norm of the new `v` over the whole list: a 0-dim float64 tensor on the device
        (nothing waits for the device to finish). Not differentiable.

    float32 and float64 run on the kernels, in an order of additions that depends on the sizes only; other
    dtypes run on the reference.

    Raises:
        RuntimeError: lists of different length or empty; shapes, dtypes or devices that differ; tensors of
            `v` or `p` that are not dense; or a tensor that requires a gradient where gradients are recorded.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for tensors in (v, hv, p) for t in tensors):
        raise RuntimeError("neumann_step_ is not differentiable: detach v, hv and p, or call it in torch.no_grad()")
    if v and use_native(v[0].device) and v[0].dtype in _KERNEL_DTYPES:
        squares: Tensor = torch.ops.auxfast.neumann_step_.default(v, hv, p, step_size)
        torch.autograd.graph.increment_version((*v, *p))  # as torch's own in-place operations do: whoever saved the
        return squares  # old values for a backward pass gets an error
    return neumann_step_reference_(v, hv, p, step_size)


def neumann_step_reference_(v: Sequence[Tensor], hv: Sequence[Tensor], p: Sequence[Tensor], step_size: float) -> Tensor:
    """`neumann_step_` in PyTorch operations, for any device and floating dtype; the kernels are tested against it."""
    _check(v, hv, p)
    v, hv, p = list(v), list(hv), list(p)
    torch._foreach_add_(v, hv, alpha=-step_size)
    torch._foreach_add_(p, v)
    return squared_norm(v)


def neumann_guarded_step_(
    v: Sequence[Tensor],
    v_before: Sequence[Tensor],
    hv: Sequence[Tensor],
    p: Sequence[Tensor],
    numbers: Tensor,
    step_size: float,
) -> None:
    """One step of a Neumann series that stops by itself where its norm grows, in place, without a word to the host:

        p <- p + v_before        v_before <- v - step_size * hv        unless numbers[GREW]

    The caller exchanges `v` and `v_before` after it. So `p` lags two terms behind, and holds, once the norm has grown,
    just the sum whose residual was smallest. Until then `p + v_before + v` is the whole sum.

    Args:
        v, v_before, hv, p: as for `neumann_step_`; `v_before` has the terms before those of `v`, zeros at first.
        numbers: (GUARDED_NUMBERS,) float64 on the device, see SQUARE.
        step_size: the paper's alpha.
    """
    _check(v, hv, p)
    _check(v_before, hv, p)
    goes = (numbers[GREW] == 0).to(numbers.dtype)
    new_v = [a - step_size * b for a, b in zip(v, hv, strict=True)]
    square, of_product = squared_norm(new_v), squared_norm(hv)
    for total, last, new in zip(p, v_before, new_v, strict=True):
        total.copy_(torch.where(goes != 0, total + last, total))
        last.copy_(torch.where(goes != 0, new, last))
    smallest = numbers[SMALLEST].clone()
    grew = ~(square <= GROWTH * smallest) | ~square.isfinite()
    new_numbers = torch.stack(
        [
            square,
            numbers[SQUARE],
            torch.minimum(square, smallest),
            of_product,
            grew.to(square.dtype),
            numbers[STEPS] + 1,
        ]
    )
    numbers.copy_(torch.where(goes != 0, new_numbers, numbers))


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares over all tensors: a 0-dim tensor on their device, float64 where the device has it."""
    dtype = _norm_dtype(tensors[0].device)
    return torch.stack(torch._foreach_norm(list(tensors), dtype=dtype)).square().sum()


def _norm_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _check(v: Sequence[Tensor], hv: Sequence[Tensor], p: Sequence[Tensor]) -> None:
    """Checks of the kernel, for the reference: `_foreach_add_` would broadcast, promote, or fall silent."""
    if not v or not len(v) == len(hv) == len(p):
        lengths = f"{len(v)}, {len(hv)} and {len(p)}"
        raise RuntimeError(f"auxfast::neumann_step_: v, hv and p must be lists of one length >= 1, not {lengths}")
    if not v[0].is_floating_point():
        raise RuntimeError(f"auxfast::neumann_step_: v[0] must be of a floating dtype, not {v[0].dtype}")
    for name, tensors in (("v", v), ("hv", hv), ("p", p)):
        for i, tensor in enumerate(tensors):
            for what, given, wanted in (
                ("shape", tuple(tensor.shape), tuple(v[i].shape)),
                ("dtype", tensor.dtype, v[0].dtype),
                ("device", tensor.device, v[0].device),
            ):
                if given != wanted:
                    raise RuntimeError(f"auxfast::neumann_step_: {name}[{i}] has {what} {given}, not {wanted}")


def _fake(v: Sequence[Tensor], hv: Sequence[Tensor], p: Sequence[Tensor], step_size: float) -> Tensor:
    _check(v, hv, p)
    return v[0].new_empty((), dtype=_norm_dtype(v[0].device))


_LIBRARY.impl("neumann_step_", neumann_step_reference_, "CompositeExplicitAutograd")
torch.library.register_fake("auxfast::neumann_step_", _fake, lib=_LIBRARY)
