"""Forward passes that leave no trace in buffers of modules and in torch's random states."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import Module, register_module_forward_hook, register_module_forward_pre_hook

from auxfast._callers import stacklevel
from auxfast.autograd.other_threads import OtherThreads, is_started_by_python

Result = TypeVar("Result")
RandomStates = Sequence[tuple[torch.Generator, Tensor]]

_DRAWN_ELSEWHERE = (
    "Random numbers were drawn within a preserved_state while another thread that may use torch was running. torch's "
    "random states belong to all threads, and to put them back could let the other thread draw the same numbers again: "
    "they stay as they are, and dropout masks may have differed from one call to the next."
)


class preserved_buffers:
    """While active, forward passes leave no trace in buffers; see `preserved_state`.

    Args:
        check: called with each module before it runs; what it raises ends the call.
    """

    def __init__(self, check: Callable[[Module], None] | None = None) -> None:
        self._check = check
        self._copies: dict[int, Tensor] = {}  # by the id of the buffer they stand in for
        self._originals: dict[int, tuple[Tensor, Tensor | None]] = {}  # by id: the copy (kept alive), and the buffer
        self._touched: dict[int, Module] = {}
        self._parts: dict[int, Module] = {}  # of the modules that were called, by id, which keeps the ids theirs
        self._bare: set[int] = set()  # ids of those that were parts of a module without any buffer
        self._called: set[int] = set()  # ids of modules called in its thread, under it or a guard around it
        self._calls = _Outermost()

    def __enter__(self) -> Any:
        with _lock:
            _register_hooks()
            _active.append(self)
        guards = _present.guards
        self._called = guards[-1]._called if guards else set()
        guards.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _present.guards.remove(self)
        if (call := self._calls.outermost) is not None:  # a KeyboardInterrupt has cut it short
            self._leave(call.root)
        with _lock:
            _active.remove(self)
            if not _active:
                _remove_hooks()
            for module in self._touched.values():
                for name, buffer in module._buffers.items():
                    if id(buffer) in self._originals:
                        module._buffers[name] = self._originals[id(buffer)][1]
            for guard in _active:
                guard._inherit(self._originals)

    @property
    def modules(self) -> list[Module]:
        """The modules that were called under it in its thread, with all their submodules."""
        return [*self._parts.values()]

    def _inherit(self, ended: dict[int, tuple[Tensor, Tensor | None]]) -> None:
        """Puts the buffers behind the copies of a guard that has ended in their place, where a guard of another thread
        has taken them for buffers."""
        for key, (copy, original) in self._originals.items():
            if id(original) in ended:
                self._originals[key] = (copy, ended[id(original)][1])

    def _enter(self, module: Module) -> None:
        if self._check is not None:
            self._check(module)
        call = self._calls.outermost
        if call is None and id(module) in self._bare and not len(module._buffers):  # the most frequent case
            return
        if call is not None and id(module) in call.modules:
            return
        parts = _parts_of(module)
        self._parts.update(parts)
        self._called.update(parts)
        if call is None:
            if not any(len(part._buffers) for part in parts.values()):
                self._bare.update(parts)
                return
            call = self._calls.outermost = _Call(module)
            with _lock:
                _register_hook_after()
        call.modules.update(parts)
        for part in parts.values():
            if len(part._buffers):
                self._touched[id(part)] = part
                with _lock:
                    for name, buffer in part._buffers.items():
                        part._buffers[name] = stand_in = self._stand_in(buffer)
                        call.start.append((part, name, stand_in))

    def _leave(self, module: Module) -> None:
        """Notes what an outermost call has put in the place of a buffer: in the end the buffer replaces it."""
        call = self._calls.outermost
        if call is None or call.root is not module:
            return
        self._calls.outermost = None
        for part, name, before in call.start:
            now = part._buffers[name] if name in part._buffers else None  # noqa: SIM401, TorchScript's have no get()
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


class preserved_state(preserved_buffers):
    """While active, forward passes leave no trace: when it ends, the buffers of modules that were called (BatchNorm's
    statistics, the vectors of spectral norm, ...) and torch's random states (CPU, CUDA, XPU) are what they were before.

        with auxfast.preserved_state():
            outer_loss = criterion(net(held_out), labels)

    The modules work on copies of their buffers, put in place when they are first called. The buffers themselves are
    never written, so that graphs made before stay valid, and those made inside keep their copies. A module is protected
    with all its submodules, whatever calls it: `torch.func.functional_call`, parametrizations, `torch.compile`. Guards
    may be nested, and an exception undoes them like the end does.

    **Threads.** A guard acts on the modules that its own thread calls, and autograd's threads for it, so that other
    threads can go on to train modules of their own. torch's random states, though, belong to all threads. If they have
    moved on while another thread that may use torch was running, they stay as they are, since that thread could else
    draw the same numbers again, and a RuntimeWarning says so. The main thread, threads of a pool, and those started
    with a function from a module that knows torch may use it.

    Not covered: plain attributes and parameters that a forward pass assigns, buffers that require gradients, lazy
    modules before their first call, modules inside of a compiled function, modules that two threads call at once,
    threads that the forward pass starts, and the random numbers of Python and NumPy. A buffer that a forward pass
    registers, or replaces by one of another shape, is taken for a cache and stays.

    Args:
        warn: give that warning.
        check: called with each module before it runs; what it raises ends the call.
    """

    def __init__(self, *, warn: bool = True, check: Callable[[Module], None] | None = None) -> None:
        super().__init__(check)
        self._warn = warn

    def __enter__(self) -> preserved_state:
        self._threads = OtherThreads()
        self._random = _random_states()
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if not self._threads.may_have_used_torch():
            _restore(self._random)
        elif self._warn and _differ(self._random, _random_states()):
            warnings.warn(_DRAWN_ELSEWHERE, RuntimeWarning, stacklevel=stacklevel())

    def replay(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """`function`, such that every call starts from the buffers and the random states of the first call, and draws
        the same dropout masks. The first call starts from the present random states and moves them on. If it does not,
        those that follow leave them to other threads."""
        ends: list[RandomStates] = []  # of the first call: before it, and after it
        draws: bool | None = None  # known at the second call: many losses are called once, and that takes 10 us

        @functools.wraps(function)
        def replayed() -> Result:
            nonlocal draws
            with preserved_buffers(self._check):
                if not ends:
                    start = _random_states()
                    result = function()
                    ends.extend([start, _random_states()])
                    return result
                if draws is None:
                    draws = _differ(*ends)
                if not draws:
                    return function()
                present = _random_states()
                _restore(ends[0])
                try:
                    return function()
                finally:
                    _restore(present)

        return replayed


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


def _parts_of(module: Module) -> dict[int, Module]:
    """The module and its submodules, by their ids. `modules()` does the same and takes four times as long."""
    parts = {id(module): module}
    found = [module]
    for part in found:  # the list grows while the loop runs
        for child in part._modules.values():
            if child is not None and id(child) not in parts:
                parts[id(child)] = child
                found.append(child)
    return parts


def held_by(modules: Iterable[Module]) -> list[Tensor]:
    """The modules' own parameters and buffers; `parameters(recurse=False)` and the like take ten times as long."""
    dicts = [tensors for module in modules for tensors in (module._parameters, module._buffers)]
    return [tensor for tensors in dicts for tensor in tensors.values() if tensor is not None]


