"""Optional dependencies: imported when they are used, so that the core needs only torch and numpy."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class MissingExtraError(ImportError):
    """An optional package is not installed; the message says which, and how to get it."""


def import_extra(module: str, package: str) -> ModuleType:
    """Imports `module` of the optional `package` (its name on the package index).

    Raises:
        MissingExtraError: if the package is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise  # the package is installed but broken, and its own message says more
        raise MissingExtraError(
            f"{package} is not installed, and this needs it. Get it with: pip install {package}"
        ) from error
