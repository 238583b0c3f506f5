"""Promises of an installation from source: which compilers are used, what a failure says, what is shipped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import build_backend
import build_requirements
import pytest
import torch

import auxfast

ROOT = Path(__file__).resolve().parent.parent


def _script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def _no_tools(tmp_path, monkeypatch):
    """An environment without compilers and GPUs, as far as they can be hidden."""
    for name in ("AUXFAST_BUILD", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(build_backend, "DEFAULT_CUDA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(build_backend, "DEVICES", tmp_path / "dev")


def _setup_py(*arguments: str) -> str:
    """setup.py's output, where no compiler can be found."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=ROOT, env={"PATH": "", "AUXFAST_BUILD": "cuda", "PYTHONPATH": "tools/build"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installed_torch_is_found_and_asked_for_only_where_there_is_none(monkeypatch):
    found = (Path(torch.__file__).parent, torch.__version__, torch.version.cuda or "")
    assert build_backend.installed_torch() == found
    monkeypatch.delenv("AUXFAST_BUILD", raising=False)
    for kind in ("wheel", "editable"):
        hook = f"get_requires_for_build_{kind}"
        monkeypatch.setattr(build_backend.build_meta, hook, lambda settings: ["other"])
        assert getattr(build_backend, hook)() == ["other"]
        with monkeypatch.context() as patch:
            patch.setattr(build_backend, "installed_torch", lambda: None)
            assert getattr(build_backend, hook)() == ["other", "torch>=2.11"]
            patch.setenv("AUXFAST_BUILD", "none")
            assert getattr(build_backend, hook)() == ["other"]


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (None, r"pip install 'torch>=2\.11' first"),
        (build_backend.Torch(Path("/t"), "2.5.1+cu121", "12.1"), r"2\.11 or newer, and /t is 2\.5\.1"),
    ],
)
def test_missing_or_old_torch_is_an_error(monkeypatch, installed, message):
    monkeypatch.setattr(build_backend, "installed_torch", lambda: installed)
    with pytest.raises(SystemExit, match=message):
        build_backend.torch_flags()


@pytest.mark.usefixtures("_no_tools")
def test_compiler_is_cxx_or_the_first_one_found(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"needs a C\+\+17 compiler and found none\. Install one .* CXX"):
        build_backend.find_cxx()
    _script(tmp_path / "empty/clang++", "")
    assert build_backend.find_cxx() == ["clang++"]
    cxx = _script(tmp_path / "my cxx", "")
    monkeypatch.setenv("CXX", f"'{cxx}' -m64")
    assert build_backend.find_cxx() == [str(cxx), "-m64"]
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(SystemExit, match=r"CXX=g\+\+-99"):
        build_backend.find_cxx()


