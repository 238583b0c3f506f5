// The Neumann step for ctypes.
#include "neumann/neumann.h"

#include "wrapper.hpp"

AUXFAST_CPU_KERNELS(NeumannKernels, neumann)
AUXFAST_CUDA_KERNELS(NeumannCudaKernels, neumann)

using namespace auxfast;

// v, hv, p: `count` pointers each, to numel[i] elements; squared_norm: (1,).
extern "C" const char* neumann_step(int64_t is_double, int64_t count, void* const* v, void* const* hv, void* const* p,
                                    const int64_t* numel, double step_size, double* squared_norm) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    std::vector<NeumannTensor<T>> tensors;
    int64_t tiles = 0;
    for (int64_t i = 0; i < count; ++i) {
      tensors.push_back({static_cast<T*>(v[i]), static_cast<T*>(hv[i]), static_cast<T*>(p[i]), numel[i], tiles});
      tiles += tiles_of(numel[i]);
    }
    NeumannList<T> list{tensors.data(), count, tiles, T(step_size), squared_norm, nullptr};
    return run(neumann_cpu<T>().step, neumann_cuda<T>().step, list);
  });
}
