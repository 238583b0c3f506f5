// Sums over the threads of a block, in float64 and always in the same order: no atomics.
#pragma once

#include <cstdint>

#include "common/launch.cuh"

namespace auxfast::cuda {

constexpr int kSumThreads = 256;  // every block that uses this has as many

// The sum over the block, in all of its threads. A kernel may call it once: its shared memory is not guarded against a
// second use.
__device__ __forceinline__ double block_sum(double value) {
  constexpr int kWarps = kSumThreads / 32;
  STATIC_SHARED(double, warps, [kWarps]);
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += warps[warp];
  return sum;
}

}  // namespace auxfast::cuda
