// The Krylov solvers' vector work for ctypes.
#include "krylov/krylov.h"

#include "wrapper.hpp"

AUXFAST_CPU_KERNELS(KrylovKernels, krylov)
AUXFAST_CUDA_KERNELS(KrylovCudaKernels, krylov)

using namespace auxfast;

// out and the terms: (rows, n); coefficients: (1 + num_terms, rows); squares: (rows,).
extern "C" const char* linear_combination(int64_t is_double, int64_t rows, int64_t n, void* out, int64_t num_terms,
                                          void* const* terms, const double* coefficients, double* squares) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    LinearCombination<T> work{static_cast<T*>(out), {}, int(num_terms), coefficients, rows, n, squares, nullptr};
    for (int64_t i = 0; i < num_terms; ++i) set_pointer(work.terms[i], terms[i]);
    return run(krylov_cpu<T>().linear_combination, krylov_cuda<T>().linear_combination, work);
  });
}

// a, b: (rows, n); dots: (rows,).
extern "C" const char* row_dots(int64_t is_double, int64_t rows, int64_t n, const void* a, const void* b,
                                double* dots) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    RowDots<T> work{static_cast<const T*>(a), static_cast<const T*>(b), rows, n, dots, nullptr};
    return run(krylov_cpu<T>().row_dots, krylov_cuda<T>().row_dots, work);
  });
}

// x, best, r, p, z, product: (rows, n); numbers: (kNumbers, rows).
extern "C" const char* conjugate_gradient_step(int64_t is_double, int64_t rows, int64_t n, void* x, void* best, void* r,
                                               void* p, const void* z, const void* product, double* numbers,
                                               int64_t part) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    ConjugateGradientStep<T> work{};
    set_pointer(work.x, x);
    set_pointer(work.best, best);
    set_pointer(work.r, r);
    set_pointer(work.p, p);
    set_pointer(work.z, z == nullptr ? r : z);
    set_pointer(work.product, product);
    work.numbers = numbers;
    work.part = Part(part);
    work.rows = rows;
    work.n = n;
    return run(krylov_cpu<T>().conjugate_gradient_step, krylov_cuda<T>().conjugate_gradient_step, work);
  });
}

// x, w, w_old: (rows, n) double; v, u, u_old, r, z, product: (rows, n); numbers: (kNumbers, rows).
extern "C" const char* minres_step(int64_t is_double, int64_t rows, int64_t n, double* x, const double* w,
                                   double* w_old, void* v, const void* u, const void* u_old, void* r, const void* z,
                                   void* product, double* numbers, int64_t part) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    MinresStep<T> work{};
    work.x = x;
    work.w = w;
    work.w_old = w_old;
    set_pointer(work.v, v);
    set_pointer(work.u, u);
    set_pointer(work.u_old, u_old);
    set_pointer(work.r, r);
    set_pointer(work.z, z == nullptr ? product : z);
    set_pointer(work.product, product);
    work.numbers = numbers;
    work.part = Part(part);
    work.rows = rows;
    work.n = n;
    return run(krylov_cpu<T>().minres_step, krylov_cuda<T>().minres_step, work);
  });
}
