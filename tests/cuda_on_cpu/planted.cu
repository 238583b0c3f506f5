// Kernels with a mistake in them, and their correct twins: what the engine and the sanitizers must report, and must
// not.
#include <cstring>
#include <vector>

#include "common/async_copy.cuh"
#include "common/launch.cuh"

namespace {

constexpr int kThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

#define KERNEL         \
  template <bool kBug> \
  __global__ void

const char* verdict(bool right) {
  if (const char* error = auxfast::launch_error()) return error;
  return right ? nullptr : "wrong result";
}

KERNEL block_sum(int* sum) {
  STATIC_SHARED(int, warps, [kThreads / 32]);
  int value = 1;
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  if (!kBug) __syncthreads();
  if (threadIdx.x == 0) *sum = warps[0] + warps[1] + warps[2] + warps[3];
}
template <bool kBug>
const char* missing_syncthreads() {
  int sum = 0;
  LAUNCH(block_sum<kBug>, 1, kThreads, 0, nullptr, &sum);
  return verdict(sum == kThreads);
}

KERNEL neighbours(unsigned* out) {
  DYNAMIC_SHARED(unsigned, lanes);
  const unsigned lane = threadIdx.x;
  lanes[lane] = lane;
  if (!kBug) __syncwarp();
  out[lane] = lanes[(lane + 1) % 32];
}
template <bool kBug>
const char* missing_syncwarp() {
  unsigned out[32];
  LAUNCH(neighbours<kBug>, 1, 32, sizeof(out), nullptr, out);
  bool right = true;
  for (unsigned lane = 0; lane < 32; ++lane) right = right && out[lane] == (lane + 1) % 32;
  return verdict(right);
}

KERNEL count(int* total) {
  if (kBug)
    *total += 1;
  else
    atomicAdd(total, 1);
}
template <bool kBug>
const char* missing_atomic() {
  int total = 0;
  LAUNCH(count<kBug>, 1, kThreads, 0, nullptr, &total);
  return verdict(total == kThreads);
}
template <bool kBug>
const char* missing_atomic_between_blocks() {
  int total = 0;
  LAUNCH(count<kBug>, 50, 1, 0, nullptr, &total);
  return verdict(total == 50);
}

// Blocks of 32 numbers each; with the bug they reach into their neighbours'.
KERNEL write_blocks(float* out) {
  for (unsigned i = threadIdx.x; i < 32 + kBug; i += 32) out[blockIdx.x * 32 + i] = 1;
}
template <bool kBug>
const char* overlapping_blocks() {
  std::vector<float> out(32 * 10 + 1);
  LAUNCH(write_blocks<kBug>, 10, 32, 0, nullptr, out.data());
  return verdict(out[0] == 1 && out[319] == 1);
}

KERNEL fill_global(double* out, int count) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (kBug || i < count) out[i] = 1;
}
template <bool kBug>
const char* global_out_of_bounds() {
  std::vector<double> out(100);
  LAUNCH(fill_global<kBug>, 1, kThreads, 0, nullptr, out.data(), 100);
  return verdict(out[99] == 1);
}

__device__ void fill_reversed(float* memory, unsigned last, float* out) {
  memory[last - threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = memory[threadIdx.x];
}
KERNEL fill_static(float* out) {
  STATIC_SHARED(float, memory, [kThreads]);
  fill_reversed(memory, kThreads - !kBug, out);
}
KERNEL fill_dynamic(float* out) {
  DYNAMIC_SHARED(float, memory);
  fill_reversed(memory, kThreads - !kBug, out);
}
template <bool kBug>
const char* static_shared_out_of_bounds() {
  float out[kThreads];
  LAUNCH(fill_static<kBug>, 1, kThreads, 0, nullptr, out);
  return verdict(out[kThreads - 1] == 1);
}
template <bool kBug>
const char* dynamic_shared_out_of_bounds() {
  float out[kThreads];
  LAUNCH(fill_dynamic<kBug>, 1, kThreads, sizeof(out), nullptr, out);
  return verdict(out[kThreads - 1] == 1);
}

KERNEL sum_with_start(float* out) {
  STATIC_SHARED(float, sums, [kThreads]);
  if (!kBug) sums[threadIdx.x] = 0;
  sums[threadIdx.x] += 1;
  out[threadIdx.x] = sums[threadIdx.x];
}
template <bool kBug>
const char* uninitialised_shared() {
  float out[kThreads];
  LAUNCH(sum_with_start<kBug>, 1, kThreads, 0, nullptr, out);
  return verdict(out[0] == 1);
}

KERNEL some_threads_wait() {
  if (!kBug || threadIdx.x < 40) __syncthreads();
}
template <bool kBug>
const char* barrier_not_reached_by_all() {
  LAUNCH(some_threads_wait<kBug>, 3, kThreads, 0, nullptr);
  return verdict(true);
}

KERNEL wait_apart() {
  if (kBug && threadIdx.x % 2)
    __syncthreads();
  else
    __syncthreads();
}
template <bool kBug>
const char* two_barriers_taken_for_one() {
  LAUNCH(wait_apart<kBug>, 1, kThreads, 0, nullptr);
  return verdict(true);
}

KERNEL some_lanes_shuffle(unsigned* out) {
  if (!kBug || threadIdx.x < 20) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, threadIdx.x, 1);
}
template <bool kBug>
const char* shuffle_without_all_lanes() {
  unsigned out[kThreads];
  LAUNCH(some_lanes_shuffle<kBug>, 1, kThreads, 0, nullptr, out);
  return verdict(out[10] == 11);
}

