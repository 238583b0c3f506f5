// Runs CUDA kernels on the CPU, for tests: no GPU, no nvcc. include/cuda_runtime.h says CUDA's words with it.
//
// Every CUDA thread is a fiber with a stack of its own. It runs until it waits (at a barrier or a shuffle) or ends; who
// runs next is drawn from a seeded generator, out of all threads of the few blocks that are resident at a time. Blocks
// start in random order too. So what depends on an order that CUDA does not promise shows as a wrong result for some
// seeds, and always as a data race under ThreadSanitizer, to which each fiber is a thread and only barriers order them:
// two threads of one block at a barrier of theirs, blocks not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern const Position* position;  // of the running thread

// Of the random order.
extern "C" void set_seed(uint64_t seed);

// Lets only the first and the last so many blocks along each axis of a grid run, so that a test can launch kernels on
// sizes of which it has but the ends. 0, as at the beginning: all of them.
extern "C" void set_window(int64_t blocks);
extern "C" int64_t window();

// Which device is the current one, 0 at the beginning. Device i has 2^(34 - i) bytes of memory.
extern "C" void set_device(int64_t device);
int device();
constexpr size_t device_memory(int device) { return size_t(1) << (34 - device); }

// Kernels launched so far.
extern "C" int64_t launches();

// Runs `kernel` once in every thread and returns when all have ended, or when a mistake was found. After a mistake it
// runs nothing until take_error() was asked.
void launch(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& kernel);

// What was wrong with a launch since the last call, or nullptr. The text is valid until the next launch.
const char* take_error();

// Memory of the running thread's block, all bytes 0xFF (NaNs) when it starts. A static variable is known by `key`.
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);

// `where` is the place in the source, the same for all who meet there.
// What the running thread has begun to copy, and not waited for. It must be nothing when the thread ends.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
std::vector<Copy>& copies();

void block_barrier(const char* where);
void warp_barrier(const char* where, unsigned mask);
// Returns what lane `source` of the running thread's warp gave. Orders nothing else, as in CUDA.
uint64_t shuffle(const char* where, unsigned mask, uint64_t given, unsigned source);

}  // namespace cuda_on_cpu
