"""The line of the user's code that a warning points to."""

from __future__ import annotations

import sys


def stacklevel() -> int:
    """The `stacklevel` at which `warnings.warn`, called where this is, finds the first caller outside of auxfast, of
    torch, which calls backward passes, and of functools, which calls cached properties."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("auxfast.", "torch.", "functools")
    ):
        level, frame = level + 1, frame.f_back
    return level
