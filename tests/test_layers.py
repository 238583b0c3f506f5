"""Data flows one way: who may import or include whom, in Python and in C++."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

# Python: each layer knows those before it, and the parts of one layer do not know each other. "" is the package itself,
# that is, what `import auxfast` offers.
LAYERS = [{"_C"}, {"_native", "autograd"}, {"ops"}, {"nn", "solvers"}, {"implicit"}, {""}, {"compat", "train"}, {"cli"}]
LEAVES = {"data", "weighting", "models"}  # know themselves alone; who knows `train`'s layer may know them
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
WITH_EXTRAS = {"data", "train", "cli"}  # may need more than torch and numpy

MODULES = sorted((ROOT / "auxfast").rglob("*.py"))


def _part(module: str) -> str:
    """`auxfast.<part>...`; the package itself is ""."""
    return module.partition(".")[2].partition(".")[0]


def _own_part(path: Path) -> str:
    first = path.relative_to(ROOT / "auxfast").parts[0].removesuffix(".py")
    return {"__init__": "", "__main__": "cli"}.get(first, first)


def _is_module(part: str) -> bool:
    return part == "_C" or (ROOT / "auxfast" / part).is_dir() or (ROOT / "auxfast" / f"{part}.py").is_file()


def _imports(path: Path) -> list[str]:
    """Absolute names of what a file imports; `from auxfast import nn` is auxfast.nn."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == "auxfast":
                names = [alias.name for alias in node.names if alias.name != "__version__"]
                found += [f"auxfast.{name}" if _is_module(name) else "auxfast" for name in names]
            else:
                found.append(node.module)
    return found


def _may_know(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if importer in LEAVES:
        return False
    if imported in LEAVES:
        return RANK[importer] >= RANK["train"]
    return RANK[imported] < RANK[importer]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_layers(path):
    own = _own_part(path)
    for name in _imports(path):
        package = name.partition(".")[0]
        if package == "auxfast":
            assert _may_know(own, _part(name)), f"{own or 'auxfast'} imports {name}"
        elif own not in WITH_EXTRAS:
            assert package in {"torch", "numpy"} | sys.stdlib_module_names, f"{own or 'auxfast'} imports {name}"


def test_the_rules_themselves():
    assert _may_know("train", "data")
    assert _may_know("cli", "train")
    for importer, imported in [("nn", "solvers"), ("ops", "nn"), ("data", "ops"), ("implicit", "data"), ("nn", "")]:
        assert not _may_know(importer, imported)


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
    """As `_includes`, through all of our own files."""
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