@pytest.mark.usefixtures("_no_tools")
def test_auxfast_build_decides_about_cuda(tmp_path, monkeypatch, capsys):
    assert build_backend.choose_nvcc() is None
    assert capsys.readouterr().err == "auxfast: no nvcc found, building the CPU kernels only\n"
    monkeypatch.setenv("AUXFAST_BUILD", "cuda")
    with pytest.raises(SystemExit, match="AUXFAST_BUILD=cuda, but no nvcc"):
        build_backend.choose_nvcc()
    nvcc = _script(tmp_path / "cuda/bin/nvcc", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert build_backend.choose_nvcc() == str(nvcc)
    monkeypatch.setenv("AUXFAST_BUILD", "cpu")
    assert build_backend.choose_nvcc() is None
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("AUXFAST_BUILD", "gpu")
    with pytest.raises(SystemExit, match="must be auto, cpu, cuda or none, not 'gpu'"):
        build_backend.choose_nvcc()


@pytest.mark.usefixtures("_no_tools")
@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_a_cuda_home_without_nvcc_is_refused_and_not_passed_over(tmp_path, monkeypatch, name, exists, choice):
    _script(tmp_path / "empty/nvcc", "")  # the one on the PATH
    home = tmp_path / "cuda"
    if exists:
        home.mkdir()
    monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("AUXFAST_BUILD", choice)
    with pytest.raises(
        SystemExit, match=rf"^auxfast: {name}={home}, but there is no {home}/bin/nvcc; .* unset {name}; "
    ):
        build_backend.choose_nvcc()
    monkeypatch.setenv("AUXFAST_BUILD", "cpu")
    assert build_backend.choose_nvcc() is None


@pytest.mark.usefixtures("_no_tools")
@pytest.mark.parametrize(
    ("cuda_of_torch", "device", "uses_nvcc"),
    [("", None, False), ("", "nvidiactl", False), ("13.0", None, True), ("", "nvidia0", True), ("", "dxg", True)],
)
def test_unasked_cuda_is_built_only_where_it_could_run(tmp_path, monkeypatch, capsys, cuda_of_torch, device, uses_nvcc):
    nvcc = _script(tmp_path / "empty/nvcc", "")
    (tmp_path / "dev").mkdir()
    if device:
        (tmp_path / "dev" / device).touch()
    monkeypatch.setattr(build_backend, "installed_torch", lambda: build_backend.Torch(tmp_path, "2.13", cuda_of_torch))
    assert build_backend.choose_nvcc() == (str(nvcc) if uses_nvcc else None)
    said = capsys.readouterr().err
    assert said.count("\n") == (not uses_nvcc)
    assert ("AUXFAST_BUILD=cuda builds the CUDA kernels too" in said) == (not uses_nvcc)


def test_a_build_without_isolation_names_what_to_install(monkeypatch):
    installed = {"setuptools": "77.0.1", "pybind11": "2.12.9"}

    def version(name):
        if name not in installed:
            raise build_requirements.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(build_requirements.metadata, "version", version)
    build_requirements.check_requirements("setuptools")
    with pytest.raises(SystemExit) as raised:
        build_requirements.check_requirements("setuptools", "ninja", "pybind11")
    assert str(raised.value) == (
        "auxfast: the build needs ninja, pybind11>=2.13, which a build without isolation does not install; "
        "pip install 'setuptools>=77' ninja 'pybind11>=2.13' first"
    )
    installed["setuptools"] = "76.1"
    with pytest.raises(SystemExit, match="the build needs setuptools>=77, which"):
        build_requirements.check_requirements("setuptools")


def test_a_backend_without_setuptools_names_what_to_install():
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import build_backend"],  # -S hides all installed packages
        env={"PYTHONPATH": str(ROOT / "tools/build")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("auxfast: the build needs setuptools>=77, which")


def test_cuda_code_is_for_the_architectures_nvcc_knows(tmp_path):
    nvcc = _script(
        tmp_path / "nvcc",
        'case $1 in --list-gpu-arch) printf "compute_75\\ncompute_80\\ncompute_90\\n";; '
        '*) echo "Cuda compilation tools, release 12.4, V12.4.131";; esac',
    )
    flags, defines = build_backend.cuda_flags(str(nvcc), [75, 90, 100])
    assert flags == [
        f"-gencode=arch=compute_{a},code={b}" for a, b in [(75, "sm_75"), (90, "sm_90"), (90, "compute_90")]
    ]
    names = "-DAUXFAST_CUDA_ARCHITECTURES=75.90", "-DAUXFAST_CUDA_PTX=90"
    assert defines == ["-DAUXFAST_WITH_CUDA", *names, "-DAUXFAST_CUDA_TOOLKIT=12.4"]
    flags, defines = build_backend.cuda_flags(str(nvcc), [75, 80, 90], [80, 100])
    assert flags[3:] == [f"-gencode=arch=compute_{a},code=compute_{a}" for a in (80, 90)]
    assert "-DAUXFAST_CUDA_PTX=80.90" in defines
    with pytest.raises(SystemExit, match=r"knows none of the architectures \[120\], only compute_75"):
        build_backend.cuda_flags(str(nvcc), [120])


def test_ninja_is_told_awkward_paths(tmp_path):
    ninja = pytest.importorskip("ninja")
    folder = "a b:c$d"
    echo = ["sh", "-c", 'echo "$1" >> log; shift; while [ "$1" != -o ]; do shift; done; touch "$2"', "-", "I x$y'z"]
    steps = [build_backend.Compile(f"{folder}/{name}.cpp", echo, name) for name in "xy"]
    plan = build_backend.ModuleBuild(steps, echo, [])
    (tmp_path / folder).mkdir()
    for step in steps:
        (tmp_path / step.source).touch()
    (tmp_path / "build.ninja").write_text(plan.ninja_file(folder, f"{folder}/out.so"))
    command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(tmp_path)]
    assert "[3/3]" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "log").read_text() == "I x$y'z\n" * 3
    assert "no work to do" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_metadata_needs_no_compiler_and_has_one_version():
    assert _setup_py("--version").split()[-1] == auxfast.__version__


