"""Modules of torch's `fully_shard` as plain ones: with whole parameters, and without the hooks that exchange them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

_FSDP = "torch.distributed.fsdp"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_plain: set[int] = set()  # ids of the modules of `as_plain_modules`


def modules_of_fully_shard() -> list[Any]:
    """All modules of this process that `fully_shard` was applied to, in no order. Their parameters do not lead to them;
    Python's garbage collector knows them. It is asked, for some 10 ms, only where there are any."""
    kind: Any = getattr(sys.modules.get(_FSDP), "FSDPModule", None)
    classes = [] if kind is None else _subclasses(kind)
    return [found for found in gc.get_referrers(*classes) if isinstance(found, kind)] if classes else []


def _subclasses(kind: Any) -> list[type]:
    return [each for child in kind.__subclasses__() for each in (child, *_subclasses(child))]


@contextmanager
def as_plain_modules(modules: Sequence[Any]) -> Iterator[None]:
    """While active, the modules have whole parameters, and a forward pass runs them as if `fully_shard` had not been
    applied: its hooks would free the parameters after each pass, which second derivatives still need, and join what
    must stay apart. In the end the parameters are pieces again, and the hooks where they were.

    Args:
        modules: of `fully_shard`, in the same order on all ranks. Their parameters are pieces.
    """
    try:
        for module in modules:
            module.unshard()
            _plain.add(id(module))
        with ExitStack() as stack:
            for module in modules:
                for name in _HOOKS:
                    stack.enter_context(_without_hooks_of_fsdp(module, name))
            yield
    finally:
        for module in modules:
            _plain.discard(id(module))
            module.reshard()


def is_plain(module: Any) -> bool:
    """Whether `as_plain_modules` is active for the module."""
    return id(module) in _plain


@contextmanager
def _without_hooks_of_fsdp(module: Any, name: str) -> Iterator[None]:
    hooks = getattr(module, name, None)
    if hooks is None:
        raise RuntimeError(f"fully_shard is not supported with this version of torch, whose modules have no {name}")
    kept = dict(hooks)
    for key, hook in kept.items():
        if str(getattr(hook, "__module__", "")).startswith(_FSDP):
            del hooks[key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(kept)  # in their order
