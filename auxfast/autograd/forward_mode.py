"""Forward-mode AD for functions that find their parameters themselves: tangents are put on the tensors in place."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

_without_versions: Any = getattr(torch.autograd, "_unsafe_preserve_version_counter", None)
_shows_another: Callable[[Tensor], bool] | None = getattr(Tensor, "_is_view", None)
_one_at_a_time = threading.RLock()


@contextmanager
def tangents_on(tensors: Sequence[Tensor], vectors: Sequence[Tensor]) -> Iterator[None]:
    """While active, `tensors` have `vectors` for tangents, and what is computed from them carries tangents of its own,
    see `tangent_of`: gradients too, whose tangents are products with second derivatives. The tensors keep their bits
    and their versions. torch has one level of tangents for all threads, so that one of them waits for another here.

    Args:
        vectors: of the shapes, dtypes and devices of `tensors`; they must stay as they are while this is active.
    """
    with _one_at_a_time, forward_ad.dual_level():
        with torch.no_grad(), nullcontext() if _without_versions is None else _without_versions(tuple(tensors)):
            for tensor, vector in zip(tensors, vectors, strict=True):
                tensor.copy_(_dual(tensor.detach(), vector.detach()))
        with _WithoutGraph():
            yield


class _WithoutGraph(TorchFunctionMode):
    """Cuts tangents off from autograd's graph as they are made. torch records their computation beside that of what
    they are tangents of, which would keep as much in memory once more."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tangent = tangent_of(tensor)
                if tangent is not None and tangent.requires_grad and _shows_another and not _shows_another(tangent):
                    tangent.detach_()  # a view has no part of its own in the graph where what it shows has none
        return result


def _dual(tensor: Tensor, tangent: Tensor) -> Tensor:
    with warnings.catch_warnings():  # the first call of a process loads what torch itself deprecates
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        dual: Tensor = forward_ad.make_dual(tensor, tangent)
        return dual


def tangent_of(tensor: Tensor | None) -> Tensor | None:
    """The tangent, without one of its own; `None` where there is no tensor, or nothing that it depends on has one."""
    return None if tensor is None else forward_ad.unpack_dual(tensor).tangent


def function_without_tangents(error: BaseException) -> str | None:
    """The name of the `torch.autograd.Function` that has raised `error`, for it has no `jvp` of its own; `None` where
    it is something else that did."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code is not torch.autograd.Function.jvp.__code__:
        return None
    context = trace.tb_frame.f_locals["ctx"]
    return type(context).__name__ if isinstance(context, BackwardCFunction) else "a torch.autograd.Function"
