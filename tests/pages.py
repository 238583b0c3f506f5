"""The programs in the README and in the pages of the documentation, as tests run them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def fenced(page: Path, language: str) -> list[str]:
    """The blocks of a page that are fenced with ``` and marked with this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def run(page: Path, blocks: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs programs of a page one after another, by default all; returns the names that they leave behind."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in fenced(page, "python") if blocks is None else blocks:
        exec(compile(block, str(page), "exec"), names)
    return names
