// The Neumann steps for ctypes.
#include "neumann/neumann.h"

#include "wrapper.hpp"

AUXFAST_CPU_KERNELS(NeumannKernels, neumann)
AUXFAST_CUDA_KERNELS(NeumannCudaKernels, neumann)

using namespace auxfast;

// v, hv, p: `count` pointers each, to numel[i] elements; sums: (kCudaSums,).
extern "C" const char* neumann_step(int64_t is_double, int64_t count, void* const* v, void* const* hv, void* const* p,
                                    const int64_t* numel, double step_size, double* sums) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    std::vector<NeumannTensor<T>> tensors;
    int64_t tiles = 0;
    for (int64_t i = 0; i < count; ++i) {
      tensors.push_back({static_cast<T*>(v[i]), static_cast<T*>(hv[i]), static_cast<T*>(p[i]), numel[i], tiles});
      tiles += tiles_of(numel[i]);
    }
    NeumannStep<T> work{{tensors.data(), count, tiles}, T(step_size), sums, nullptr};
    return run(neumann_cpu<T>().step, neumann_cuda<T>().step, work);
  });
}

// v, v_before, hv, p: `count` pointers each, to numel[i] elements; numbers: (kGuardedNumbers,).
extern "C" const char* neumann_guarded_step(int64_t is_double, int64_t count, void* const* v, void* const* v_before,
                                            void* const* hv, void* const* p, const int64_t* numel, double step_size,
                                            double* numbers) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    std::vector<GuardedTensor<T>> tensors;
    int64_t tiles = 0;
    for (int64_t i = 0; i < count; ++i) {
      tensors.push_back({static_cast<T*>(v[i]), static_cast<T*>(v_before[i]), static_cast<T*>(hv[i]),
                         static_cast<T*>(p[i]), numel[i], tiles});
      tiles += tiles_of(numel[i]);
    }
    GuardedStep<T> work{{tensors.data(), count, tiles}, T(step_size), numbers, nullptr};
    return run(neumann_cpu<T>().guarded_step, neumann_cuda<T>().guarded_step, work);
  });
}
