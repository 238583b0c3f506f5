"""The compile check of the CUDA kernels: it reads ptxas's report, and finds spills, warnings and gaps."""

from __future__ import annotations

import subprocess
from pathlib import Path

import build_backend
import cuda_check
import pytest

# nvcc 13.0 printed this for two architectures; the second kernel calls a function that was not inlined.
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7auxfast4cuda4stepIfNS0_8SoftplusEEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN7auxfast4cuda4stepIfNS0_8SoftplusEEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 22.199 ms
ptxas info    : Compiling entry function '_Z5totalPd' for 'sm_80'
ptxas info    : Function properties for _Z5totalPd
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Z6helperPd
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN7auxfast4cuda4stepIfNS0_8SoftplusEEEvPT_' for 'sm_120'
ptxas info    : Function properties for _ZN7auxfast4cuda4stepIfNS0_8SoftplusEEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""
WARNING = "csrc/a.cu(7): warning #177-D: variable was declared but never referenced"

SPILLING = """
__global__ void __launch_bounds__(1024, 2) spills(float* data, int n) {  // 32 registers a thread
  float sum[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) sum[i] = data[threadIdx.x * 64 + i];
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = sum[i] * sum[(i + 1) % 64] + sum[(i + 29) % 64];
#pragma unroll
  for (int i = 0; i < 64; ++i) data[threadIdx.x * 64 + i] = sum[i];
}
static int unused() { return 1; }
"""


def test_reads_the_report_of_ptxas():
    step, total, newer = cuda_check.usages(LOG)
    assert (step.architecture, step.registers, step.stack, step.shared, step.spills) == ("sm_80", 32, 0, 64, 0)
    assert (total.kernel, total.registers, total.stack, total.shared, total.spills) == ("_Z5totalPd", 255, 24, 0, 12)
    assert (newer.kernel, newer.architecture, newer.registers) == (step.kernel, "sm_120", 40)


def test_a_report_that_was_written_into_by_another_is_garbled():
    lines = LOG.splitlines(keepends=True)
    assert not cuda_check.is_garbled(LOG)
    assert cuda_check.is_garbled(LOG + "50 ms\n")
    for i in range(2, len(lines) - 2):
        assert cuda_check.is_garbled("".join([*lines[:i], lines[1], *lines[i:]])), lines[i]


def test_table_has_a_row_for_each_kernel():
    table = cuda_check.table(cuda_check.usages(LOG), ["sm_80", "sm_120"])
    rows = [line.split("  ") for line in table.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["sm_80", "sm_120"],
        ["step<float, Softplus>", "32 / 0 / 64", "40 / 0 / 0"],
        ["total", "255 / 24 / 0", "-"],
    ]


def test_spills_gaps_and_empty_reports_are_faults():
    found = cuda_check.usages(LOG)
    spills = "total spills registers on sm_80: 12 bytes stored and loaded"
    assert cuda_check.faults(found, ["sm_80", "sm_120"]) == [spills, "total: no report for sm_120"]
    assert cuda_check.faults(found[:1], ["sm_80"]) == []
    assert cuda_check.faults([], ["sm_80"]) == ["ptxas reported no kernel"]


def test_all_else_the_compiler_says_is_a_remark():
    assert cuda_check.remarks(LOG) == []
    assert cuda_check.remarks(f"{LOG}{WARNING}\n\n{LOG}") == [WARNING]


def test_a_kernel_that_spills_is_found(tmp_path):
    nvcc = build_backend.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    (tmp_path / "spills.cu").write_text(SPILLING)
    step = build_backend.Compile(str(tmp_path / "spills.cu"), [nvcc, "-Xptxas=-v", "-Xcompiler=-Wall"])
    log = cuda_check.compile_log(step, ["-gencode=arch=compute_80,code=sm_80"])
    (fault,) = cuda_check.faults(cuda_check.usages(log), ["sm_80"])
    assert fault.startswith("spills spills registers on sm_80: ")
    assert any("unused" in line for line in cuda_check.remarks(log))


def test_the_build_keeps_what_the_compiler_said_and_shows_the_remarks(tmp_path):
    """The compiler here says the same of every file and fails for bad.cu."""
    ninja = pytest.importorskip("ninja")
    (tmp_path / "said").write_text(LOG + WARNING + "\n")
    compiler = ["sh", "-c", 'cat said >&2; touch "$7"; [ "$5" != bad.cu ]', "-"]
    steps = [build_backend.Compile(name, compiler) for name in ("good.cu", "bad.cu")]
    (tmp_path / "build.ninja").write_text(
        build_backend.ModuleBuild(steps, ["true"], []).ninja_file("objects", "module")
    )
    results = []
    for step in steps:
        (tmp_path / step.source).touch()
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(tmp_path), step.object_file("objects")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (tmp_path / f"{step.object_file('objects')}.log").read_text() == LOG + WARNING + "\n"
        assert WARNING in done.stdout
        assert "Compiling entry" not in done.stdout
        assert "spill stores" not in done.stdout
        results.append(done.returncode)
    assert results == [0, 1]
