"""The version, which the build and the package both read."""

__version__ = "0.1.0"
