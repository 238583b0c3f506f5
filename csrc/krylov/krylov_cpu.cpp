// The Krylov solvers' vector work on the CPU: one pass over the memory that each row needs.
#include "common/sum_products.h"
#include "krylov/krylov.h"
#include "krylov/krylov_math.h"

namespace auxfast::AUXFAST_ISA {

constexpr int64_t kChunk = 32768;                  // elements: enough to pay for handing it to a thread
constexpr int64_t kParallelElements = 2 * kChunk;  // fewer are done before a second thread is awake

// Long rows are cut into parts of kChunk elements; as many short rows as that together make one chunk. Work has
//     double part(int64_t row, int64_t from, int64_t count) const;
// which returns the part's sum.
template <class Work>
struct Parts {
  const Work* work;
  int64_t rows, n;
  int64_t per_row, per_chunk;
  double* sums;  // (rows, per_row)

  static void run(void* context, int64_t chunk) {
    const auto& self = *static_cast<const Parts*>(context);
    const int64_t begin = chunk * self.per_chunk, all = self.rows * self.per_row;
    const int64_t end = begin + self.per_chunk < all ? begin + self.per_chunk : all;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / self.per_row, from = i % self.per_row * kChunk;
      self.sums[i] = self.work->part(row, from, self.n - from < kChunk ? self.n - from : kChunk);
    }
  }
};

// sums: (rows,). The cuts depend on the sizes only and a row's parts are added in order: the same bits for any number
// of threads.
template <class Work>
void sum_rows(const Executor& executor, const Work& work, int64_t rows, int64_t n, double* sums) {
  Parts<Work> parts{&work, rows, n, n > kChunk ? (n + kChunk - 1) / kChunk : 1, n < kChunk ? kChunk / (n + 1) : 1,
                    sums};
  if (parts.per_row > 1)
    parts.sums = static_cast<double*>(executor.scratch(size_t(rows * parts.per_row) * sizeof(double)));
  const int64_t chunks = (rows * parts.per_row + parts.per_chunk - 1) / parts.per_chunk;
  if (rows * n >= kParallelElements)
    executor.parallel_for(chunks, &Parts<Work>::run, &parts);
  else
    for (int64_t chunk = 0; chunk < chunks; ++chunk) Parts<Work>::run(&parts, chunk);
  if (parts.per_row == 1) return;
  for (int64_t row = 0; row < rows; ++row) {
    sums[row] = 0;
    for (int64_t i = 0; i < parts.per_row; ++i) sums[row] += parts.sums[row * parts.per_row + i];
  }
}

// The operands that a part of one row has, and what each is multiplied by.
template <class T>
struct Operands {
  T* out;
  const T* from[1 + kMaxTerms];
  T coefficient[1 + kMaxTerms];
  int count = 0;  // those that are not left out
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
struct Combine {
  LinearCombination work;

  double part(int64_t row, int64_t from, int64_t count) const {
    Operands<T> operands{static_cast<T*>(work.out) + row * work.n + from, {}, {}};
    for (int i = 0; i <= work.num_terms; ++i) {
      const T coefficient = row_coefficient<T>(work, i, row);
      if (coefficient == 0) continue;
      operands.from[operands.count] = operand_row<T>(work, i, row) + from;
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
};

template <class T>
struct Dot {
  RowDots work;

  double part(int64_t row, int64_t from, int64_t count) const {
    const T* a = static_cast<const T*>(work.a) + row * work.n + from;
    const T* b = static_cast<const T*>(work.b) + row * work.n + from;
    return sum_products<T>(count, [a, b](int64_t at, auto zero) AUXFAST_INLINE {
      using V = decltype(zero);
      return Factors<V>{load_as<V>(a + at), load_as<V>(b + at)};
    });
  }
};

template <class T>
void linear_combination(const Executor& executor, const LinearCombination& work, double* squares) {
  sum_rows(executor, Combine<T>{work}, work.rows, work.n, squares);
}

template <class T>
void row_dots(const Executor& executor, const RowDots& work, double* dots) {
  sum_rows(executor, Dot<T>{work}, work.rows, work.n, dots);
}

extern const KrylovCpuKernels krylov_cpu_kernels = {linear_combination<float>, linear_combination<double>,
                                                    row_dots<float>, row_dots<double>};

}  // namespace auxfast::AUXFAST_ISA
