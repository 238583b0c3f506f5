"""A check of the packages that the build needs, those of pyproject.toml's `[build-system] requires`.

An isolated build has them. Otherwise no front end looks for them, and the build would fail in the middle.
"""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def build_requirements() -> dict[str, str]:
    """The requirement of each package, such as `setuptools>=77`, read without tomllib, which Python 3.10 lacks."""
    (listed,) = re.findall(r"^requires = \[(.*)\]$", PYPROJECT.read_text(), re.MULTILINE)
    requirements: list[str] = re.findall('"(.*?)"', listed)
    return {requirement.partition(">=")[0]: requirement for requirement in requirements}


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (2, 11) of "2.11.0+cpu"."""
    return tuple(int(part) for part in version.split(".")[:2])


def check_requirements(*names: str) -> None:
    """Ends the build, with the remedy, if one of these packages is missing or too old."""
    requirements = build_requirements()
    if missing := [requirements[name] for name in names if not _is_installed(requirements[name])]:
        raise SystemExit(
            f"auxfast: the build needs {', '.join(missing)}, which a build without isolation does not install; "
            f"pip install {shlex.join(requirements.values())} first"
        )


def _is_installed(requirement: str) -> bool:
    name, _, oldest = requirement.partition(">=")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return not oldest or release(version) >= release(oldest)
