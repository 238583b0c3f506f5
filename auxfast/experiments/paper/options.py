"""The check that all experiments' options share."""

from __future__ import annotations


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Check that an option is from `low` to `high`.

    Raises:
        ValueError: it is not, or not a number; names the option.
    """
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, must be from {low:g} to {high:g}")
