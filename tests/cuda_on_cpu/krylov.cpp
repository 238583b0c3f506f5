// The Krylov solvers' vector work for ctypes.
#include "krylov/krylov.h"

#include "wrapper.hpp"

AUXFAST_CUDA_KERNELS(KrylovCudaKernels, krylov)

using namespace auxfast;

// out and the terms: (rows, n); coefficients: (1 + num_terms, rows); squares: (rows,).
extern "C" const char* linear_combination(int64_t is_double, int64_t rows, int64_t n, void* out, int64_t num_terms,
                                          void* const* terms, const double* coefficients, double* squares) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    LinearCombination<T> work{static_cast<T*>(out), {}, int(num_terms), coefficients, rows, n, squares, nullptr};
    for (int64_t i = 0; i < num_terms; ++i) set_pointer(work.terms[i], terms[i]);
    return run(krylov_cuda<T>().linear_combination, work);
  });
}

// a, b: (rows, n); dots: (rows,).
extern "C" const char* row_dots(int64_t is_double, int64_t rows, int64_t n, const void* a, const void* b,
                                double* dots) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    RowDots<T> work{static_cast<const T*>(a), static_cast<const T*>(b), rows, n, dots, nullptr};
    return run(krylov_cuda<T>().row_dots, work);
  });
}
