"""The native module auxfast._C: which files it is made of, and how each kind of them is compiled.

pip and other front ends put tools/build on the path, as pyproject.toml says. Without one: PYTHONPATH=tools/build.
"""

import build_backend as build
import cuda_check
from build_requirements import check_requirements
from setuptools import setup

check_requirements("setuptools")

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Icsrc", "-Wall", "-Wextra"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11: one build serves it and all newer ones
# Kernels exist once per instruction set, each copy in a namespace of its own; the one to run is chosen when the module
# is loaded. No -ffast-math: it would break the NaN handling.
KERNEL = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mtune=haswell"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        *("-mtune=skylake-avx512", "-mprefer-vector-width=512"),
    ],
}
CUDA_ARCHITECTURES = [75, 80, 90, 100, 120]  # code for x.0 runs on all x.y
CUDA_PTX = [100]  # for 11.0, which has no code; GPUs beyond the last architecture get that one's


def native_module() -> build.ModuleBuild:
    cxx, nvcc = build.find_cxx(), build.choose_nvcc()
    cpp = [*cxx, *COMMON, *build.environment_flags("CXXFLAGS")]
    torch_includes, torch_libraries, torch_release = build.torch_flags()
    sets = INSTRUCTION_SETS if build.is_x86() else {"baseline": []}
    defines = [f"-DAUXFAST_WITH_{name.upper()}" for name in sets if name != "baseline"]

    steps: list[build.Compile] = []
    link = [*cxx, "-shared"]
    if nvcc:
        architectures, cuda_defines = build.cuda_flags(nvcc, CUDA_ARCHITECTURES, CUDA_PTX)
        defines += cuda_defines
        cuda = [nvcc, "-ccbin", [word for word in cxx if not word.startswith("-")][-1]]
        # These come first and get a thread for each architecture, since they take longest.
        kernel = [*cuda, "-std=c++17", "-O3", "--threads=0", "-Xptxas=-v", "-Icsrc"]
        kernel += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        steps += build.compile_all("*/*_cuda.cu", [*kernel, *architectures])
        # nvcc links, because it knows where its static runtime is: the module then imports without a CUDA driver.
        link = [*cuda, "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL"]
        torch_libraries += ["-ldl"]
    for name, flags in sets.items():
        steps += build.compile_all("*/*_cpu.cpp", [*cpp, *KERNEL, f"-DAUXFAST_ISA={name}", *flags], name)
    steps += build.compile_all("*/*_ops.cpp", [*cpp, "-O2", *STABLE_ABI, *defines, *torch_includes], torch_release)
    steps += build.compile_all("module.cpp", [*cpp, "-O2", *defines, *build.python_flags()])
    return build.ModuleBuild(steps, link, torch_libraries)


setup(
    ext_modules=[build.NativeExtension("auxfast._C", native_module)],
    cmdclass={"build_ext": build.NinjaBuild, "check_cuda": cuda_check.CheckCuda},
)
