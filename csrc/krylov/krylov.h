// What the kernels of the Krylov solvers' vector work are told: pointers and sizes, nothing of torch. All matrices are
// contiguous.
#pragma once

#include <cstdint>

#include "common/kernels.h"

namespace auxfast {

constexpr int kMaxTerms = 3;

// out <- coefficients[0] out + sum_i coefficients[1 + i] terms[i], row by row; a coefficient of 0 leaves its operand
// out.
template <class T>
struct LinearCombination {
  T* out;                     // in and out: (rows, n)
  const T* terms[kMaxTerms];  // in: (rows, n) each; may be out itself, since every element is read before it is written
  int num_terms;              // 1 to kMaxTerms
  const double* coefficients;  // in: (1 + num_terms, rows)
  int64_t rows, n;
  double* sums;     // out: (rows,), the sums of squares of the new rows of out
  void* workspace;  // overwritten; CUDA only
};

template <class T>
struct RowDots {
  const T *a, *b;  // in: (rows, n)
  int64_t rows, n;
  double* sums;     // out: (rows,), the dot products
  void* workspace;  // overwritten; CUDA only
};

template <class T>
struct KrylovKernels {
  CpuKernel<LinearCombination<T>> linear_combination;
  CpuKernel<RowDots<T>> row_dots;
};
template <class T>
struct KrylovCudaKernels {
  CudaKernel<LinearCombination<T>> linear_combination;
  CudaKernel<RowDots<T>> row_dots;
};

}  // namespace auxfast
