// The engine of engine.hpp.
#include "engine.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "fiber.hpp"

namespace cuda_on_cpu {

const Position* position;

namespace {

constexpr unsigned kResidentBlocks = 2;
constexpr unsigned kMaxThreads = 1024;     // of a block
constexpr size_t kSharedBytes = 48 << 10;  // of a block, static and dynamic together, unless CUDA is asked for more
constexpr size_t kGapBytes = 256;          // before each shared variable, and behind the last one
constexpr int kMaxStatics = 16;

enum class State { ready, at_barrier, in_warp, ended };

struct Block;

struct Thread : Fiber {
  Position position;
  Block* block = nullptr;
  unsigned index = 0;  // in its block
  State state = State::ended;
  const char* where = nullptr;  // it waits
  unsigned mask = 0, source = 0;
  uint64_t given = 0, received = 0;
  std::vector<Copy> copies;
};

struct Static {
  const void* key;
  void* memory;
};

// A place for one block at a time, with its threads and its shared memory.
struct Block {
  Thread members[kMaxThreads];
  unsigned threads = 0, ended = 0, at_barrier = 0;
  const char* barrier = nullptr;  // at which the first of them waits
  Static statics[kMaxStatics];
  int num_statics = 0;
  size_t shared_bytes = 0, used = 0;  // of memory: shared variables, and these with gaps
  alignas(16) char memory[kSharedBytes + (kMaxStatics + 2) * (kGapBytes + 16)];
  char barrier_key, warp_keys[kMaxThreads / 32];  // ThreadSanitizer's names for what orders the threads

  Block();
  ~Block();
};

Thread host;  // that launches
Thread* running = &host;
std::vector<std::unique_ptr<Block>> residents;
std::vector<Thread*> ready;
const std::function<void()>* body;
char launch_key, error[1000];
bool failed = false;
int64_t num_launches = 0, window_blocks = 0, current_device = 0;
uint64_t random_state = 1;

uint64_t random_below(uint64_t end) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % end;
}

// ----------------------------------------------------------------------------------------------------------- threads

void switch_to(Thread& next) {
  Thread& self = *running;
  if (&self == &next) return;
  running = &next;
  position = &next.position;
  switch_fibers(self, next);
}

void make_ready(Thread& thread) {
  thread.state = State::ready;
  ready.push_back(&thread);
}

Thread& take_ready() {
  std::swap(ready[random_below(ready.size())], ready.back());
  Thread& thread = *ready.back();
  ready.pop_back();
  return thread;
}

// The running thread cannot go on for now.
void wait() { switch_to(ready.empty() ? host : take_ready()); }

// The first mistake is the one to report.
__attribute__((format(printf, 1, 2))) void set_error(const char* format, ...) {
  if (std::exchange(failed, true)) return;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error, sizeof(error), format, arguments);
  va_end(arguments);
}

// Ends the launch: no thread will run again.
[[noreturn]] void give_up() {
  for (;;) switch_to(host);
}

// visit(thread) for the threads of a block; for the lanes in `mask` of a thread's warp.
template <class Visit>
void for_each_thread(Block& block, const Visit& visit) {
  for (unsigned i = 0; i < block.threads; ++i) visit(block.members[i]);
}
template <class Visit>
void for_each_lane(const Thread& thread, unsigned mask, const Visit& visit) {
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) visit(thread.block->members[thread.index / 32 * 32 + lane]);
}

void run_threads() {
  Fiber::arrive();
  for (;;) {
    (*body)();
    if (!running->copies.empty()) {
      const uint3 b = running->position.block, t = running->position.thread;
      set_error("block (%u, %u, %u): thread (%u, %u, %u) has not waited for %zu of its copies", b.x, b.y, b.z, t.x, t.y,
                t.z, running->copies.size());
      give_up();
    }
    running->state = State::ended;
    Block& block = *running->block;
    release(*running, &block.barrier_key);
    if (++block.ended == block.threads)
      switch_to(host);  // to start another block
    else
      wait();
  }
}

Block::Block() { ASAN(__asan_poison_memory_region(memory, sizeof(memory));) }
Block::~Block() { ASAN(__asan_unpoison_memory_region(memory, sizeof(memory));) }

// -------------------------------------------------------------------------------------------------------------- blocks

