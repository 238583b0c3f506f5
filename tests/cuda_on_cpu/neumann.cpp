// The Neumann step for ctypes.
#include "neumann/neumann.h"

#include <limits>
#include <vector>

using namespace auxfast;

// v, hv, p: `count` pointers each, to numel[i] elements; squared_norm: (1,).
extern "C" const char* neumann_step(int64_t is_double, int64_t count, void* const* v, void* const* hv, void* const* p,
                                    const int64_t* numel, double step_size, double* squared_norm) {
  std::vector<NeumannTensor> tensors;
  int64_t groups = 0;
  for (int64_t i = 0; i < count; ++i) {
    tensors.push_back({v[i], hv[i], p[i], numel[i], groups});
    groups += (numel[i] + kGroup - 1) / kGroup;
  }
  const NeumannList list{tensors.data(), count, groups, step_size};
  std::vector<double> workspace(size_t(cuda::neumann_workspace(list)), std::numeric_limits<double>::quiet_NaN());
  return (is_double ? cuda::neumann_step_double : cuda::neumann_step_float)(list, workspace.data(), squared_norm,
                                                                            nullptr);
}
