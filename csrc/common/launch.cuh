// Launching a kernel and naming its shared memory, in a form that tests/cuda_on_cpu can compile without nvcc.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_bytes)
#define STATIC_SHARED(T, name, extents) __shared__ T name extents
#endif

namespace auxfast {

constexpr int64_t kMostBlocks = INT32_MAX;  // that CUDA takes along x of a grid

// A grid of so many blocks. For more than kMostBlocks it is empty, which CUDA refuses: cut to 32 bits, the number could
// ask for a few of them, and nothing would say that the others have not run.
constexpr dim3 grid_of(int64_t blocks, int y = 1, int z = 1) {
  return dim3(blocks <= kMostBlocks ? unsigned(blocks) : 0, unsigned(y), unsigned(z));
}

// nullptr, or CUDA's error message for the launch just made (not for what the kernel does later).
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace auxfast
