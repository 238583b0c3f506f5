// Copies from global to shared memory that a thread does not wait for one by one.
#pragma once

#include "common/launch.cuh"

namespace auxfast::cuda {

// Begins to copy one number of 4 or 8 bytes; GPUs before compute capability 8.0 have copied it then. Both are plain
// memory in the compiler's eyes, so it moves no access over this.
template <class T>
__device__ __forceinline__ void begin_copy(T* shared, const T* global) {
#ifndef __CUDACC__
  BEGIN_COPY(shared, global);  // of tests/cuda_on_cpu
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what the instruction can copy");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(global), "n"(sizeof(T))
               : "memory");
#else
  *shared = *global;
#endif
}

// Waits for the copies that the calling thread has begun. Other threads see them after the next barrier.
__device__ __forceinline__ void wait_for_copies() {
#ifndef __CUDACC__
  WAIT_FOR_COPIES();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace auxfast::cuda
