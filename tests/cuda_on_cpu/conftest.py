"""The kernels are compiled once, before the first of these tests."""

from __future__ import annotations

import pytest

from .kernels import library_file


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    library_file()
