"""Data flows one way: who may import or include whom, in Python and in C++."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

# Each room knows those in the rows above it, and the rooms of one row do not know each other. "auxfast" is the package
# itself: what `import auxfast` offers.
ROWS = [
    ["auxfast._C", "auxfast._callers", "auxfast._version"],
    ["auxfast._native", "auxfast.autograd"],
    ["auxfast.ops"],
    ["auxfast.nn", "auxfast.solvers"],
    ["auxfast.implicit"],
    ["auxfast"],
    ["auxfast.compat", "auxfast.train"],
    ["auxfast.experiments"],
    ["auxfast.cli"],
    ["auxfast.__main__"],
]
# Leaves know themselves alone. Rooms from `train` on may know them.
LEAVES = [
    "auxfast.weighting",
    "auxfast.experiments.data",
    "auxfast.experiments.metrics",
    "auxfast.experiments.models",
]
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}
WITH_EXTRAS = ("auxfast.train", "auxfast.experiments", "auxfast.cli")  # may need more than torch and numpy

Sources = Mapping[str, str]
"""The text of each module, by its name; that of a package is its `__init__.py`."""


def _modules() -> dict[str, str]:
    sources = {}
    for path in sorted((ROOT / "auxfast").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


MODULES = _modules()


def _imports(module: str, sources: Sources) -> Iterator[str]:
    """The modules that a module imports anywhere: within functions and below `if TYPE_CHECKING` too, since a type
    import is an import. A package's `__init__.py` counts only where one of its own names is taken."""
    for node in ast.walk(ast.parse(sources[module])):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in sources or name == "auxfast._C" else node.module


def _within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def _room(module: str) -> str:
    """The leaf or the room that a module is in."""
    inside = [room for room in [*LEAVES, *RANK] if room != "auxfast" and _within(module, room)]
    return inside[0] if inside else "auxfast"


def _may_know(importer: str, imported: str) -> bool:
    importer, imported = _room(importer), _room(imported)
    if importer == imported:
        return True
    if importer in LEAVES:
        return False
    if imported in LEAVES:
        return RANK[importer] >= RANK["auxfast.train"]
    return RANK[imported] < RANK[importer]


def _arrows(sources: Sources) -> dict[str, set[str]]:
    return {
        module: {name for name in _imports(module, sources) if _within(name, "auxfast")} - {"auxfast._C"}
        for module in sources
    }


def _cycle(sources: Sources) -> list[str]:
    """Modules that import each other in a circle; empty if there are none."""
    try:
        TopologicalSorter(_arrows(sources)).prepare()
    except CycleError as error:
        modules: list[str] = error.args[1]
        return modules
    return []


@pytest.mark.parametrize("module", MODULES)
def test_python_layers(module):
    others = {"torch", "numpy"} | sys.stdlib_module_names
    for name in _imports(module, MODULES):
        if _within(name, "auxfast"):
            assert name in MODULES or name == "auxfast._C", f"{module} imports {name}, which is no module"
            assert _may_know(module, name), f"{module} imports {name}"
        elif _room(module) in LEAVES or not any(_within(module, room) for room in WITH_EXTRAS):
            assert name.partition(".")[0] in others, f"{module} imports {name}"


def test_no_circle_of_files():
    assert _cycle(MODULES) == []


@pytest.mark.parametrize("module", MODULES)
def test_no_import_hides(module):
    assert "TYPE_CHECKING" not in MODULES[module]
    for node in ast.walk(ast.parse(MODULES[module])):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__", "import_extra"):
                assert not str(node.args[0].value).startswith("auxfast"), f"{module} imports {node.args[0].value}"


