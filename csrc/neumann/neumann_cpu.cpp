// The Neumann step on the CPU: one pass over five streams of memory, which is all that it costs.
#include "common/sum_products.h"
#include "neumann/neumann.h"
#include "neumann/neumann_math.h"

namespace auxfast::AUXFAST_ISA {
namespace {

constexpr int64_t kChunkTiles = 256;              // 32768 elements: enough to pay for handing them to a thread
constexpr int64_t kParallelElements = 2 * 32768;  // fewer are done before a second thread is awake

// v, p: in and out, hv: in, all (count,). Returns the sum of squares of the new v.
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

// The last tensor that starts at or before `tile`.
template <class T>
int64_t tensor_at(const NeumannList<T>& list, int64_t tile) {
  int64_t low = 0, high = list.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (list.tensors[middle].first_tile <= tile ? low : high) = middle;
  }
  return low;
}

// Updates the elements of one chunk and returns the sum of squares of their new v.
template <class T>
double update_chunk(const NeumannList<T>& list, int64_t chunk) {
  const int64_t begin = chunk * kChunkTiles, end = begin + kChunkTiles;
  double sum = 0;
  for (int64_t t = tensor_at(list, begin); t < list.count && list.tensors[t].first_tile < end; ++t) {
    const NeumannTensor<T>& tensor = list.tensors[t];
    const int64_t from = begin > tensor.first_tile ? (begin - tensor.first_tile) * kTileElements : 0;
    const int64_t space = (end - tensor.first_tile) * kTileElements, to = space < tensor.numel ? space : tensor.numel;
    if (from < to) sum += update<T>(tensor.v + from, tensor.hv + from, tensor.p + from, to - from, list.step_size);
  }
  return sum;
}

// Chunks depend on the sizes only and their sums are added in order, which gives the same bits for any number of
// threads.
template <class T>
void step(const NeumannList<T>& list, const Executor& executor) {
  const int64_t chunks = (list.tiles + kChunkTiles - 1) / kChunkTiles;
  auto* sums = static_cast<double*>(executor.scratch(size_t(chunks) * sizeof(double)));
  int64_t elements = 0;
  for (int64_t t = 0; t < list.count; ++t) elements += list.tensors[t].numel;
  const auto work = [&](int64_t chunk) { sums[chunk] = update_chunk(list, chunk); };
  if (elements >= kParallelElements)
    executor.run(chunks, work);
  else
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk);
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk];
  *list.squared_norm = sum;
}

}  // namespace

extern const NeumannKernels<float> neumann_f32 = {step<float>};
extern const NeumannKernels<double> neumann_f64 = {step<double>};

}  // namespace auxfast::AUXFAST_ISA
