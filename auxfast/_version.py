"""The version of auxfast, which no other file repeats."""

__version__ = "0.1.0"
