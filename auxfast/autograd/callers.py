"""Frames of the user's program, for warnings that name them."""

from __future__ import annotations

import sys


def frames_of_auxfast() -> int:
    """`stacklevel` at which the function that calls this one finds the first caller outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("auxfast."):
        level, frame = level + 1, frame.f_back
    return level
