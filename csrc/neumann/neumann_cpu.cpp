// The Neumann steps on the CPU: one pass over all streams of memory, which is all that they cost.
#include "common/sum_products.h"
#include "neumann/neumann.h"
#include "neumann/neumann_math.h"

namespace auxfast::AUXFAST_ISA {
namespace {

constexpr int64_t kChunkTiles = 256;              // 32768 elements: enough to pay for handing them to a thread
constexpr int64_t kParallelElements = 2 * 32768;  // fewer are done before a second thread is awake

struct Squares {
  double of_v, of_product;
};

// Updates `count` elements from `from` on. Returns the sum of squares of the new v.
template <class T>
Squares update(const NeumannTensor<T>& tensor, int64_t from, int64_t count, T step_size) {
  T *v = tensor.v + from, *p = tensor.p + from;
  const T* hv = tensor.hv + from;
  const double square = sum_products<T>(count, [=](int64_t at, auto zero) AUXFAST_INLINE {
    using V = decltype(zero);
    V new_v = load_as<V>(v + at), new_p = load_as<V>(p + at);
    neumann_element(new_v, load_as<V>(hv + at), new_p, step_size);
    store_as(v + at, new_v);
    store_as(p + at, new_p);
    return Factors<V>{new_v, new_v};
  });
  return {square, 0};
}

// Does the same for the guarded step, and sums the squares of hv. They are read once more for that, from the cache.
template <class T>
Squares update(const GuardedTensor<T>& tensor, int64_t from, int64_t count, T step_size) {
  const T *v = tensor.v + from, *hv = tensor.hv + from;
  T *v_before = tensor.v_before + from, *p = tensor.p + from;
  const double of_product = sum_products<T>(count, [=](int64_t at, auto zero) AUXFAST_INLINE {
    const auto product = load_as<decltype(zero)>(hv + at);
    return Factors<decltype(zero)>{product, product};
  });
  const double square = sum_products<T>(count, [=](int64_t at, auto zero) AUXFAST_INLINE {
    using V = decltype(zero);
    V new_v = load_as<V>(v_before + at), new_p = load_as<V>(p + at);
    guarded_element(load_as<V>(v + at), new_v, load_as<V>(hv + at), new_p, step_size);
    store_as(v_before + at, new_v);
    store_as(p + at, new_p);
    return Factors<V>{new_v, new_v};
  });
  return {square, of_product};
}

// The last tensor that starts at or before `tile`.
template <class Tensor>
int64_t tensor_at(const TensorList<Tensor>& list, int64_t tile) {
  int64_t low = 0, high = list.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (list.tensors[middle].first_tile <= tile ? low : high) = middle;
  }
  return low;
}

// Updates the elements of one chunk.
template <class Tensor, class T>
Squares update_chunk(const TensorList<Tensor>& list, int64_t chunk, T step_size) {
  const int64_t begin = chunk * kChunkTiles, end = begin + kChunkTiles;
  Squares sum{0, 0};
  for (int64_t t = tensor_at(list, begin); t < list.count && list.tensors[t].first_tile < end; ++t) {
    const Tensor& tensor = list.tensors[t];
    const int64_t from = begin > tensor.first_tile ? (begin - tensor.first_tile) * kTileElements : 0;
    const int64_t space = (end - tensor.first_tile) * kTileElements, to = space < tensor.numel ? space : tensor.numel;
    if (from >= to) continue;
    const Squares share = update(tensor, from, to - from, step_size);
    sum = {sum.of_v + share.of_v, sum.of_product + share.of_product};
  }
  return sum;
}

// Updates all elements. Chunks depend on the sizes only and their sums are added in order, which gives the same bits
// for any number of threads.
template <class Tensor, class T>
Squares update_all(const TensorList<Tensor>& list, T step_size, const Executor& executor) {
  const int64_t chunks = (list.tiles + kChunkTiles - 1) / kChunkTiles;
  auto* sums = static_cast<Squares*>(executor.scratch(size_t(chunks) * sizeof(Squares)));
  int64_t elements = 0;
  for (int64_t t = 0; t < list.count; ++t) elements += list.tensors[t].numel;
  const auto work = [&](int64_t chunk) { sums[chunk] = update_chunk(list, chunk, step_size); };
  if (elements >= kParallelElements)
    executor.run(chunks, work);
  else
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk);
  Squares sum{0, 0};
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    sum = {sum.of_v + sums[chunk].of_v, sum.of_product + sums[chunk].of_product};
  return sum;
}

template <class T>
void step(const NeumannStep<T>& work, const Executor& executor) {
  *work.sums = update_all(work.list, work.step_size, executor).of_v;
}

template <class T>
void guarded_step(const GuardedStep<T>& work, const Executor& executor) {
  if (work.numbers[kGrew] != 0) return;
  const Squares squares = update_all(work.list, work.step_size, executor);
  note_step(work.numbers, squares.of_v, squares.of_product);
}

}  // namespace

extern const NeumannKernels<float> neumann_f32 = {step<float>, guarded_step<float>};
extern const NeumannKernels<double> neumann_f64 = {step<double>, guarded_step<double>};

}  // namespace auxfast::AUXFAST_ISA
