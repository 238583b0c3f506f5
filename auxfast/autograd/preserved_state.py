"""Forward passes that leave no trace in buffers of modules and in torch's random states."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import Module, register_module_forward_hook, register_module_forward_pre_hook

Result = TypeVar("Result")
RandomStates = Sequence[tuple[torch.Generator, Tensor]]


class preserved_state:
    """While active, forward passes leave no trace: when it ends, the buffers of modules that were called (BatchNorm's
    statistics, the vectors of spectral norm, ...) and torch's random states (CPU, CUDA, XPU) are what they were before.

        with auxfast.preserved_state():
            outer_loss = criterion(net(held_out), labels)

    The modules work on copies of their buffers, put in place when they are first called. The buffers themselves are
    never written, so that graphs made before stay valid, and those made inside keep their copies. A module is protected
    with all its submodules, whatever calls it: `torch.func.functional_call`, parametrizations, `torch.compile`. Guards
    may be nested, and an exception undoes them like the end does.

    Not covered: plain attributes and parameters that a forward pass assigns, buffers that require gradients, lazy
    modules before their first call, modules inside of a compiled function, TorchScript, and the random numbers of
    Python and NumPy. A buffer that a forward pass registers, or replaces by one of another shape, is taken for a cache
    and stays.
    """

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}  # by the id of the buffer they stand in for
        self._originals: dict[int, tuple[Tensor, Tensor | None]] = {}  # by id: the copy (kept alive), and the buffer
        self._touched: dict[int, Module] = {}
        self._calls = threading.local()  # one outermost call for each thread: backward passes may recompute in theirs

    def __enter__(self) -> preserved_state:
        self._random = _random_states()
        if not _active:
            _hooks.append(register_module_forward_pre_hook(_before))
            _hooks.append(register_module_forward_hook(_after, always_call=True))
        _active.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _active.remove(self)
        if not _active:
            while _hooks:
                _hooks.pop().remove()
        if (call := getattr(self._calls, "outermost", None)) is not None:  # a KeyboardInterrupt has cut it short
            self._leave(call.root)
        for module in self._touched.values():
            for name, buffer in module._buffers.items():
                if id(buffer) in self._originals:
                    module._buffers[name] = self._originals[id(buffer)][1]
        _restore(self._random)

    def replay(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """`function`, such that every call starts from the buffers and the random states of the first call, and draws
        the same dropout masks. The first call starts from the present random states and moves them on."""
        start: list[tuple[torch.Generator, Tensor]] = []

        @functools.wraps(function)
        def replayed() -> Result:
            first = not start
            if first:
                start.extend(_random_states())
            with preserved_state():
                _restore(start)
                result = function()
                end = _random_states() if first else ()
            _restore(end)
            return result

        return replayed

    def _enter(self, module: Module) -> None:
        call = getattr(self._calls, "outermost", None)
        if call is None:
            call = self._calls.outermost = _Call(module)
        if id(module) in call.modules:
            return
        for part in module.modules():
            call.modules.add(id(part))
            if part._buffers and not isinstance(part, torch.jit.ScriptModule):
                self._touched[id(part)] = part
                for name, buffer in part._buffers.items():
                    part._buffers[name] = stand_in = self._stand_in(buffer)
                    call.start.append((part, name, stand_in))

    def _leave(self, module: Module) -> None:
        """Notes what an outermost call has put in the place of a buffer: in the end the buffer replaces it."""
        call = getattr(self._calls, "outermost", None)
        if call is None or call.root is not module:
            return
        self._calls.outermost = None
        for part, name, before in call.start:
            now = part._buffers.get(name)
            if now is not None and now is not before and (before is None or now.shape == before.shape):
                original = None if before is None else self._originals.get(id(before), (before, before))[1]
                self._originals[id(now)] = (now, original)

    def _stand_in(self, buffer: Tensor | None) -> Tensor | None:
        if buffer is None or id(buffer) in self._originals or buffer.requires_grad:
            return buffer
        if torch.nn.parameter.is_lazy(buffer):
            return buffer
        if id(buffer) not in self._copies:
            copy = self._copies[id(buffer)] = _plain_copy(buffer)
            self._originals[id(copy)] = (copy, buffer)
        return self._copies[id(buffer)]


_without_transforms: Any = getattr(torch._C, "_DisableFuncTorch", None)


def _plain_copy(buffer: Tensor) -> Tensor:
    """A copy outside of inference_mode and of the transforms of torch.func, since one made inside is of no use after
    them. Where torch has no name for that, another thread makes the copy: both belong to a thread."""
    if _without_transforms is None:
        with ThreadPoolExecutor(1) as elsewhere:
            return elsewhere.submit(buffer.clone).result()
    with torch.inference_mode(False), torch.no_grad(), _without_transforms():
        return buffer.clone()


class _Call:
    """The outermost of the calls under way."""

    def __init__(self, root: Module) -> None:
        self.root = root
        self.modules: set[int] = set()  # ids of the modules whose buffers were looked at
        self.start: list[tuple[Module, str, Tensor | None]] = []  # their buffers when the call began


_active: list[preserved_state] = []  # the innermost comes last, and is the one that acts
_hooks: list[Any] = []


def _before(module: Module, args: Any) -> None:
    if _active and not torch.compiler.is_compiling():  # compiled code would keep the hook for ever
        _active[-1]._enter(module)


def _after(module: Module, args: Any, result: Any) -> None:
    if _active and not torch.compiler.is_compiling():
        _active[-1]._leave(module)


def _random_states() -> list[tuple[torch.Generator, Tensor]]:
    generators = [torch.default_generator]
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():
            generators.extend(backend.default_generators)
    return [(generator, generator.get_state()) for generator in generators]


def _restore(states: RandomStates) -> None:
    for generator, state in states:
        generator.set_state(state)