void* take_shared(Block& block, size_t bytes) {
  block.shared_bytes += bytes;
  if (block.shared_bytes > kSharedBytes || block.num_statics == kMaxStatics) {
    set_error("a block with %zu bytes of shared memory and %d static variables: CUDA allows 49152 bytes, the engine %d",
              block.shared_bytes, block.num_statics, kMaxStatics);
    give_up();
  }
  char* memory = block.memory + block.used + kGapBytes;
  block.used += kGapBytes + (bytes + 15) / 16 * 16;
  ASAN(__asan_unpoison_memory_region(memory, bytes);)
  // Not by memset: a sanitizer would see it, as an access of the running thread.
  for (size_t i = 0; i < bytes; i += 8) *reinterpret_cast<volatile uint64_t*>(memory + i) = ~uint64_t(0);
  return memory;
}

void start(Block& block, uint3 index, dim3 size, dim3 grid, size_t dynamic_bytes) {
  block.threads = size.x * size.y * size.z;
  block.ended = block.at_barrier = block.num_statics = 0;
  block.shared_bytes = block.used = 0;
  ASAN(__asan_poison_memory_region(block.memory, sizeof(block.memory));)
  take_shared(block, dynamic_bytes);
  for (unsigned i = 0; i < block.threads; ++i) {
    Thread& thread = block.members[i];
    if (!thread.stack) thread.create(run_threads);
    thread.position = {{i % size.x, i / size.x % size.y, i / (size.x * size.y)}, index, size, grid};
    thread.block = &block;
    thread.index = i;
    make_ready(thread);
    acquire(thread, &launch_key);
    acquire(thread, &block.barrier_key);  // the end of the block that was here
  }
  watch(*running);
}

bool is_free(const Block& block) { return block.ended == block.threads; }

// Two threads of a block wait for each other.
void check_place(const char* one, const char* other) {
  if (std::strcmp(one, other) == 0) return;
  set_error("threads of one block wait for each other at %s and at %s", one, other);
  give_up();
}

// All threads wait: says of one block who waits for whom.
void report_deadlock() {
  for (const auto& block : residents) {
    if (is_free(*block)) continue;
    const Thread* waits = std::find_if(block->members, block->members + block->threads,
                                       [](const Thread& thread) { return thread.state != State::ended; });
    const uint3 b = waits->position.block, t = waits->position.thread;
    return set_error(
        "block (%u, %u, %u): thread (%u, %u, %u) waits at %s for threads that never come; %u of %u have ended", b.x,
        b.y, b.z, t.x, t.y, t.z, waits->where, block->ended, block->threads);
  }
}

bool check_launch(dim3 grid, dim3 block, size_t dynamic_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64)
    set_error("a launch of (%u, %u, %u) threads a block: CUDA allows 1 to 1024, at most 64 of them along z", block.x,
              block.y, block.z);
  else if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    set_error("a launch of (%u, %u, %u) blocks: CUDA allows 1 to (2^31 - 1, 65535, 65535)", grid.x, grid.y, grid.z);
  else if (dynamic_bytes > kSharedBytes)
    set_error("a launch with %zu bytes of dynamic shared memory: CUDA allows 49152", dynamic_bytes);
  return !failed;
}

// The block behind `index` along an axis of a grid, or behind the gap in the window.
unsigned next_block(unsigned index, unsigned count) {
  const int64_t next = int64_t(index) + 1;
  return unsigned(window_blocks > 0 && next == window_blocks ? std::max(next, count - window_blocks) : next);
}

}  // namespace

extern "C" int64_t launches() { return num_launches; }

extern "C" void set_device(int64_t device) { current_device = device; }
int device() { return int(current_device); }

extern "C" void set_window(int64_t blocks) { window_blocks = blocks; }
extern "C" int64_t window() { return window_blocks; }

extern "C" void set_seed(uint64_t seed) { random_state = (seed + 1) * 0x9E3779B97F4A7C15u; }

const char* take_error() { return std::exchange(failed, false) ? error : nullptr; }

