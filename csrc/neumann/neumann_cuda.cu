// The Neumann step on a GPU: one launch for up to kLaunchTensors tensors, and one that adds the blocks' sums. No
// atomics, so that the same call gives the same bits, and nothing waits for the device.
#include "common/block_sum.cuh"
#include "neumann/neumann.h"
#include "neumann/neumann_math.h"

namespace auxfast::cuda {

constexpr int kWarps = kSumThreads / 32;
constexpr int64_t kBlockTiles = 64;  // 8192 elements: a block's chunk
constexpr int kPerLane = int(kTileElements) / 32;
constexpr int kLaunchTensors = 96;  // what fits into the 4 KB of a kernel's arguments

// The tensors of one launch.
template <class T>
struct LaunchTensors {
  NeumannTensor<T> tensors[kLaunchTensors];
  int count;           // of tensors
  int64_t first_tile;  // of the launch
};
static_assert(sizeof(LaunchTensors<float>) <= 4000, "the arguments of a kernel are limited to 4 KB");

template <class T>
struct alignas(16) LaneElements {
  T x[kPerLane];
};

// Updates up to kPerLane elements from `at` on, in order, and returns the sum of squares of their new v. A lane has the
// same elements whether or not they are loaded together.
template <class T>
__device__ __forceinline__ double update_lane(const NeumannTensor<T>& tensor, int64_t at, T step_size) {
  T *v = tensor.v + at, *p = tensor.p + at;
  const T* hv = tensor.hv + at;
  const bool aligned =
      ((reinterpret_cast<uintptr_t>(v) | reinterpret_cast<uintptr_t>(hv) | reinterpret_cast<uintptr_t>(p)) %
       alignof(LaneElements<T>)) == 0;
  double sum = 0;
  if (aligned && at + kPerLane <= tensor.numel) {
    LaneElements<T> new_v = *reinterpret_cast<const LaneElements<T>*>(v),
                    new_p = *reinterpret_cast<const LaneElements<T>*>(p);
    const LaneElements<T> product = *reinterpret_cast<const LaneElements<T>*>(hv);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      neumann_element(new_v.x[i], product.x[i], new_p.x[i], step_size);
      sum += double(new_v.x[i]) * double(new_v.x[i]);
    }
    *reinterpret_cast<LaneElements<T>*>(v) = new_v;
    *reinterpret_cast<LaneElements<T>*>(p) = new_p;
  } else {
    for (int i = 0; i < kPerLane && at + i < tensor.numel; ++i) {
      T new_v = v[i], new_p = p[i];
      neumann_element(new_v, hv[i], new_p, step_size);
      v[i] = new_v;
      p[i] = new_p;
      sum += double(new_v) * double(new_v);
    }
  }
  return sum;
}

// A warp takes one tile at a time, so that even tensors of a few elements keep all warps busy. partial: out,
// (gridDim.x,)
template <class T>
__global__ void __launch_bounds__(kSumThreads) step_kernel(const LaunchTensors<T> list, T step_size, double* partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = list.first_tile + int64_t(blockIdx.x) * kBlockTiles;
  int low = 0, high = list.count;  // to find the last tensor that starts at or before this warp's first tile
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.tensors[middle].first_tile <= begin + warp)
      low = middle;
    else
      high = middle;
  }
  double sum = 0;
  // Tiles behind the launch's are, to its last tensor, behind its elements: update_lane leaves them alone.
  for (int64_t tile = begin + warp; tile < begin + kBlockTiles; tile += kWarps) {
    while (low + 1 < list.count && list.tensors[low + 1].first_tile <= tile) ++low;
    const NeumannTensor<T>& tensor = list.tensors[low];
    sum += update_lane<T>(tensor, (tile - tensor.first_tile) * kTileElements + lane * kPerLane, step_size);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

int64_t blocks_of(int64_t tiles) { return (tiles + kBlockTiles - 1) / kBlockTiles; }

// The blocks' sums; each launch but the last may have one block more than its share of all tiles.
template <class T>
int64_t workspace_bytes(const NeumannList<T>& list) {
  return (blocks_of(list.tiles) + list.count / kLaunchTensors) * int64_t(sizeof(double));
}

template <class T>
const char* step(const NeumannList<T>& list, void* stream) {
  auto* sums = static_cast<double*>(list.workspace);
  int64_t num_sums = 0;
  for (int64_t begin = 0; begin < list.count; begin += kLaunchTensors) {
    const int64_t end = begin + kLaunchTensors < list.count ? begin + kLaunchTensors : list.count;
    LaunchTensors<T> launch{};
    launch.count = int(end - begin);
    for (int i = 0; i < launch.count; ++i) launch.tensors[i] = list.tensors[begin + i];
    launch.first_tile = launch.tensors[0].first_tile;
    const int64_t end_tile = end < list.count ? list.tensors[end].first_tile : list.tiles;
    const int64_t blocks = blocks_of(end_tile - launch.first_tile);
    LAUNCH(step_kernel<T>, grid_of(blocks), dim3(kSumThreads), 0, stream, launch, list.step_size, sums + num_sums);
    if (const char* error = launch_error()) return error;
    num_sums += blocks;
  }
  LAUNCH(sum_rows_kernel, dim3(1), dim3(kSumThreads), 0, stream, sums, num_sums, list.squared_norm);
  return launch_error();
}

extern const NeumannCudaKernels<float> neumann_f32 = {{workspace_bytes<float>, step<float>}};
extern const NeumannCudaKernels<double> neumann_f64 = {{workspace_bytes<double>, step<double>}};

}  // namespace auxfast::cuda
