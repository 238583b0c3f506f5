"""The Neumann steps: the updates of the series and its squared residual norm, over a whole list at once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from auxfast._native import use_native

STEP_SCHEMA = (
    "neumann_step_(Tensor(a!) v, Tensor[] hv, Tensor(b!) p, Tensor(c!) sums, Tensor layout, int row, float step_size) "
    "-> ()"
)
GUARDED_STEP_SCHEMA = (
    "neumann_guarded_step_(Tensor[] v, Tensor(a!)[] v_before, Tensor[] hv, Tensor(b!)[] p, Tensor(c!) numbers, "
    "float step_size) -> ()"
)

SQUARE, BEFORE, SMALLEST, OF_PRODUCT, GREW, STEPS = range(6)
"""Numbers of a guarded series: the squared norm of the last v and of the one before; the smallest so far; that of the
last product; 1 once the norm has grown or is not finite; and how many steps were taken."""
GUARDED_NUMBERS = 6
GROWTH = 1.002
"""Factor by which a squared norm must rise to count as growing: less may be rounding."""
TILE_ELEMENTS = 128
CUDA_SUMS = 132 * 8
"""Columns of `sums` on CUDA, one for each block of a step; this and TILE_ELEMENTS are explained in neumann.h."""
_ROWS = 16
"""Steps whose sums are kept until they are added up: more than a solver takes between two looks on a GPU."""

_KERNEL_DTYPES = (torch.float32, torch.float64)
_LIBRARY = torch.library.Library("auxfast", "FRAGMENT")
_LIBRARY.define(STEP_SCHEMA)
_LIBRARY.define(GUARDED_STEP_SCHEMA)


class NeumannSteps:
    """A Neumann series (the loop of the paper's Algorithm 2) and its residuals, begun with `v = p = step_size * start`.

    What does not change in a series is prepared once: all tensors of v lie in one piece of memory, and so do those of
    p, so that a step is told of `hv` alone. On a GPU a step is one launch. The norms are added up when they are asked
    for, all by one launch, and nothing waits for the device.

    float32 and float64 run on the kernels, in an order of additions that depends on the sizes only; other dtypes run on
    the reference.

    Args:
        start: the right-hand side b, a list of at least one tensor, of any shapes, all of one dtype and on one device.
        step_size: the paper's alpha.

    Attributes:
        v, p: tensors of the shapes of `start`, with its strides where it is dense in memory. Each begins at a multiple
            of TILE_ELEMENTS of the memory that they share.
        unread: how many norms `squares` would return.

    Raises:
        RuntimeError: dtypes or devices differ, or a tensor requires a gradient where gradients are recorded.
    """

    def __init__(self, start: Sequence[Tensor], step_size: float) -> None:
        first, places = start[0], []
        layout, size = array("q"), 0
        for tensor in start:
            shape, strides = tensor.shape, _strides_of_a_copy(tensor)
            places.append((shape, strides, size))
            layout.extend((len(shape), *shape, *strides))
            size += -(-tensor.numel() // TILE_ELEMENTS) * TILE_ELEMENTS
        self._step_size = step_size
        self._native = use_native(first.device) and first.dtype in _KERNEL_DTYPES
        self._flat = first.new_zeros(size), first.new_zeros(size)
        self.v, self.p = ([flat.as_strided(*place) for place in places] for flat in self._flat)
        self._layout = torch.frombuffer(layout, dtype=torch.int64)
        columns = CUDA_SUMS if self._native and first.is_cuda else 1
        self._sums = first.new_zeros(_ROWS, columns, dtype=_norm_dtype(first.device))
        self._column = self._sums.view(-1) if columns == 1 else None
        self._added: list[Tensor] = []
        self.unread = 0
        self._advance(start, -step_size)  # v and p are zeros: both become step_size * start

    def step(self, hv: Sequence[Tensor]) -> None:
        """Does, in place, `v <- v - step_size * hv` and `p <- p + v`.

        So v is `step_size` times the residual `b - H x` of the solution `x = p` before the step, if `hv` is `H v`
        (csrc/neumann/neumann_math.h proves it).

        Args:
            hv: tensors of the shapes, dtype and device of v; any strides (other than v's cost a copy); v itself, too.

        Raises:
            RuntimeError: a list of another length; shapes, dtypes or devices that differ; or a tensor that requires a
                gradient where gradients are recorded.
        """
        self._advance(hv, self._step_size)

    def squares(self) -> Tensor:
        """The squared norms of v after the start and each step since this was called last: (steps,), float64 on the
        device (float32 where it has no float64)."""
        added = [*self._added, self._sums[: self.unread - _ROWS * len(self._added)].sum(1)]
        self._added, self.unread = [], 0
        return added[0] if len(added) == 1 else torch.cat(added)

    def read(self) -> list[float]:
        """The same on the host. Waits for the device."""
        if self._column is None or self._added:
            return self.squares().tolist()
        squares: list[float] = self._column.tolist()[: self.unread]  # half of a step's time less
        self.unread = 0
        return squares

    def _advance(self, hv: Sequence[Tensor], step_size: float) -> None:
        _refuse_gradients("neumann_step_", hv)
        if len(hv) != len(self.v):
            raise RuntimeError(f"neumann_step_: hv and v must be lists of one length, not {len(hv)} and {len(self.v)}")
        row = self.unread % _ROWS
        if row == 0 and self.unread > 0:
            self._added.append(self._sums.sum(1))
        if self._native:
            v, p = self._flat
            torch.ops.auxfast.neumann_step_.default(v, hv, p, self._sums, self._layout, row, step_size)
            # As torch's own in-place operations do: who saved old values for a backward pass gets an error.
            torch.autograd.graph.increment_version(self._flat)
        else:
            self._sums[row, 0] = neumann_step_reference_(self.v, hv, self.p, step_size)
        self.unread += 1


def _strides_of_a_copy(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides where it is dense in memory, in whatever order of dimensions."""
    return tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor, device="meta").stride()


def _refuse_gradients(op: str, *lists: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensors in lists for tensor in tensors):
        raise RuntimeError(f"{op} is not differentiable: detach its tensors, or call it in torch.no_grad()")


def neumann_step_reference_(v: Sequence[Tensor], hv: Sequence[Tensor], p: Sequence[Tensor], step_size: float) -> Tensor:
    """A step of `NeumannSteps` in PyTorch operations, for any device and floating dtype; the kernels are tested against
    it. Returns the squared norm of the new v, 0-dim."""
    _check("neumann_step_", v=v, hv=hv, p=p)
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

    float32 and float64 run on the kernels, two launches on a GPU, in an order of additions that depends on the sizes
    only; other dtypes run on the reference.

    Args:
        v, v_before, p: lists of tensors of any shapes, all of one dtype and on one device; dense in memory, with the
            same strides. `v_before` has the terms before those of `v`, zeros at first.
        hv: `H v`, of the shapes, dtype and device of `v`; any strides (other than `v`'s cost a copy).
        numbers: (GUARDED_NUMBERS,) float64 on the device, see SQUARE.
        step_size: the paper's alpha.

    Raises:
        RuntimeError: lists of different length or empty; shapes, dtypes or devices that differ; tensors that are not
            dense; or a tensor that requires a gradient where gradients are recorded.
    """
    _refuse_gradients("neumann_guarded_step_", v, v_before, hv, p)
    if v and use_native(v[0].device) and v[0].dtype in _KERNEL_DTYPES:
        torch.ops.auxfast.neumann_guarded_step_.default(v, v_before, hv, p, numbers, step_size)
        torch.autograd.graph.increment_version((*v_before, *p, numbers))
    else:
        neumann_guarded_step_reference_(v, v_before, hv, p, numbers, step_size)


def neumann_guarded_step_reference_(
    v: Sequence[Tensor],
    v_before: Sequence[Tensor],
    hv: Sequence[Tensor],
    p: Sequence[Tensor],
    numbers: Tensor,
    step_size: float,
) -> None:
    """`neumann_guarded_step_` in PyTorch operations."""
    _check("neumann_guarded_step_", v=v, v_before=v_before, hv=hv, p=p)
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
            torch.fmin(square, smallest),
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


def _check(op: str, **lists: Sequence[Tensor]) -> None:
    """Checks of the kernels, for the references: `_foreach_add_` would broadcast, promote, or fall silent."""
    v, lengths = lists["v"], [len(tensors) for tensors in lists.values()]
    if not v or len(set(lengths)) > 1:
        names = ", ".join(lists)
        raise RuntimeError(f"auxfast::{op}: {names} must be lists of one length >= 1, not {lengths}")
    if not v[0].is_floating_point():
        raise RuntimeError(f"auxfast::{op}: v[0] must be of a floating dtype, not {v[0].dtype}")
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            _check_element(op, f"{name}[{i}]", tensor, v[i].shape, v[0])


def _check_element(op: str, name: str, tensor: Tensor, shape: torch.Size, like: Tensor) -> None:
    for what, given, wanted in (
        ("shape", tuple(tensor.shape), tuple(shape)),
        ("dtype", tensor.dtype, like.dtype),
        ("device", tensor.device, like.device),
    ):
        if given != wanted:
            raise RuntimeError(f"auxfast::{op}: {name} has {what} {given}, not {wanted}")


def _fake_step(
    v: Tensor, hv: Sequence[Tensor], p: Tensor, sums: Tensor, layout: Tensor, row: int, step_size: float
) -> None:
    for i, tensor in enumerate(hv):
        _check_element("neumann_step_", f"hv[{i}]", tensor, tensor.shape, v)


def _fake_guarded_step(
    v: Sequence[Tensor],
    v_before: Sequence[Tensor],
    hv: Sequence[Tensor],
    p: Sequence[Tensor],
    numbers: Tensor,
    step_size: float,
) -> None:
    _check("neumann_guarded_step_", v=v, v_before=v_before, hv=hv, p=p)


_LIBRARY.impl("neumann_guarded_step_", neumann_guarded_step_reference_, "CompositeExplicitAutograd")
torch.library.register_fake("auxfast::neumann_step_", _fake_step, lib=_LIBRARY)
torch.library.register_fake("auxfast::neumann_guarded_step_", _fake_guarded_step, lib=_LIBRARY)
