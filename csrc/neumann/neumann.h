// What the kernels of the Neumann step are given, and what they offer: pointers and sizes, nothing of torch.
#pragma once

#include <cstdint>

#include "common/parallel.h"

namespace auxfast {

// The elements of a whole list of tensors are numbered as if the tensors lay behind one another, each starting at a
// multiple of kGroup. So work is cut by size alone, many small tensors share a chunk, a group never spans two tensors,
// and a group is as well aligned as its tensor is.
constexpr int64_t kGroup = 128;

struct NeumannTensor {
  void* v;              // (numel,) updated in place
  const void* hv;       // (numel,) may be v itself: every element is read before it is written
  void* p;              // (numel,) updated in place
  int64_t numel;        // >= 1
  int64_t first_group;  // groups of all tensors before this one
};

struct NeumannList {
  const NeumannTensor* tensors;
  int64_t count;   // of tensors
  int64_t groups;  // of all tensors together
  double step_size;
};

// Updates v and p and returns the sum of squares of the new v.
struct NeumannCpuKernels {
  double (*step_float)(const Executor&, const NeumannList&);
  double (*step_double)(const Executor&, const NeumannList&);
};

namespace cuda {
// How many float64 the kernel needs as workspace on the device.
int64_t neumann_workspace(const NeumannList& list);
// Enqueues the update on `stream` and writes the sum of squares of the new v to `squared_norm`, one float64 on the
// device. Returns nullptr, or CUDA's word on a launch that failed.
const char* neumann_step_float(const NeumannList& list, double* workspace, double* squared_norm, void* stream);
const char* neumann_step_double(const NeumannList& list, double* workspace, double* squared_norm, void* stream);
}  // namespace cuda

}  // namespace auxfast
