// The Krylov solvers' vector work on the CPU: one pass over the memory that each row needs.
#include "common/sum_products.h"
#include "krylov/conjugate_gradient_math.h"
#include "krylov/krylov.h"
#include "krylov/krylov_math.h"
#include "krylov/minres_math.h"

namespace auxfast::AUXFAST_ISA {

// Two vectors of doubles side by side: one vector of floats. GCC converts those as a whole in half the instructions
// that it takes for their halves; but it adds halves in registers, and wholes in memory.
struct Doubles {
  Vec<double> low, high;

  friend AUXFAST_HD Doubles operator+(Doubles a, Doubles b) { return {a.low + b.low, a.high + b.high}; }
  friend AUXFAST_HD Doubles operator-(Doubles a, Doubles b) { return {a.low - b.low, a.high - b.high}; }
  friend AUXFAST_HD Doubles operator*(Doubles a, Doubles b) { return {a.low * b.low, a.high * b.high}; }
  friend AUXFAST_HD Doubles operator*(double a, Doubles b) { return {a * b.low, a * b.high}; }
};

template <>
struct Element<Vec<float>> {
  using Wide = Doubles;
  static AUXFAST_HD Vec<float> load(const float* from) { return load_as<Vec<float>>(from); }
  static AUXFAST_HD void store(float* to, Vec<float> value) { store_as(to, value); }
  static AUXFAST_HD Doubles load_wide(const double* from) {
    return {load_as<Vec<double>>(from), load_as<Vec<double>>(from + kLanes<double>)};
  }
  static AUXFAST_HD void store_wide(double* to, Doubles value) {
    store_as(to, value.low);
    store_as(to + kLanes<double>, value.high);
  }
  static AUXFAST_HD Doubles widened(Vec<float> value) {
    const Whole whole = __builtin_convertvector(value, Whole);
    Doubles halves;
    __builtin_memcpy(&halves, &whole, sizeof whole);
    return halves;
  }
  static AUXFAST_HD Vec<float> narrowed(Doubles value) {
    Whole whole;
    __builtin_memcpy(&whole, &value, sizeof value);
    return __builtin_convertvector(whole, Vec<float>);
  }

