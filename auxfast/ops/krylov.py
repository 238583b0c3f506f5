"""The vector work of Krylov solvers, on k rows at once: linear combinations with their squared norms, dot products.

Every row is a system of its own with its own coefficients, which stay on the device, as do the sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from auxfast._native import use_native

LINEAR_COMBINATION_SCHEMA = "linear_combination_(Tensor(a!) out, Tensor[] terms, Tensor coefficients) -> Tensor"
ROW_DOTS_SCHEMA = "row_dots(Tensor a, Tensor b) -> Tensor"

_MOST_TERMS = 3
_KERNEL_DTYPES = (torch.float32, torch.float64)
_LIBRARY = torch.library.Library("auxfast", "FRAGMENT")
_LIBRARY.define(LINEAR_COMBINATION_SCHEMA)
_LIBRARY.define(ROW_DOTS_SCHEMA)


def linear_combination_(out: Tensor, terms: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Linear combination of k rows, in one pass and in place:

        out <- coefficients[0] * out + sum_i coefficients[1 + i] * terms[i]        returns each row's sum of out^2

    A coefficient of exactly 0 leaves its operand out, whatever it holds (0 * nan = 0): coefficients (1, 0, ..) freeze
    a row, and 0 for `out` overwrites it.

    Args:
        out: (k, n), contiguous; k and n may be 0.
        terms: one to three tensors of the shape, dtype and device of `out`, contiguous; each shares no memory with
            `out` or is `out` itself.
        coefficients: (1 + number of terms, k) float64 on the same device; rounded to the dtype of `out`, or to float32
            if that is narrower, before they are used.

    Returns:
        (k,) float64 on the device: the squared Euclidean norms of the new rows. Nothing waits for the device to
        finish. Not differentiable.

    float32 and float64 run on the kernels, in an order of additions that depends on k and n only; other dtypes run on
    the reference.

    Raises:
        RuntimeError: shapes, dtypes, devices or layouts other than these; a term that overlaps `out` in part; or a
            tensor that requires a gradient where gradients are recorded.
    """
    _refuse_gradients("linear_combination_", out, *terms, coefficients)
    if use_native(out.device) and out.dtype in _KERNEL_DTYPES:
        squares: Tensor = torch.ops.auxfast.linear_combination_.default(out, terms, coefficients)
        torch.autograd.graph.increment_version(out)  # as torch's own in-place operations do: whoever saved the
        return squares  # old values for a backward pass gets an error
    return linear_combination_reference_(out, terms, coefficients)


def linear_combination_reference_(out: Tensor, terms: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """`linear_combination_` in PyTorch operations, for any device with float64 and any floating dtype; the kernels are
    tested against it."""
    _check_combination(out, terms, coefficients)
    dtype = torch.promote_types(out.dtype, torch.float32)
    total = torch.zeros_like(out, dtype=dtype)
    for coefficient, operand in zip(coefficients.to(dtype)[..., None], (out, *terms), strict=True):  # (k, 1), (k, n)
        total = torch.where(coefficient == 0, total, total + coefficient * operand)
    out.copy_(total)
    return row_dots_reference(out, out)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """The k dot products of the rows of `a` and `b`, in one pass.

    Args:
        a: (k, n), contiguous; k and n may be 0.
        b: of the shape, dtype and device of `a`, contiguous; may be `a` itself.

    Returns:
        (k,) float64 on the device, from float64 products and sums. Nothing waits for the device to finish. Not
        differentiable.

    float32 and float64 run on the kernels, in an order of additions that depends on k and n only; other dtypes run on
    the reference.

    Raises:
        RuntimeError: shapes, dtypes, devices or layouts other than these; or a tensor that requires a gradient where
            gradients are recorded.
    """
    _refuse_gradients("row_dots", a, b)
    if use_native(a.device) and a.dtype in _KERNEL_DTYPES:
        dots: Tensor = torch.ops.auxfast.row_dots.default(a, b)
        return dots
    return row_dots_reference(a, b)


def row_dots_reference(a: Tensor, b: Tensor) -> Tensor:
    """`row_dots` in PyTorch operations."""
    _check_rows("row_dots", "a", a)
    _check_matches("row_dots", "b", b, "a", a)
    return torch.linalg.vecdot(a.double(), b.double())


def _refuse_gradients(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{op} is not differentiable: detach its arguments, or call it in torch.no_grad()")


def _check_combination(out: Tensor, terms: Sequence[Tensor], coefficients: Tensor) -> None:
    """Checks of the kernel, for the reference: torch's operations would broadcast and promote."""
    op = "linear_combination_"
    _check_rows(op, "out", out)
    if not 1 <= len(terms) <= _MOST_TERMS:
        raise RuntimeError(f"auxfast::{op}: terms must be 1 to {_MOST_TERMS} tensors, not {len(terms)}")
    for i, term in enumerate(terms):
        _check_matches(op, f"terms[{i}]", term, "out", out)
        if _overlaps_in_part(term, out):
            raise RuntimeError(f"auxfast::{op}: terms[{i}] and out share memory, but do not start together")
    for what, given, wanted in (
        ("shape", tuple(coefficients.shape), (1 + len(terms), len(out))),
        ("dtype", coefficients.dtype, torch.float64),
        ("device", coefficients.device, out.device),
    ):
        if given != wanted:
            raise RuntimeError(f"auxfast::{op}: coefficients has {what} {given}, not {wanted}")


def _check_rows(op: str, name: str, rows: Tensor) -> None:
    if not rows.is_floating_point():
        raise RuntimeError(f"auxfast::{op}: {name} must be of a floating dtype, not {rows.dtype}")
    if rows.dim() != 2 or not rows.is_contiguous():
        given = f"shape {tuple(rows.shape)} with strides {rows.stride()}"
        raise RuntimeError(f"auxfast::{op}: {name} must be a contiguous (k, n) tensor, not of {given}")


def _check_matches(op: str, name: str, rows: Tensor, like_name: str, like: Tensor) -> None:
    _check_rows(op, name, rows)
    for what, given, wanted in (
        ("shape", tuple(rows.shape), tuple(like.shape)),
        ("dtype", rows.dtype, like.dtype),
        ("device", rows.device, like.device),
    ):
        if given != wanted:
            raise RuntimeError(f"auxfast::{op}: {name} has {what} {given}, not {wanted} as {like_name}")


def _overlaps_in_part(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors of one shape and dtype share memory, but not element by element."""
    one_storage = a.untyped_storage() is b.untyped_storage()
    distance = a.storage_offset() - b.storage_offset()
    return one_storage and distance != 0 and -a.numel() < distance < a.numel()


def _linear_combination_fake(out: Tensor, terms: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    _check_combination(out, terms, coefficients)
    return out.new_empty(len(out), dtype=torch.float64)


def _row_dots_fake(a: Tensor, b: Tensor) -> Tensor:
    _check_rows("row_dots", "a", a)
    _check_matches("row_dots", "b", b, "a", a)
    return a.new_empty(len(a), dtype=torch.float64)


_LIBRARY.impl("linear_combination_", linear_combination_reference_, "CompositeExplicitAutograd")
_LIBRARY.impl("row_dots", row_dots_reference, "CompositeExplicitAutograd")
torch.library.register_fake("auxfast::linear_combination_", _linear_combination_fake, lib=_LIBRARY)
torch.library.register_fake("auxfast::row_dots", _row_dots_fake, lib=_LIBRARY)