def test_the_rules_themselves():
    allowed = [
        ("auxfast.train.run", "auxfast.weighting"),
        ("auxfast.experiments.paper.digits", "auxfast.experiments.data"),
        ("auxfast.cli", "auxfast.experiments.command"),
        ("auxfast.implicit.losses", "auxfast.autograd.graph"),
    ]
    refused = [
        ("auxfast.nn", "auxfast.solvers"),
        ("auxfast.ops.combiner", "auxfast.nn"),
        ("auxfast.train.run", "auxfast.experiments.base"),
        ("auxfast.experiments.data.digits", "auxfast.ops"),
        ("auxfast.experiments.data.digits", "auxfast.experiments.base"),
        ("auxfast.experiments.models.heads", "auxfast.nn"),
        ("auxfast.implicit", "auxfast.weighting"),
        ("auxfast.nn", "auxfast"),
        ("auxfast.autograd.engine", "auxfast._native"),
    ]
    assert all(_may_know(*pair) for pair in allowed)
    assert not any(_may_know(*pair) for pair in refused)


@pytest.mark.parametrize(
    "back",
    [
        "from auxfast.a import run",
        "from auxfast import a",
        "import auxfast.a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from auxfast.a import Run",
        "def f():\n    from auxfast.a import run",
        "from auxfast import c",
    ],
)
def test_a_circle_is_found_wherever_its_import_stands(back):
    sources = {"auxfast": "", "auxfast.a": "from auxfast import b", "auxfast.b": back, "auxfast.c": "import auxfast.b"}
    assert "auxfast.b" in _cycle(sources)
    assert _cycle({**sources, "auxfast.b": "import torch"}) == []


_IMPORT_WITHOUT_EXTRAS = """
import sys, torch
for name in ("sklearn", "skimage", "matplotlib", "tqdm", "scipy", "pandas", "PIL"):
    sys.modules[name] = None  # importing it raises
import auxfast, auxfast.cli
auxfast.nn.NonlinearCombiner(3)(torch.ones(2, 3)).backward()
"""


def test_importing_auxfast_needs_no_extras():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "error", "-c", _IMPORT_WITHOUT_EXTRAS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------- C++

SOURCES = sorted(path for suffix in ("h", "cuh", "cpp", "cu") for path in CSRC.rglob(f"*.{suffix}"))
KERNELS = [path for path in SOURCES if path.name.endswith(("_cpu.cpp", "_cuda.cu"))]


def _includes(path: Path) -> tuple[list[Path], list[str]]:
    """(files of ours, names of others)"""
    names = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
    return [CSRC / name for name in names if (CSRC / name).is_file()], [n for n in names if not (CSRC / n).is_file()]


def _everything_included(path: Path) -> tuple[set[Path], set[str]]:
    """The files of ours that a file includes, directly or through others, and the names of others."""
    ours, others, pending = {path}, set(), [path]
    while pending:
        mine, foreign = _includes(pending.pop())
        others.update(foreign)
        pending += [file for file in mine if file not in ours]
        ours.update(mine)
    return ours, others


def _allowed(path: Path, included: Path) -> bool:
    """common <- <op>.h <- <op>_math.h <- kernels and their headers; *_ops knows common and <op>.h."""
    folder, op = included.parent.name, path.parent.name
    if folder == "common":
        return True
    if op in ("common", "csrc") or folder != op:
        return False
    if included.suffix in (".cpp", ".cu"):
        return False
    if path.name == f"{op}.h":
        return False
    if path.name in (f"{op}_math.h", f"{op}_ops.cpp"):
        return included.name == f"{op}.h"
    return True


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_cpp_layers(path):
    for included in _includes(path)[0]:
        assert _allowed(path, included), f"{path.relative_to(CSRC)} includes {included.relative_to(CSRC)}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(CSRC)))
def test_kernels_see_no_torch(path):
    ours, others = _everything_included(path)
    assert len(ours) > 2
    assert not [name for name in others if name.startswith(("torch", "ATen", "c10", "pybind11", "Python"))]


def test_every_op_has_its_faces():
    for folder in {path.parent for path in SOURCES} - {CSRC, CSRC / "common"}:
        names = {path.name for path in folder.iterdir()}
        op = folder.name
        wanted = {f"{op}.h", f"{op}_math.h", f"{op}_cpu.cpp", f"{op}_cuda.cu", f"{op}_ops.cpp"}
        assert wanted <= names
        assert (ROOT / "auxfast" / "ops" / f"{op}.py").is_file()
