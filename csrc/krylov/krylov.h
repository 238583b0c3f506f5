// What the kernels of the Krylov solvers' vector work are given, and what they offer: pointers and sizes, nothing of
// torch. All matrices are contiguous.
#pragma once

#include <cstdint>

#include "common/parallel.h"

namespace auxfast {

constexpr int kMaxTerms = 3;

// out <- coefficients[0] out + sum_i coefficients[1 + i] terms[i], row by row; a coefficient of 0 leaves its operand
// out.
struct LinearCombination {
  void* out;                     // (rows, n) updated in place
  const void* terms[kMaxTerms];  // (rows, n) each may be out itself: every element is read before it is written
  int num_terms;                 // 1 to kMaxTerms
  const double* coefficients;    // (1 + num_terms, rows)
  int64_t rows, n;
};

struct RowDots {
  const void *a, *b;  // (rows, n)
  int64_t rows, n;
};

struct KrylovCpuKernels {
  // squares: (rows,) the sums of squares of the new rows of out
  void (*linear_combination_float)(const Executor&, const LinearCombination&, double* squares);
  void (*linear_combination_double)(const Executor&, const LinearCombination&, double* squares);
  // dots: (rows,)
  void (*row_dots_float)(const Executor&, const RowDots&, double* dots);
  void (*row_dots_double)(const Executor&, const RowDots&, double* dots);
};

namespace cuda {
// How many float64 the kernels need as workspace on the device.
int64_t krylov_workspace(int64_t rows, int64_t n);
// Enqueue the work on `stream`; every pointer is to memory of the device. They return nullptr, or CUDA's word on a
// launch that failed.
const char* linear_combination_float(const LinearCombination& work, double* workspace, double* squares, void* stream);
const char* linear_combination_double(const LinearCombination& work, double* workspace, double* squares, void* stream);
const char* row_dots_float(const RowDots& work, double* workspace, double* dots, void* stream);
const char* row_dots_double(const RowDots& work, double* workspace, double* dots, void* stream);
}  // namespace cuda

}  // namespace auxfast
