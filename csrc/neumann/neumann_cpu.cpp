// The Neumann step on the CPU: one pass over five streams of memory, which is all that it costs.
#include "common/sum_products.h"
#include "neumann/neumann.h"
#include "neumann/neumann_math.h"

namespace auxfast::AUXFAST_ISA {

constexpr int64_t kChunkGroups = 256;             // 32768 elements: enough to pay for handing it to a thread
constexpr int64_t kParallelElements = 2 * 32768;  // fewer are done before a second thread is awake

// v, hv, p: (count,); returns the sum of squares of the new v.
template <class T>
double update(T* v, const T* hv, T* p, int64_t count, T step_size) {
  return sum_products<T>(count, [=](int64_t at, auto zero) AUXFAST_INLINE {
    using V = decltype(zero);
    V new_v = load_as<V>(v + at), new_p = load_as<V>(p + at);
    neumann_element(new_v, load_as<V>(hv + at), new_p, step_size);
    store_as(v + at, new_v);
    store_as(p + at, new_p);
    return Factors<V>{new_v, new_v};
  });
}

// The last tensor that starts at or before `group`.
inline int64_t tensor_at(const NeumannList& list, int64_t group) {
  int64_t low = 0, high = list.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (list.tensors[middle].first_group <= group ? low : high) = middle;
  }
  return low;
}

template <class T>
struct Chunks {
  const NeumannList* list;
  double* sums;  // (chunks,)

  static void run(void* context, int64_t chunk) {
    const auto& self = *static_cast<const Chunks*>(context);
    const NeumannList& list = *self.list;
    const int64_t begin = chunk * kChunkGroups, end = begin + kChunkGroups;
    double sum = 0;
    for (int64_t t = tensor_at(list, begin); t < list.count && list.tensors[t].first_group < end; ++t) {
      const NeumannTensor& tensor = list.tensors[t];
      const int64_t from = begin > tensor.first_group ? (begin - tensor.first_group) * kGroup : 0;
      const int64_t space = (end - tensor.first_group) * kGroup, to = space < tensor.numel ? space : tensor.numel;
      if (from < to)
        sum += update<T>(static_cast<T*>(tensor.v) + from, static_cast<const T*>(tensor.hv) + from,
                         static_cast<T*>(tensor.p) + from, to - from, T(list.step_size));
    }
    self.sums[chunk] = sum;
  }
};

// Chunks depend on the sizes only and their sums are added in order: the same bits for any number of threads.
template <class T>
double neumann_step(const Executor& executor, const NeumannList& list) {
  const int64_t chunks = (list.groups + kChunkGroups - 1) / kChunkGroups;
  Chunks<T> work{&list, static_cast<double*>(executor.scratch(size_t(chunks) * sizeof(double)))};
  int64_t elements = 0;
  for (int64_t t = 0; t < list.count; ++t) elements += list.tensors[t].numel;
  if (elements >= kParallelElements)
    executor.parallel_for(chunks, &Chunks<T>::run, &work);
  else
    for (int64_t chunk = 0; chunk < chunks; ++chunk) Chunks<T>::run(&work, chunk);
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += work.sums[chunk];
  return sum;
}

extern const NeumannCpuKernels neumann_cpu_kernels = {neumann_step<float>, neumann_step<double>};

}  // namespace auxfast::AUXFAST_ISA