class _Outermost(threading.local):
    """The outermost call of each thread: backward passes may recompute forward passes in theirs."""

    outermost: _Call | None = None


class _OfThread(threading.local):
    """What belongs to the present thread."""

    def __init__(self) -> None:
        self.guards: list[preserved_buffers] = []  # the innermost comes last, and is the one that acts
        self.is_started_by_python = is_started_by_python()


_present = _OfThread()
_active: list[preserved_buffers] = []  # those of all threads
_hooks: list[Any] = []  # that before a module, and that after it
_lock = threading.RLock()  # for these two, torch's own lists of hooks, and buffers while they are exchanged


def _register_hooks() -> None:
    if not _hooks:
        _hooks.append(register_module_forward_pre_hook(_before))


def _register_hook_after() -> None:
    """Makes calls end with `_after`, those under way too. It takes a third of what the hooks take, so it is there only
    once a module with buffers was called."""
    if len(_hooks) == 1:
        _hooks.append(register_module_forward_hook(_after, always_call=True))


def _remove_hooks() -> None:
    while _hooks:
        _hooks.pop().remove()


def _acting_on(module: Module) -> preserved_buffers | None:
    """The guard of the present thread. A thread of autograd's engine computes forward passes again, for checkpoints: it
    has the guard under which the module was called before."""
    if _present.guards:
        return _present.guards[-1]
    if not _present.is_started_by_python:
        for guard in reversed(_active):
            if id(module) in guard._called:
                return guard
    return None


def _before(module: Module, args: Any) -> None:
    if torch.compiler.is_compiling():  # compiled code would keep the hook for ever
        return
    if guard := _acting_on(module):
        guard._enter(module)


def _after(module: Module, args: Any, result: Any) -> None:
    if not torch.compiler.is_compiling() and (guard := _acting_on(module)):
        guard._leave(module)


def _random_states() -> list[tuple[torch.Generator, Tensor]]:
    generators = [torch.default_generator]
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():
            generators.extend(backend.default_generators)
    return [(generator, generator.get_state()) for generator in generators]


def _differ(before: RandomStates, after: RandomStates) -> bool:
    pairs = zip(before, after, strict=False)  # a device may have been initialized between
    return any(not torch.equal(a, b) for (_, a), (_, b) in pairs)


def _restore(states: RandomStates) -> None:
    for generator, state in states:
        generator.set_state(state)
