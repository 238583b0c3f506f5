// What the kernels of the Neumann step are told: pointers and sizes, nothing of torch.
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
struct NeumannList {
  const NeumannTensor<T>* tensors;  // on the host
  int64_t count;                    // of tensors
  int64_t tiles;                    // of all tensors together
  T step_size;
  double* squared_norm;  // out: one number, the sum of squares of the new v
  void* workspace;       // overwritten; CUDA only
};

// Updates v and p, and fills squared_norm.
template <class T>
struct NeumannKernels {
  CpuKernel<NeumannList<T>> step;
};
template <class T>
struct NeumannCudaKernels {
  CudaKernel<NeumannList<T>> step;
};

}  // namespace auxfast