def test_package_ships_its_types_and_only_itself(tmp_path):
    _setup_py("egg_info", f"--egg-base={tmp_path}", "build_py", f"--build-lib={tmp_path / 'lib'}")
    shipped = {path.relative_to(tmp_path / "lib") for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    assert {path.parts[0] for path in shipped} == {"auxfast"}
    files = {path.relative_to(ROOT) for path in (ROOT / "auxfast").rglob("*.*") if path.is_file()}
    assert shipped == {path for path in files if path.suffix not in (".pyc", ".so")}
    assert {Path("auxfast/py.typed"), Path("auxfast/_C.pyi")} <= shipped


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    _setup_py("egg_info", f"--egg-base={folder}", "sdist", f"--dist-dir={folder}")
    with tarfile.open(folder / f"auxfast-{auxfast.__version__}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"auxfast-{auxfast.__version__}"


@pytest.fixture
def source(sdist, tmp_path) -> Path:
    """A source tree of the test's own."""
    return shutil.copytree(sdist, tmp_path / "source")


def test_sdist_has_all_that_a_build_and_the_tests_need(sdist):
    names = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*.*")}
    needed = [path for folder in ("csrc", "tools", "tests") for path in (ROOT / folder).rglob("*.*")]
    assert {path.relative_to(ROOT).as_posix() for path in needed if path.suffix not in (".pyc", "")} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "auxfast/_C.pyi"} <= names
    assert not names & {"auxfast/_C.py"}
    assert not [name for name in names if name.endswith((".so", ".o"))]


def _build_wheel(source: Path, **environment: str) -> zipfile.ZipFile:
    """The wheel that pip gets from a source tree, with no program on the PATH but what `environment` names."""
    out = source.parent / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", f"import build_backend; build_backend.build_wheel({str(out)!r})"],
        cwd=source, env={"PATH": "", "PYTHONPATH": "tools/build", **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


PROGRAM = """
import torch, auxfast
torch.manual_seed(0)
net, combiner = torch.nn.Linear(4, 1), auxfast.nn.NonlinearCombiner(2)
outer = auxfast.HyperOptimizer(torch.optim.SGD(combiner.parameters(), lr=0.1), project=[combiner])
inner = torch.optim.SGD(net.parameters(), lr=0.05)
x = torch.randn(32, 4)
def losses():
    return torch.cat([(net(x) - x[:, :1]) ** 2, (net(x) + x[:, :1]) ** 2], dim=1)
for step in range(20):
    inner.zero_grad()
    combiner(losses()).backward()
    inner.step()
    stats = outer.step(losses()[:, 0].mean(), combiner(losses()), net.parameters())
assert 0 < losses()[:, 0].mean() < 1 and stats.residual is not None
result = auxfast.hypergradient(losses()[:, 0].mean(), combiner(losses()), net.parameters(), combiner.parameters())
assert any(gradient.abs().sum() > 0 for gradient in result.grads)
assert auxfast.build_info()["cpu_kernels"] == []
auxfast.cli.main(["info"])
"""


@pytest.mark.slow
def test_auxfast_build_none_needs_no_compiler_and_runs_on_the_reference(source, tmp_path):
    with _build_wheel(source, AUXFAST_BUILD="none") as wheel:
        assert "auxfast/_C.py" in wheel.namelist()
        assert not [name for name in wheel.namelist() if name.endswith(".so")]
        wheel.extractall(tmp_path / "site")
    said = []
    for folder in (tmp_path / "site", source):  # as installed, and in the source tree, which hides what is installed
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", f"import auxfast.cli\n{PROGRAM}"],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(folder), "PATH": "", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "  cpu: reference\n" in said[0]
    assert "AUXFAST_BUILD=none, so every op runs on the PyTorch reference" in said[0]
    assert said[0] == said[1]


def test_a_build_leaves_its_module_in_the_source_tree_and_the_last_build_decides(source, tmp_path):
    """The compiler here writes empty files."""
    pytest.importorskip("pybind11")
    cxx = _script(tmp_path / "bin/c++", 'while [ "$1" != -o ]; do shift; done; : > "$2"')
    native, none = {"AUXFAST_BUILD": "cpu", "CXX": str(cxx), "PATH": os.environ["PATH"]}, {"AUXFAST_BUILD": "none"}
    for environment, suffix in [(native, ".so"), (none, ".py"), (native, ".so")]:
        with _build_wheel(source, **environment) as wheel:
            (shipped,) = [name for name in wheel.namelist() if name.startswith("auxfast/_C.") and "pyi" not in name]
        (left,) = [path.name for path in (source / "auxfast").glob("_C.*[!i]")]
        assert shipped == f"auxfast/{left}"
        assert left.endswith(suffix)


def test_changelog_and_citation_know_the_version():
    assert f"\n## [{auxfast.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {auxfast.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_pre_commit_has_the_versions_of_make_lint():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = set(re.findall(r"additional_dependencies: \[(.*)\]", hooks))
    assert pins
    lint = (ROOT / "pyproject.toml").read_text().partition("\nlint = ")[2].partition("\n")[0]
    assert all(f'"{pin}"' in lint for pin in pins)
