// Fibers: stacks that take turns on one thread of the process, and what the sanitizers have to be told of them.
//
// The engine is compiled without sanitizers, so that they watch the kernels and not it; CUDA_ON_CPU_ASAN or
// CUDA_ON_CPU_TSAN says which of them watches.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif
#ifdef CUDA_ON_CPU_TSAN
#include <sanitizer/tsan_interface.h>
#define TSAN(...) __VA_ARGS__
#else
#define TSAN(...)
#endif

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;  // a guard is whole pages, however large they are

struct Fiber {
  char* stack = nullptr;  // kStackBytes; the process's own stack has none here
  ucontext_t start;
  void* resume[5];  // as __builtin_setjmp leaves it
  bool has_begun = false;
  ASAN(void* fake_stack = nullptr;)
  TSAN(void* tsan = nullptr;)

  // `entry` never returns, and begins with arrive().
  void create(void (*entry)()) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      std::perror("cuda_on_cpu: no memory for a thread's stack");
      std::abort();
    }
    stack = static_cast<char*>(memory) + kGuardBytes;
    getcontext(&start);
    start.uc_stack.ss_sp = stack;
    start.uc_stack.ss_size = kStackBytes;
    makecontext(&start, entry, 0);
    TSAN(tsan = __tsan_create_fiber(0);)
  }

  static void arrive() { ASAN(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);) }

  ~Fiber() {
    if (!stack) return;
    ASAN(__asan_unpoison_memory_region(stack, kStackBytes);)
    TSAN(__tsan_destroy_fiber(tsan);)
    munmap(stack - kGuardBytes, kGuardBytes + kStackBytes);
  }
};

// The compiler's setjmp takes 10 ns; swapcontext asks the kernel for the signal mask and takes 200.
[[gnu::noinline]] inline void go_on(Fiber& fiber) {
  if (fiber.has_begun) __builtin_longjmp(fiber.resume, 1);
  setcontext(&fiber.start);
}

// Leaves `self`, which runs, for another fiber; returns when somebody switches back to it.
[[gnu::noinline]] inline void switch_fibers(Fiber& self, Fiber& next) {
  self.has_begun = true;
  ASAN(__sanitizer_start_switch_fiber(&self.fake_stack, next.stack, next.stack ? kStackBytes : 0);)
  TSAN(__tsan_switch_to_fiber(next.tsan, __tsan_switch_to_fiber_no_sync);)
  if (__builtin_setjmp(self.resume) == 0) go_on(next);
  ASAN(__sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);)
}

// For ThreadSanitizer, to which each fiber is a thread. What a fiber did until it released `key` happens before what
// others do once they have acquired it. watch(running fiber) ends any number of these calls.
#ifdef CUDA_ON_CPU_TSAN
inline void watch(const Fiber& fiber) { __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync); }
inline void release(const Fiber& fiber, void* key) {
  watch(fiber);
  __tsan_release(key);
}
inline void acquire(const Fiber& fiber, void* key) {
  watch(fiber);
  __tsan_acquire(key);
}
#else
inline void watch(const Fiber&) {}
inline void release(const Fiber&, void*) {}
inline void acquire(const Fiber&, void*) {}
#endif

}  // namespace cuda_on_cpu
