// What the wrappers of the ops share: they call a CUDA kernel for ctypes.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/kernel_tables.h"
#include "common/kernels.h"
#include "common/launch.cuh"
#include "engine.hpp"

namespace auxfast {

static_assert(grid_of(kMostBlocks).x == 0x7fffffff && grid_of(kMostBlocks + 1).x == 0, "the last launch, and none");
static_assert(grid_of((int64_t(1) << 32) + 5).x == 0, "none instead of one of 5 blocks");

// Runs the kernel in a workspace of NaNs of its own; returns nullptr or what was wrong. In a window the workspace is of
// zeros: blocks that do not run add nothing to a sum.
template <class Params>
const char* run(const CudaKernel<Params>& kernel, Params& params) {
  std::vector<unsigned char> workspace(size_t(kernel.workspace_bytes(params)), cuda_on_cpu::window() ? 0 : 0xFF);
  params.workspace = workspace.data();
  return kernel.launch(params, nullptr);
}

// Whether wrappers that know kernels of both kinds run those for the CPU. Then a window holds for their chunks.
extern "C" void set_on_cpu(int64_t whether);
extern "C" int64_t on_cpu();

// Runs one or the other kernel.
template <class Params>
const char* run(const CpuKernel<Params>& cpu, const CudaKernel<Params>& cuda, Params& params) {
  if (!on_cpu()) return run(cuda, params);
  constexpr Executor kExecutor{[](int64_t count, void (*task)(void*, int64_t), void* context) {
                                 const int64_t window = cuda_on_cpu::window();
                                 for (int64_t index = 0; index < count; ++index) {
                                   if (window > 0 && index == window && index < count - window) index = count - window;
                                   task(context, index);
                                 }
                               },
                               [](size_t bytes) -> void* {
                                 static std::vector<unsigned char> memory;
                                 memory.assign(bytes, 0);
                                 return memory.data();
                               }};
  cpu(params, kExecutor);
  return nullptr;
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
