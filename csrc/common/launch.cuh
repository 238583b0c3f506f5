// Launching a kernel and naming its shared memory, in a form that tests/cuda_on_cpu can compile without nvcc.
#pragma once

#include <cuda_runtime.h>

#ifdef __CUDACC__
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_bytes)
#define STATIC_SHARED(T, name, extents) __shared__ T name extents
#endif

namespace auxfast {

// nullptr, or CUDA's error message for the launch just made (not for what the kernel does later).
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace auxfast
