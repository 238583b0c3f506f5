"""`make gpu-check`: its steps run on a CPU in small sizes, and it tells how each of them ended."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from pages import ROOT


@pytest.fixture
def gpu(monkeypatch):
    """The modules of the check and of the benchmark."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu import __main__ as benchmark
    from benchmarks.gpu import check

    return SimpleNamespace(check=check, benchmark=benchmark)


def _command(code):
    return [sys.executable, "-S", "-c", code]


def test_each_step_tells_how_it_ended(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.check, "_LEAST_SECONDS", 0.1)
    step = gpu.check.Step
    check = gpu.check.Check(tmp_path, 30)
    check.run([step("good", _command("print('a line')"), 20)])
    check.run([step("bad", _command("raise SystemExit(3)"), 20)])
    check.run([step("slow", _command("import time; time.sleep(60)"), 0.3)])
    check.run([step("measured only", _command("raise SystemExit(3)"), 20, decides=False)])
    check.run([step("no tool", ["no-such-tool"], 20, needs="no-such-tool")])
    check.end = 0.0
    check.run([step("late", _command(""), 20)])
    ended = {each["name"]: (each["status"], each["failed"]) for each in json.loads(check.summary.read_text())}
    assert ended == {
        "good": ("passed", False),
        "bad": ("failed with exit status 3", True),
        "slow": ("stopped at its limit of 0 s", True),
        "measured only": ("failed with exit status 3", False),
        "no tool": ("not run: there is no no-such-tool", False),
        "late": ("not run: no time was left", True),
    }
    assert "a line" in check.log.read_text()


def test_all_tests_for_a_gpu_are_in_a_step_and_each_in_one(gpu, tmp_path):
    stages = gpu.check.stages(tmp_path, 560, dry_run=False)
    steps = [step for stage in stages for step in stage if step.name in ("kernels", "streams", "solvers", "others")]
    paths = [word for step in steps for word in step.command if word.startswith("tests/")]
    assert len(paths) == len(set(paths))
    assert {f"tests/cuda_on_gpu/{path.name}" for path in (ROOT / "tests/cuda_on_gpu").glob("test_*.py")} <= set(paths)
    assert {"tests/ops", "tests/solvers", "tests/weighting"} <= set(paths)
    assert all((ROOT / path).exists() for path in paths)


def test_a_section_names_what_it_has_no_time_for(gpu):
    timer = gpu.benchmark.Timer(gpu.benchmark.torch.device("cpu"), 1e-4)
    section = gpu.benchmark.Section(timer, 0.0, small=True)
    section.compare("a row", {"auxfast": lambda _: pytest.fail("is not to be measured")})
    assert section.report()["left out"] == ["a row, auxfast"]


@pytest.mark.slow
def test_a_dry_run_of_the_check(tmp_path, gpu):
    """Steps that run other tests by the same kind of command are left out."""
    steps = ["import", "benchmark", "memcheck", "counters"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.check",
        "--dry-run",
        "--out",
        str(tmp_path),
        "--only",
        ",".join(steps),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {each["name"]: each["status"] for each in summary} == dict.fromkeys(steps, "passed")
    figures = json.loads((tmp_path / "benchmark.json").read_text())
    assert list(figures["sections"]) == list(gpu.benchmark.SECTIONS)
    for name, section in figures["sections"].items():
        assert section["left out"] == [], name
        assert "error" not in json.dumps(section["figures"]), name
    assert len(list(tmp_path.iterdir())) <= 8