KERNEL broadcast(unsigned* out) { out[threadIdx.x] = __shfl_sync(kBug ? 0xff : kAllLanes, threadIdx.x, 5); }
template <bool kBug>
const char* mask_without_the_lane() {
  unsigned out[32];
  LAUNCH(broadcast<kBug>, 1, 32, 0, nullptr, out);
  return verdict(out[31] == 5);
}

KERNEL nothing() {}
template <bool kBug>
const char* too_many_threads() {
  LAUNCH(nothing<kBug>, 1, dim3(32, 32, 1 + kBug), 0, nullptr);
  return verdict(true);
}
template <bool kBug>
const char* too_much_shared() {
  LAUNCH(nothing<kBug>, 1, 1, (48 << 10) + kBug, nullptr);
  return verdict(true);
}
template <bool kBug>
const char* no_blocks() {
  LAUNCH(nothing<kBug>, dim3(1, !kBug), 1, 0, nullptr);
  return verdict(true);
}

KERNEL static_and_dynamic() {
  STATIC_SHARED(char, memory, [16]);
  memory[0] = 1;
}
template <bool kBug>
const char* too_much_shared_together() {
  LAUNCH(static_and_dynamic<kBug>, 1, 1, (48 << 10) - 16 + kBug, nullptr);
  return verdict(true);
}

// The last copy is waited for in any case.
KERNEL copy_neighbours(const float* in, float* out) {
  DYNAMIC_SHARED(float, copied);
  auxfast::cuda::begin_copy(copied + threadIdx.x, in + threadIdx.x);
  if (!kBug) auxfast::cuda::wait_for_copies();
  __syncwarp();
  out[threadIdx.x] = copied[(threadIdx.x + 1) % 32];
  auxfast::cuda::wait_for_copies();
}
template <bool kBug>
const char* copy_read_too_early() {
  float in[32], out[32];
  for (float& number : in) number = 1;
  LAUNCH(copy_neighbours<kBug>, 1, 32, sizeof(out), nullptr, in, out);
  bool right = true;
  for (const float number : out) right = right && number == 1;
  return verdict(right);
}

KERNEL copy(const float* in) {
  DYNAMIC_SHARED(float, copied);
  auxfast::cuda::begin_copy(copied + threadIdx.x, in + threadIdx.x);
  if (!kBug) auxfast::cuda::wait_for_copies();
}
template <bool kBug>
const char* copy_never_waited_for() {
  const float in[32] = {};
  LAUNCH(copy<kBug>, 1, 32, sizeof(in), nullptr, in);
  return verdict(true);
}

struct Planted {
  const char* name;
  const char* (*bug)();
  const char* (*twin)();
};
#define PLANTED(name) {#name, name<true>, name<false>}
const Planted kPlanted[] = {
    PLANTED(missing_syncthreads),
    PLANTED(missing_syncwarp),
    PLANTED(missing_atomic),
    PLANTED(missing_atomic_between_blocks),
    PLANTED(overlapping_blocks),
    PLANTED(global_out_of_bounds),
    PLANTED(static_shared_out_of_bounds),
    PLANTED(dynamic_shared_out_of_bounds),
    PLANTED(uninitialised_shared),
    PLANTED(barrier_not_reached_by_all),
    PLANTED(two_barriers_taken_for_one),
    PLANTED(shuffle_without_all_lanes),
    PLANTED(mask_without_the_lane),
    PLANTED(too_many_threads),
    PLANTED(too_much_shared),
    PLANTED(too_much_shared_together),
    PLANTED(no_blocks),
    PLANTED(copy_read_too_early),
    PLANTED(copy_never_waited_for),
};

}  // namespace

extern "C" const char* planted(const char* name, int64_t bug) {
  for (const Planted& kernel : kPlanted)
    if (std::strcmp(kernel.name, name) == 0) return bug ? kernel.bug() : kernel.twin();
  return "no kernel of that name";
}
