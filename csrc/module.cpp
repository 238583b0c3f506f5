// The Python module auxfast._C. Importing it registers the ops (their *_ops.cpp do that when they are loaded); what
// it offers itself is an account of how it was built, and of the driver.
#include <pybind11/pybind11.h>

#include "common/cpu_isa.h"

#define STRINGIFY_(x) #x
#define STRINGIFY(x) STRINGIFY_(x)

namespace py = pybind11;

#ifdef AUXFAST_WITH_CUDA
extern "C" int cudaDriverGetVersion(int* version);  // of the runtime in this module: its header is on nvcc's path only
#endif

// The newest CUDA that the driver knows, 1000 major + 10 minor; 0 if there is no driver, or no kernel to ask it for.
static int cuda_driver_version() {
  int version = 0;
#ifdef AUXFAST_WITH_CUDA
  if (cudaDriverGetVersion(&version) != 0) return 0;
#endif
  return version;
}

static py::dict build_info() {
  py::list compiled;
  compiled.append("baseline");
#ifdef AUXFAST_WITH_AVX2
  compiled.append("avx2");
#endif
#ifdef AUXFAST_WITH_AVX512
  compiled.append("avx512");
#endif
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cpu_kernels"] = compiled;
  info["cpu_kernels_in_use"] = auxfast::cpu_isa_name(auxfast::best_cpu_isa());
#ifdef AUXFAST_WITH_CUDA
  info["cuda_kernels"] = py::str(STRINGIFY(AUXFAST_CUDA_ARCHITECTURES)).attr("split")(".");
  info["cuda_ptx"] = py::str(STRINGIFY(AUXFAST_CUDA_PTX)).attr("split")(".");
  info["cuda_toolkit"] = STRINGIFY(AUXFAST_CUDA_TOOLKIT);
#else
  info["cuda_kernels"] = py::list();
  info["cuda_ptx"] = py::list();
  info["cuda_toolkit"] = py::none();
#endif
  return info;
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "auxfast's native module: registers torch.ops.auxfast.*";
  module.def("build_info", &build_info);
  module.def("cuda_driver_version", &cuda_driver_version);
}
