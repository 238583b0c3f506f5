"""A GPU that is none: tensors on the CPU that say they are on a GPU, and a count of the kernels that it would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
_STREAM = "the default stream"
_PROPERTIES = SimpleNamespace(total_memory=141 << 30)

LAUNCHES = {
    "auxfast.neumann_step_": 1,
    "auxfast.neumann_guarded_step_": 2,
    "auxfast.linear_combination_": 2,
    "auxfast.row_dots": 2,
    "auxfast.conjugate_gradient_step_": 6,
    "auxfast.minres_step_": 7,
    "auxfast.combiner_forward": 2,
    "auxfast.combiner_backward_phi": 2,
    "auxfast.combiner_second_order": 2,
    "auxfast.combiner_hessian": 1,
    "auxfast.loss_image_forward": 8,
    "auxfast.loss_image_backward_phi": 9,
    "auxfast.loss_image_second_order": 13,
    "auxfast.loss_image_hessian": 6,
    "aten._foreach_norm": 3,  # zeros, the sums of blocks, and their sums
}
"""Kernels of the operations that launch several, at the sizes of benchmarks/gpu/static.py: tests/cuda_on_cpu counts
those of auxfast."""

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
_SAME_MEMORY = {"_unsafe_view"}  # beside the views
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}  # for a number, or for the size of the result
_INDEXING = {"index", "index_put_", "_index_put_impl_"}  # these take indices of the host
_DESCRIBED_ON_THE_HOST = {"neumann_step_"}  # one argument is memory of the host, which no kernel reads
_GETTERS: dict[Any, Callable[[torch.device], object]] = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_cpu.__get__: lambda device: device == CPU,
    Tensor.is_cuda.__get__: lambda device: device == GPU,
}


class EmulatedGPU:
    """A context in which all tensors that are there already, and all that are made from them, say that they are on a
    GPU. auxfast then does what it does on one: it takes its kernels, and looks at numbers as seldom.

    Tensors made from memory of the host, or with no `device` and from no other tensor, are on the host, where nothing
    is launched. Operations that mix the two raise an error, as they do on a GPU.

    An operation of ATen counts as one launch, a view or an allocation as none. What a library does within one is not
    seen: cuBLAS launches a second kernel where it splits a small product along its inner axis.

    Attributes:
        launches: kernels by the name of the operation, such as `aten.mul` or `auxfast.neumann_step_`, and copies within
            the GPU's memory.
        waits: how often the host waits for the device, by the reason: numbers that it reads, and copies to the device
            of what is in pageable memory.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._host: dict[int, Any] = {}  # storages; kept, so that no other gets the address of one
        self._target: torch.device | None = None  # of what a function makes; None within code of C++ alone
        self._is_inside = False  # of an operation, which is counted as a whole
        self._modes = ExitStack()

    def __enter__(self) -> EmulatedGPU:
        with ExitStack() as stack:
            for module in ("_native", "ops.inputs"):
                stack.enter_context(patch(f"auxfast.{module}.has_kernels", lambda device: True))
            stack.enter_context(patch("torch.cuda.is_current_stream_capturing", lambda: False))
            stack.enter_context(patch("torch.cuda.get_device_properties", lambda device: _PROPERTIES))
            stack.enter_context(patch("torch.cuda.current_stream", lambda device=None: _STREAM))
            # torch.autograd.grad would turn the interception of functions off for all of the backward pass.
            stack.enter_context(patch.object(torch.autograd, "has_torch_function", lambda tensors: False))
            stack.enter_context(patch.object(torch, "Generator", _generator))
            stack.enter_context(_Functions(self._call))
            stack.enter_context(_Operations(self._operate))
            self._modes = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._modes.close()

    def launches_of(self, namespace: str) -> int:
        """The kernels of the operations of "aten" or "auxfast"."""
        return sum(count for name, count in self.launches.items() if name.startswith(f"{namespace}."))

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A function of torch, called from Python."""
        if self._is_inside:
            return function(*args, **kwargs)
        if function in _GETTERS:
            return _GETTERS[function](self._device(args[0]))
        if function in (Tensor.numpy, Tensor.__array__) and self._device(args[0]) == GPU:
            raise TypeError("a tensor on the GPU has no memory of the host: call cpu() first")
        if function == Tensor.tolist and self._device(args[0]) == GPU:
            self.waits["tolist"] += 1
        target = CPU if function == Tensor.cpu else _target(function, args, kwargs)
        if function == Tensor.to and isinstance(args[-1], Tensor) and len(args) > 1:
            target = self._device(args[-1])
        given = _tensors((*args, *kwargs.values()))
        made_on = target or (GPU if any(self._device(tensor) == GPU for tensor in given) else CPU)
        args, kwargs = tuple(map(_here, args)), {name: _here(value) for name, value in kwargs.items()}
        before, self._target = self._target, made_on
        try:
            result = function(*args, **kwargs)
        finally:
            self._target = before
        if function in (Tensor.cpu, Tensor.to) and target is not None and target != self._device(result):
            return self._moved(result, target)
        return result

    def _operate(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An operation of ATen or of auxfast, wherever it was called."""
        if self._is_inside:
            return operation(*args, **kwargs)
        namespace, _, name = operation.name().partition("::")
        name = name.partition(".")[0]
        with self._inside():
            given = [*_tensors((*args, *kwargs.values()))]
            devices = [self._device(tensor) for tensor in given]
            if name == "loss_image_forward":  # the CPU's kernels keep no record of the activations
                args = (*args[:-1], False)
            result = operation(*args, **kwargs)
            made = [*_tensors((result,))]
            if name == "lift_fresh":  # from_numpy is no function that is intercepted
                device = self._target or CPU
            elif not given:  # within C++ it is like other tensors
                device = self._target or GPU
            elif name == "copy_":
                device = devices[0]
            else:
                device = GPU if GPU in devices else CPU
            if device == CPU and devices[1:] != [GPU]:
                self._host |= {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in made}
                return result
            if name == "lift_fresh" or (name == "copy_" and devices[0] != devices[1]):
                self.waits["copy to the device" if device == GPU else "copy to the host"] += 1
                return result
            indices = [tensor for tensor, at in zip(given, devices, strict=True) if at == CPU and tensor.dim()]
            if indices and name not in _INDEXING | _DESCRIBED_ON_THE_HOST:
                raise RuntimeError(f"{operation} was called with tensors on the GPU and on the host")
            if indices and name in _INDEXING:
                self.waits["copy to the device"] += 1
            masks = name in _INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
            if name in _WAITING or masks:
                self.waits[name] += 1
            is_launched = not (operation.is_view or name in _ALLOCATIONS | _SAME_MEMORY | {"_local_scalar_dense"})
            if is_launched and (not made or any(tensor.numel() for tensor in made)):
                full_name = f"{namespace}.{name}"
                self.launches[full_name] += (
                    LAUNCHES[full_name] if namespace == "auxfast" else LAUNCHES.get(full_name, 1)
                )
            return result

    def _device(self, tensor: Tensor) -> torch.device:
        return CPU if id(tensor.untyped_storage()) in self._host else GPU

    def _moved(self, tensor: Tensor, target: torch.device) -> Tensor:
        self.waits[f"copy to the {'device' if target == GPU else 'host'}"] += 1
        with self._inside():
            copy = tensor.clone()
            if target == CPU:
                self._host[id(copy.untyped_storage())] = copy.untyped_storage()
            return copy

    @contextmanager
    def _inside(self) -> Iterator[None]:
        before, self._is_inside = self._is_inside, True
        try:
            yield
        finally:
            self._is_inside = before


class _Functions(TorchFunctionMode):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._call(function, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, operate: Callable[..., Any]) -> None:
        super().__init__()
        self._operate = operate

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # or what this asks of tensors would pass for the work of a hook
            return self._operate(operation, args, kwargs or {})


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the values, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _target(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device | None:
    """The device that a call names."""
    named = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
    named += [torch.device(value) for value in (kwargs.get("device"),) if isinstance(value, str)]
    if function == Tensor.to:
        named += [torch.device(value) for value in args if isinstance(value, str)]
    return None if not named else GPU if named[0].type == "cuda" else named[0]


def _generator(device: object = CPU, make: Callable[[], torch.Generator] = torch.Generator) -> torch.Generator:
    return make()


def _here(value: Any) -> Any:
    """An argument for the CPU."""
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value
