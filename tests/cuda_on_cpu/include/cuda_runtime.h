// Stands for CUDA's header of this name when a .cu file is compiled as C++ (-x c++) for the engine. It has what the
// kernels use so far, and shall grow with them.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../engine.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static_assert(false, "name shared memory with STATIC_SHARED or DYNAMIC_SHARED (launch.cuh)");

#define threadIdx (::cuda_on_cpu::position->thread)
#define blockIdx (::cuda_on_cpu::position->block)
#define blockDim (::cuda_on_cpu::position->block_size)
#define gridDim (::cuda_on_cpu::position->grid_size)

#define CUDA_ON_CPU_STRING(x) #x
#define CUDA_ON_CPU_LINE(line) __FILE__ ":" CUDA_ON_CPU_STRING(line)
#define CUDA_ON_CPU_HERE CUDA_ON_CPU_LINE(__LINE__)

// As common/launch.cuh has them for nvcc.
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::cuda_on_cpu::launch_kernel(kernel, grid, block, shared_bytes __VA_OPT__(, ) __VA_ARGS__))
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::cuda_on_cpu::dynamic_shared())
#define STATIC_SHARED(T, name, extents) \
  static const char name##_key = 0;     \
  using name##_type = T extents;        \
  auto& name = *static_cast<name##_type*>(::cuda_on_cpu::static_shared(&name##_key, sizeof(name##_type)))

// Copies to shared memory; common/async_copy.cuh has them for nvcc.
#define BEGIN_COPY(shared, global) ::cuda_on_cpu::begin_copy(shared, global)
#define WAIT_FOR_COPIES() ::cuda_on_cpu::wait_for_copies()

#define __syncthreads() ::cuda_on_cpu::block_barrier(CUDA_ON_CPU_HERE)
#define __syncwarp() ::cuda_on_cpu::warp_barrier(CUDA_ON_CPU_HERE, ~0u)
#define __shfl_sync(mask, value, lane) ::cuda_on_cpu::from_lane(CUDA_ON_CPU_HERE, mask, value, lane)
#define __shfl_xor_sync(mask, value, bits) \
  ::cuda_on_cpu::from_lane(CUDA_ON_CPU_HERE, mask, value, ::cuda_on_cpu::lane() ^ (bits))
#define __shfl_down_sync(mask, value, distance) \
  ::cuda_on_cpu::from_lane(CUDA_ON_CPU_HERE, mask, value, ::cuda_on_cpu::lane() + (distance))

namespace cuda_on_cpu {

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  static_assert((0 + ... + sizeof(Parameters)) <= 32764, "the arguments of a kernel are limited to 32764 bytes");
  launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
}

// Copies as late as CUDA may: when the thread waits. Until then the place is all bytes 0xFF. The code is here so that a
// sanitizer sees both.
template <class T>
void begin_copy(T* shared, const T* global) {
  std::memset(shared, 0xFF, sizeof(T));
  copies().push_back({shared, global, sizeof(T)});
}
inline void wait_for_copies() {
  for (const Copy& copy : copies()) std::memcpy(copy.to, copy.from, copy.bytes);
  copies().clear();
}

inline unsigned lane() {
  const Position& p = *position;
  return (p.thread.x + p.block_size.x * (p.thread.y + p.block_size.y * p.thread.z)) % 32;
}

// Beyond the warp's ends lies the lane itself.
template <class T>
T from_lane(const char* where, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "what a shuffle can carry");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(where, mask, bits, source < 32 ? source : lane());
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits old_bits = __atomic_load_n(reinterpret_cast<Bits*>(address), __ATOMIC_RELAXED), new_bits;
  T old;
  do {
    std::memcpy(&old, &old_bits, sizeof(T));
    const T sum = old + value;
    std::memcpy(&new_bits, &sum, sizeof(T));
  } while (!__atomic_compare_exchange_n(reinterpret_cast<Bits*>(address), &old_bits, new_bits, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
  return old;
}

#define CUDART_VERSION 12010  // the first that allows 32764 bytes of arguments

using cudaError_t = const char*;  // the message itself
constexpr cudaError_t cudaSuccess = nullptr;
inline cudaError_t cudaGetLastError() { return cuda_on_cpu::take_error(); }
inline const char* cudaGetErrorString(cudaError_t error) { return error; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
struct cudaDeviceProp {
  size_t totalGlobalMem;
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::device();
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  properties->totalGlobalMem = cuda_on_cpu::device_memory(device);
  return cudaSuccess;
}
