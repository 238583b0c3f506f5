// What a CPU kernel is lent by its host: it knows neither torch nor threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace auxfast {

struct Executor {
  // Runs task(context, index) once for every index in [0, count), in any order and on any thread.
  void (*parallel_for)(int64_t count, void (*task)(void* context, int64_t index), void* context);
  // Memory of the calling thread, aligned to 64 bytes, valid until this thread asks again.
  void* (*scratch)(size_t bytes);

  // The same for anything that can be called with an index.
  template <class Task>
  void run(int64_t count, const Task& task) const {
    parallel_for(
        count, [](void* context, int64_t index) { (*static_cast<const Task*>(context))(index); },
        const_cast<Task*>(&task));
  }
};

}  // namespace auxfast
