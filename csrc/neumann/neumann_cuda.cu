// The Neumann step on a GPU: one launch for up to kPieceTensors tensors, and one that adds the blocks' sums. No
// atomics, so that the same call gives the same bits, and nothing waits for the device.
#include "common/block_sum.cuh"
#include "neumann/neumann.h"
#include "neumann/neumann_math.h"

namespace auxfast::cuda {

constexpr int kWarps = kSumThreads / 32;
constexpr int64_t kBlockGroups = 64;  // 8192 elements
constexpr int kPerLane = int(kGroup) / 32;
constexpr int kPieceTensors = 96;  // what fits into the 4 KB of a kernel's arguments

struct Piece {
  NeumannTensor tensors[kPieceTensors];
  int count;            // of tensors
  int64_t first_group;  // of the piece
};
static_assert(sizeof(Piece) <= 4000, "the arguments of a kernel are limited to 4 KB");

template <class T>
struct alignas(16) Pack {
  T x[kPerLane];
};

// Up to kPerLane elements from `at` on, in order. A lane has the same elements whether or not they are loaded together.
template <class T>
__device__ __forceinline__ double update_lane(const NeumannTensor& tensor, int64_t at, T step_size) {
  T* v = static_cast<T*>(tensor.v) + at;
  const T* hv = static_cast<const T*>(tensor.hv) + at;
  T* p = static_cast<T*>(tensor.p) + at;
  const bool aligned =
      ((reinterpret_cast<uintptr_t>(v) | reinterpret_cast<uintptr_t>(hv) | reinterpret_cast<uintptr_t>(p)) %
       alignof(Pack<T>)) == 0;
  double sum = 0;
  if (aligned && at + kPerLane <= tensor.numel) {
    Pack<T> new_v = *reinterpret_cast<const Pack<T>*>(v), new_p = *reinterpret_cast<const Pack<T>*>(p);
    const Pack<T> product = *reinterpret_cast<const Pack<T>*>(hv);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      neumann_element(new_v.x[i], product.x[i], new_p.x[i], step_size);
      sum += double(new_v.x[i]) * double(new_v.x[i]);
    }
    *reinterpret_cast<Pack<T>*>(v) = new_v;
    *reinterpret_cast<Pack<T>*>(p) = new_p;
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

// A warp takes one group at a time, so that even tensors of a few elements keep all warps busy. partial: (gridDim.x,)
template <class T>
__global__ void __launch_bounds__(kSumThreads) step_kernel(const Piece piece, T step_size, double* partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = piece.first_group + int64_t(blockIdx.x) * kBlockGroups;
  int low = 0, high = piece.count;  // the last tensor that starts at or before this warp's first group
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (piece.tensors[middle].first_group <= begin + warp)
      low = middle;
    else
      high = middle;
  }
  double sum = 0;
  // Groups behind the piece are, to its last tensor, behind its elements: update_lane leaves them alone.
  for (int64_t group = begin + warp; group < begin + kBlockGroups; group += kWarps) {
    while (low + 1 < piece.count && piece.tensors[low + 1].first_group <= group) ++low;
    const NeumannTensor& tensor = piece.tensors[low];
    sum += update_lane<T>(tensor, (group - tensor.first_group) * kGroup + lane * kPerLane, step_size);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

int64_t blocks_of(int64_t groups) { return (groups + kBlockGroups - 1) / kBlockGroups; }

int64_t neumann_workspace(const NeumannList& list) {
  return blocks_of(list.groups) + list.count / kPieceTensors;  // a block more for each piece but the last
}

template <class T>
const char* neumann_step(const NeumannList& list, double* workspace, double* squared_norm, void* stream) {
  int64_t partials = 0;
  for (int64_t begin = 0; begin < list.count; begin += kPieceTensors) {
    const int64_t end = begin + kPieceTensors < list.count ? begin + kPieceTensors : list.count;
    Piece piece{};
    piece.count = int(end - begin);
    for (int i = 0; i < piece.count; ++i) piece.tensors[i] = list.tensors[begin + i];
    piece.first_group = piece.tensors[0].first_group;
    const int64_t end_group = end < list.count ? list.tensors[end].first_group : list.groups;
    const int64_t blocks = blocks_of(end_group - piece.first_group);
    LAUNCH(step_kernel<T>, dim3(unsigned(blocks)), dim3(kSumThreads), 0, stream, piece, T(list.step_size),
           workspace + partials);
    if (const char* error = launch_error()) return error;
    partials += blocks;
  }
  LAUNCH(sum_rows_kernel, dim3(1), dim3(kSumThreads), 0, stream, workspace, partials, squared_norm);
  return launch_error();
}

const char* neumann_step_float(const NeumannList& list, double* workspace, double* squared_norm, void* stream) {
  return neumann_step<float>(list, workspace, squared_norm, stream);
}

const char* neumann_step_double(const NeumannList& list, double* workspace, double* squared_norm, void* stream) {
  return neumann_step<double>(list, workspace, squared_norm, stream);
}

}  // namespace auxfast::cuda
