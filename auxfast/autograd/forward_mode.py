"""Forward-mode AD for functions that find their parameters themselves: tangents are put on the tensors in place."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.nn.functional import mse_loss
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from auxfast.autograd.transforms import in_transform_of_torch_func

_without_versions: Any = getattr(torch.autograd, "_unsafe_preserve_version_counter", None)
_shows_another: Callable[[Tensor], bool] | None = getattr(Tensor, "_is_view", None)
_follow_tangents: Any = getattr(forward_ad, "_set_fwd_grad_enabled", None)
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
        kwargs = kwargs or {}
        if func is mse_loss:
            args, kwargs = _all_with_tangents(args, kwargs)
        result = func(*args, **kwargs)
        for tensor in _as_tuple(result):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tangent = tangent_of(tensor)
                if tangent is not None and tangent.requires_grad and _shows_another and not _shows_another(tangent):
                    tangent.detach_()  # a view has no part of its own in the graph where what it shows has none
        return result


def _as_tuple(result: Any) -> Sequence[Any]:
    return result if isinstance(result, (tuple, list)) else (result,)


def _all_with_tangents(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with tangents of 0 where others have some: the backward pass of `mse_loss` fails where one of its
    tensors has none."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    missing = {id(each) for each in tensors if tangent_of(each) is None}
    if len(missing) == len(tensors):
        return args, kwargs

    def filled(given: Any) -> Any:
        if id(given) not in missing:
            return given
        dense = given.contiguous()  # none that is expanded
        return _dual(dense, torch.zeros_like(dense))

    return tuple(map(filled, args)), {name: filled(given) for name, given in kwargs.items()}


class graph_constants(TorchFunctionMode):
    """While active, what a forward pass computes without a graph has no tangent, as it is a constant for autograd: what
    is computed under `torch.no_grad()`, and gradients that `torch.autograd.grad` returns without `create_graph`.

    Args:
        in_backward: whether it is a backward pass that runs, which computes all without a graph. What checkpoints
            compute again in it is a forward pass.

    Raises:
        NotImplementedError: something is computed under `torch.no_grad()`, and this version of torch does not tell how
            to leave tangents out.
    """

    def __init__(self, in_backward: bool = False) -> None:
        super().__init__()
        self._in_backward = in_backward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._in_backward and not _in_checkpoint():
            return func(*args, **kwargs)
        followed = torch.is_grad_enabled()
        if not (followed or forward_ad._is_fwd_grad_enabled()):  # in the forward pass of a Function, without tangents
            return func(*args, **kwargs)
        with nullcontext() if followed or _follow_tangents is None else _follow_tangents(False):
            result = func(*args, **kwargs)
        if in_transform_of_torch_func():
            return result
        if not followed and _follow_tangents is None and any(map(_is_stray, _as_tuple(result))):
            raise NotImplementedError(
                "this version of torch follows tangents under torch.no_grad(): compute nothing from the parameters "
                "there, or pass curvature='hessian'"
            )
        if isinstance(result, (tuple, list)) and any(map(_is_stray, result)):
            return getattr(result, "_make", type(result))([_without_tangent(each, args) for each in result])
        return _without_tangent(result, args)


def _in_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != checkpoint.__file__:
        frame = frame.f_back
    return frame is not None


def _without_tangent(result: Any, args: Any) -> Any:
    """`result`, or what shows its values, if it has a tangent that it should not have."""
    return result.detach() if _is_stray(result) and not any(result is each for each in args) else result


def _is_stray(result: Any) -> bool:
    if not isinstance(result, Tensor) or result.layout != torch.strided:
        return False
    has_graph = torch.is_grad_enabled() and result.requires_grad  # a view of a leaf says that it does in any case
    return not has_graph and tangent_of(result) is not None


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
