"""A check that a saved state is one of this run: torch's own loaders take a string for a learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def check_state(saved: Any, fresh: Any, key: str = "") -> None:
    """Compares a saved state with the state of the same run at its start, entry by entry.

    What was None or empty at the start may be anything but text, and entries that only one of them has are left to
    whoever loads them.

    Raises:
        ValueError: an entry has another type or shape; names the entry, what was given and what is allowed.
    """
    if fresh is None or (isinstance(fresh, (Mapping, Sequence)) and not isinstance(fresh, str) and not fresh):
        _check_no_text(saved, key)
    elif isinstance(fresh, Mapping):
        if not isinstance(saved, Mapping):
            raise _refused(key, saved, "a table")
        for name in fresh.keys() & saved.keys():
            check_state(saved[name], fresh[name], _join(key, name))
    elif isinstance(fresh, Tensor):
        if not isinstance(saved, Tensor) or saved.shape != fresh.shape:
            raise _refused(key, saved, f"a tensor of shape {tuple(fresh.shape)}")
    elif isinstance(fresh, (bool, str)):
        if type(saved) is not type(fresh):
            raise _refused(key, saved, "true or false" if isinstance(fresh, bool) else "a string")
    elif isinstance(fresh, (int, float)):
        if isinstance(saved, bool) or not isinstance(saved, (int, float)) or not math.isfinite(saved):
            raise _refused(key, saved, "a finite number")
    elif isinstance(fresh, Sequence):
        if not isinstance(saved, Sequence) or isinstance(saved, str) or len(saved) != len(fresh):
            raise _refused(key, saved, f"a list of {len(fresh)}")
        for place, (one, other) in enumerate(zip(saved, fresh, strict=True)):
            check_state(one, other, _join(key, place))


def _check_no_text(saved: Any, key: str) -> None:
    if isinstance(saved, str):
        raise _refused(key, saved, "a number or a tensor")
    if isinstance(saved, (Mapping, Sequence)):
        for name, entry in saved.items() if isinstance(saved, Mapping) else enumerate(saved):
            _check_no_text(entry, _join(key, name))


def _refused(key: str, saved: Any, allowed: str) -> ValueError:
    shown = f"a tensor of shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else repr(saved)
    return ValueError(f"{key or 'all of it'}: got {shown[:100]}, must be {allowed}")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