 private:
  typedef double Whole __attribute__((vector_size(2 * kVectorBytes)));
};

template <>
struct Element<Vec<double>> {
  using Wide = Vec<double>;
  static AUXFAST_HD Vec<double> load(const double* from) { return load_as<Vec<double>>(from); }
  static AUXFAST_HD void store(double* to, Vec<double> value) { store_as(to, value); }
  static AUXFAST_HD Vec<double> load_wide(const double* from) { return load(from); }
  static AUXFAST_HD void store_wide(double* to, Vec<double> value) { store(to, value); }
  static AUXFAST_HD Vec<double> widened(Vec<double> value) { return value; }
  static AUXFAST_HD Vec<double> narrowed(Vec<double> value) { return value; }
};

AUXFAST_HD double sum_elements(Doubles value) { return sum_lanes<double>(value.low + value.high); }
AUXFAST_HD double sum_elements(Vec<double> value) { return sum_lanes<double>(value); }

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

// The sums of a pass over elements from .. end of a row, in an order that depends on their number only. The pass comes
// by value, so that the compiler knows that what is stored into the row changes nothing of it.
template <class T, class Pass>
Sums pass_over(const Pass pass, int64_t from, int64_t end) {
  using V = Vec<T>;
  // This is the number of independent additions that hides their latency.
  constexpr int kUnroll = int(4 * sizeof(Vec<double>) / sizeof(typename Element<V>::Wide));
  Shares<V> sums[kUnroll] = {};
  int64_t at = from;
  while (at + kUnroll * kLanes<T> <= end)
    for (int i = 0; i < kUnroll; ++i, at += kLanes<T>) pass.template at<V>(at, sums[i]);
  for (; at + kLanes<T> <= end; at += kLanes<T>) pass.template at<V>(at, sums[0]);
  for (int i = 1; i < kUnroll; ++i) sums[0] = {sums[0].a + sums[i].a, sums[0].b + sums[i].b};
  Sums total{sum_elements(sums[0].a), sum_elements(sums[0].b)};
  for (; at < end; ++at) pass.template at<T>(at, total);
  return total;
}

// A pass over a row: tile by tile, which several threads take if `executor` is not null. The tiles' sums are added in
// order.
template <class Pass, class Work>
void run_pass(const Work& work, int64_t row, const Executor* executor) {
  const Pass pass(work, row);
  Sums sums{};
  if (!pass.skips()) {
    const int64_t tiles = (work.n + kTileElements - 1) / kTileElements;
    const auto tile = [&](int64_t i) {
      const int64_t from = i * kTileElements, end = from + kTileElements;
      return pass_over<typename Work::Type>(pass, from, end < work.n ? end : work.n);
    };
    if (executor == nullptr || tiles < 2) {
      for (int64_t i = 0; i < tiles; ++i) {
        const Sums share = tile(i);
        sums = {sums.a + share.a, sums.b + share.b};
      }
    } else {
      Sums* shares = static_cast<Sums*>(executor->scratch(size_t(tiles) * sizeof(Sums)));
      executor->run(tiles, [&](int64_t i) { shares[i] = tile(i); });
      for (int64_t i = 0; i < tiles; ++i) sums = {sums.a + shares[i].a, sums.b + shares[i].b};
    }
  }
  Pass::finish(work, row, sums);
}

// All passes of a step over one row.
template <class T>
void step_row(const ConjugateGradientStep<T>& work, int64_t row, const Executor* executor) {
  if (work.part != kAfterPreconditioner) {
    run_pass<Curvature<T>>(work, row, executor);
    run_pass<Residual<T>>(work, row, executor);
  } else {
    run_pass<PreconditionedResidual<T>>(work, row, executor);
  }
  if (work.part != kBeforePreconditioner) run_pass<Direction<T>>(work, row, executor);
}

template <class T>
void step_row(const MinresStep<T>& work, int64_t row, const Executor* executor) {
  if (work.part != kAfterPreconditioner) {
    run_pass<LanczosDiagonal<T>>(work, row, executor);
    run_pass<LanczosVector<T>>(work, row, executor);
  } else {
    run_pass<PreconditionedVector<T>>(work, row, executor);
  }
  if (work.part != kBeforePreconditioner) {
    run_pass<Directions<T>>(work, row, executor);
    run_pass<Solution<T>>(work, row, executor);
  }
}

// Threads share the tiles of a long row, one row after the other; of short rows each takes whole ones, so that all
// passes find them in its cache.
template <class Work>
void step(const Work& work, const Executor& executor) {
  if (work.n >= kParallelElements) {
    for (int64_t row = 0; row < work.rows; ++row) step_row(work, row, &executor);
  } else if (work.rows * work.n >= kParallelElements) {
    const int64_t per_chunk = work.n < kTileElements ? kTileElements / (work.n + 1) : 1;
    executor.run((work.rows + per_chunk - 1) / per_chunk, [&](int64_t chunk) {
      const int64_t begin = chunk * per_chunk, end = begin + per_chunk;
      for (int64_t row = begin; row < end && row < work.rows; ++row) step_row(work, row, nullptr);
    });
  } else {
    for (int64_t row = 0; row < work.rows; ++row) step_row(work, row, nullptr);
  }
}

}  // namespace

extern const KrylovKernels<float> krylov_f32 = {linear_combination<float>, row_dots<float>,
                                                step<ConjugateGradientStep<float>>, step<MinresStep<float>>};
extern const KrylovKernels<double> krylov_f64 = {linear_combination<double>, row_dots<double>,
                                                 step<ConjugateGradientStep<double>>, step<MinresStep<double>>};

}  // namespace auxfast::AUXFAST_ISA