void launch(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& kernel) {
  ++num_launches;
  if (failed || !check_launch(grid, block, dynamic_bytes)) return;
  body = &kernel;
  std::vector<uint3> blocks;
  for (uint3 b{}; b.z < grid.z; b.z = next_block(b.z, grid.z))
    for (b.y = 0; b.y < grid.y; b.y = next_block(b.y, grid.y))
      for (b.x = 0; b.x < grid.x; b.x = next_block(b.x, grid.x)) {
        blocks.push_back(b);
        std::swap(blocks.back(), blocks[random_below(blocks.size())]);
      }
  while (residents.size() < kResidentBlocks) residents.push_back(std::make_unique<Block>());
  ready.reserve(kResidentBlocks * kMaxThreads);
  TSAN(host.tsan = __tsan_get_current_fiber();)
  release(host, &launch_key);
  for (;;) {
    for (const auto& resident : residents)
      if (is_free(*resident) && !blocks.empty()) {
        start(*resident, blocks.back(), block, grid, dynamic_bytes);
        blocks.pop_back();
      }
    if (ready.empty()) break;
    switch_to(take_ready());
    if (failed) break;
  }
  if (!failed) report_deadlock();

  for (const auto& resident : residents) {
    if (failed) for_each_thread(*resident, [&](Thread& thread) { release(thread, &resident->barrier_key); });
    acquire(host, &resident->barrier_key);
  }
  if (failed) {  // threads that wait have something on their stacks
    ready.clear();
    residents.clear();
  }
}

void* dynamic_shared() { return running->block->memory + kGapBytes; }  // the first that was taken

void* static_shared(const void* key, size_t bytes) {
  Block& block = *running->block;
  for (int i = 0; i < block.num_statics; ++i)
    if (block.statics[i].key == key) return block.statics[i].memory;
  void* memory = take_shared(block, bytes);
  block.statics[block.num_statics++] = {key, memory};
  return memory;
}

std::vector<Copy>& copies() { return running->copies; }

void block_barrier(const char* where) {
  Block& block = *running->block;
  running->state = State::at_barrier;
  running->where = where;
  if (block.at_barrier++ == 0) block.barrier = where;
  check_place(where, block.barrier);
  if (block.at_barrier == block.threads) {
    block.at_barrier = 0;
    for_each_thread(block, [&](Thread& thread) { release(thread, &block.barrier_key); });
    for_each_thread(block, [&](Thread& thread) { acquire(thread, &block.barrier_key); });
    watch(*running);
    for_each_thread(block, make_ready);
  }
  wait();
}

namespace {

// Waits for the lanes in `mask`. The last one to come calls complete() before they go on.
template <class Complete>
void meet(const char* where, unsigned mask, const Complete& complete) {
  Thread& self = *running;
  const unsigned lanes = std::min(self.block->threads - self.index / 32 * 32, 32u);
  if (!(mask >> self.index % 32 & 1) || (lanes < 32 && mask >> lanes)) {
    set_error("%s: lane %u of %u gave the mask %#x", where, self.index % 32, lanes, mask);
    give_up();
  }
  self.state = State::in_warp;
  self.where = where;
  self.mask = mask;
  bool all = true;
  for_each_lane(self, mask,
                [&](Thread& thread) { all = all && thread.state == State::in_warp && thread.mask == mask; });
  if (all) {
    for_each_lane(self, mask, [&](Thread& thread) { check_place(where, thread.where); });
    complete();
    for_each_lane(self, mask, make_ready);
  }
  wait();
}

}  // namespace

void warp_barrier(const char* where, unsigned mask) {
  Thread& self = *running;
  char* key = &self.block->warp_keys[self.index / 32];
  meet(where, mask, [&] {
    for_each_lane(self, mask, [&](Thread& thread) { release(thread, key); });
    for_each_lane(self, mask, [&](Thread& thread) { acquire(thread, key); });
    watch(*running);
  });
}

uint64_t shuffle(const char* where, unsigned mask, uint64_t given, unsigned source) {
  Thread& self = *running;
  self.given = given;
  self.source = source;
  meet(where, mask, [&] {
    const Thread* warp = self.block->members + self.index / 32 * 32;
    for_each_lane(self, mask, [&](Thread& thread) {
      thread.received = mask >> thread.source & 1 ? warp[thread.source].given : ~uint64_t(0);  // undefined in CUDA
    });
  });
  return self.received;
}

}  // namespace cuda_on_cpu
