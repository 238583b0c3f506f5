// The signatures of kernels, and what a kernel on the CPU is lent by its host: it knows neither torch nor threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace auxfast {

struct Executor {
  // Runs task(context, index) once for every index in [0, count), in any order and on any thread.
  void (*parallel_for)(int64_t count, void (*task)(void* context, int64_t index), void* context);
  // Returns memory of the calling thread, aligned to 64 bytes, valid until this thread asks again.
  void* (*scratch)(size_t bytes);

  // Does the same for anything that can be called with an index.
  template <class Task>
  void run(int64_t count, const Task& task) const {
    parallel_for(
        count, [](void* context, int64_t index) { (*static_cast<const Task*>(context))(index); },
        const_cast<Task*>(&task));
  }
};

// A kernel takes the plain struct of its op (<op>.h): pointers and sizes.
template <class Params>
using CpuKernel = void (*)(const Params&, const Executor&);

// On CUDA all pointers of the struct are to memory of the device, unless it says otherwise, and its `workspace` has as
// many bytes as workspace_bytes() says. launch() enqueues the work on a stream and returns nullptr, or CUDA's error
// message for a launch that failed.
template <class Params>
struct CudaKernel {
  int64_t (*workspace_bytes)(const Params&);
  const char* (*launch)(const Params&, void* stream);
};

}  // namespace auxfast
