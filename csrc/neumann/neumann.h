// What the kernels of the Neumann steps are told: pointers and sizes, nothing of torch.
#pragma once

#include <cstdint>

#include "common/kernels.h"

namespace auxfast {

// The elements of a whole list of tensors are numbered as if the tensors lay behind one another, each starting at a
// multiple of kTileElements. So chunks are cut by size alone, many small tensors share a chunk, a tile never spans two
// tensors, and it is as well aligned as its tensor is.
constexpr int64_t kTileElements = 128;
constexpr int64_t tiles_of(int64_t numel) { return (numel + kTileElements - 1) / kTileElements; }

template <class T>
struct NeumannTensor {
  T* v;                // in and out: (numel,)
  const T* hv;         // in: (numel,); may be v itself, since every element is read before it is written
  T* p;                // in and out: (numel,)
  int64_t numel;       // >= 1
  int64_t first_tile;  // tiles of all tensors before this one
};

template <class T>
struct GuardedTensor {
  const T* v;          // in: (numel,)
  T* v_before;         // in and out: (numel,); becomes the next v
  const T* hv;         // in: (numel,); may be v or v_before itself
  T* p;                // in and out: (numel,)
  int64_t numel;       // >= 1
  int64_t first_tile;  // tiles of all tensors before this one
};

template <class Tensor>
struct TensorList {
  const Tensor* tensors;  // on the host
  int64_t count;          // of tensors
  int64_t tiles;          // of all tensors together
};

// Sums that a step on CUDA leaves, one for each of its blocks: as many as an H200 has at once, 8 on each of its 132
// multiprocessors. It is a constant, and not asked of the GPU, so that the order of additions depends on sizes alone.
constexpr int64_t kCudaSums = 132 * 8;

template <class T>
struct NeumannStep {
  TensorList<NeumannTensor<T>> list;
  T step_size;
  double* sums;     // out: the squared norm of the new v, in parts that add up to it. On the CPU it is one number; on
                    // CUDA there are up to kCudaSums, and what lies behind those of this list is left alone
  void* workspace;  // overwritten; CUDA only
};

// What a series that stops by itself knows of itself, float64. auxfast/ops/neumann.py has the same list, and says what
// each number is.
enum GuardedNumber { kSquare, kSquareBefore, kSmallestSquare, kSquareOfProduct, kGrew, kSteps, kGuardedNumbers };

template <class T>
struct GuardedStep {
  TensorList<GuardedTensor<T>> list;
  T step_size;
  double* numbers;  // in and out: (kGuardedNumbers,)
  void* workspace;  // overwritten; CUDA only
};

template <class T>
struct NeumannKernels {
  CpuKernel<NeumannStep<T>> step;
  CpuKernel<GuardedStep<T>> guarded_step;
};
template <class T>
struct NeumannCudaKernels {
  CudaKernel<NeumannStep<T>> step;
  CudaKernel<GuardedStep<T>> guarded_step;
};

}  // namespace auxfast
