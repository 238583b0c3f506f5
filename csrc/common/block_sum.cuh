// Sums over the threads of a block, and over the blocks of a row, in float64 and always in the same order: no atomics.
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

// Sums rows, a block each; every thread adds its share in order. partial: in, (rows, count); sums: out, (rows,).
static __global__ void __launch_bounds__(kSumThreads)
    sum_rows_kernel(const double* partial, int64_t count, double* sums) {
  const double* row = partial + blockIdx.x * count;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += row[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace auxfast::cuda
