// The Krylov solvers' vector work on the CPU: one pass over the memory that each row needs.
#include "common/sum_products.h"
#include "krylov/krylov.h"
#include "krylov/krylov_math.h"

namespace auxfast::AUXFAST_ISA {
namespace {

constexpr int64_t kTileElements = 32768;                  // enough to pay for handing them to a thread
constexpr int64_t kParallelElements = 2 * kTileElements;  // fewer are done before a second thread is awake

// A tile is up to kTileElements elements of one row. A chunk, which one thread takes, is one tile of a long row, or as
// many short rows as have that many elements together. tile(row, from, count) works on elements from .. from + count of
// a row and returns their sum. sums: out, (rows,). The cuts depend on the sizes only and a row's tiles are added in
// order: the same bits for any number of threads.
template <class Tile>
void sum_rows(const Executor& executor, int64_t rows, int64_t n, double* sums, const Tile& tile) {
  const int64_t per_row = n > kTileElements ? (n + kTileElements - 1) / kTileElements : 1;
  const int64_t per_chunk = n < kTileElements ? kTileElements / (n + 1) : 1, tiles = rows * per_row;
  double* tile_sums = per_row > 1 ? static_cast<double*>(executor.scratch(size_t(tiles) * sizeof(double))) : sums;
  const auto work = [&](int64_t chunk) {
    const int64_t begin = chunk * per_chunk, end = begin + per_chunk < tiles ? begin + per_chunk : tiles;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i % per_row * kTileElements;
      tile_sums[i] = tile(i / per_row, from, n - from < kTileElements ? n - from : kTileElements);
    }
  };
  const int64_t chunks = (tiles + per_chunk - 1) / per_chunk;
  if (rows * n >= kParallelElements)
    executor.run(chunks, work);
  else
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk);
  if (per_row == 1) return;
  for (int64_t row = 0; row < rows; ++row) {
    sums[row] = 0;
    for (int64_t i = 0; i < per_row; ++i) sums[row] += tile_sums[row * per_row + i];
  }
}

// What a tile of one row of a linear combination is made of.
template <class T>
struct Operands {
  T* out;
  const T* from[1 + kMaxTerms];
  T coefficient[1 + kMaxTerms];
  int count = 0;  // of those that are not left out
};

template <int kCount, class T>
double combine(const Operands<T>& operands, int64_t count) {
  return sum_products<T>(count, [operands](int64_t at, auto zero) AUXFAST_INLINE {
    using V = decltype(zero);
    V value = zero;
    AUXFAST_UNROLL
    for (int i = 0; i < kCount; ++i) add_operand(value, operands.coefficient[i], load_as<V>(operands.from[i] + at));
    store_as(operands.out + at, value);
    return Factors<V>{value, value};
  });
}

template <class T>
double combine_tile(const LinearCombination<T>& work, int64_t row, int64_t from, int64_t count) {
  Operands<T> operands{work.out + row * work.n + from, {}, {}};
  for (int i = 0; i <= work.num_terms; ++i) {
    const T coefficient = row_coefficient(work, i, row);
    if (coefficient == 0) continue;
    operands.from[operands.count] = operand_row(work, i, row) + from;
    operands.coefficient[operands.count++] = coefficient;
  }
  switch (operands.count) {
    case 0:
      return combine<0>(operands, count);
    case 1:
      return combine<1>(operands, count);
    case 2:
      return combine<2>(operands, count);
    case 3:
      return combine<3>(operands, count);
    default:
      return combine<4>(operands, count);
  }
}

template <class T>
double dot_tile(const RowDots<T>& work, int64_t row, int64_t from, int64_t count) {
  const T *a = work.a + row * work.n + from, *b = work.b + row * work.n + from;
  return sum_products<T>(count, [a, b](int64_t at, auto zero) AUXFAST_INLINE {
    using V = decltype(zero);
    return Factors<V>{load_as<V>(a + at), load_as<V>(b + at)};
  });
}

template <class T>
void linear_combination(const LinearCombination<T>& work, const Executor& executor) {
  sum_rows(executor, work.rows, work.n, work.sums,
           [&](int64_t row, int64_t from, int64_t count) { return combine_tile(work, row, from, count); });
}

template <class T>
void row_dots(const RowDots<T>& work, const Executor& executor) {
  sum_rows(executor, work.rows, work.n, work.sums,
           [&](int64_t row, int64_t from, int64_t count) { return dot_tile(work, row, from, count); });
}

}  // namespace

extern const KrylovKernels<float> krylov_f32 = {linear_combination<float>, row_dots<float>};
extern const KrylovKernels<double> krylov_f64 = {linear_combination<double>, row_dots<double>};

}  // namespace auxfast::AUXFAST_ISA
