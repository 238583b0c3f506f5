// What the wrappers of the ops share: they call a CUDA kernel for ctypes.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/kernel_tables.h"
#include "common/kernels.h"
#include "engine.hpp"

namespace auxfast {

// Runs the kernel in a workspace of NaNs of its own; returns nullptr or what was wrong. In a window the workspace is of
// zeros: blocks that do not run add nothing to a sum.
template <class Params>
const char* run(const CudaKernel<Params>& kernel, Params& params) {
  std::vector<unsigned char> workspace(size_t(kernel.workspace_bytes(params)), cuda_on_cpu::window() ? 0 : 0xFF);
  params.workspace = workspace.data();
  return kernel.launch(params, nullptr);
}

// Calls function(T()) with the element type.
template <class Function>
const char* by_dtype(int64_t is_double, const Function& function) {
  return is_double ? function(double()) : function(float());
}

template <class T>
void set_pointer(T*& pointer, const void* memory) {
  pointer = static_cast<T*>(const_cast<void*>(memory));
}

}  // namespace auxfast
