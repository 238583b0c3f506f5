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

// What a step of conjugate gradients or MINRES knows of each row, float64: a number is a row of the matrix `numbers`,
// (kNumbers, rows). auxfast/ops/krylov.py has the same lists, and says what each number is.
enum SharedNumber { kStatus, kNegative, kAsymmetry, kNoise, kLargest, kTolerance, kSquare, kSteps, kMoves, kSharedEnd };
enum ConjugateGradientNumber {
  kRz = kSharedEnd,
  kPp,
  kPpBefore,
  kAlpha,
  kCgBeta,
  kBetaByAlpha,
  kBestSquare,
  kLeaves,
  kConjugateGradientEnd
};
enum MinresNumber {
  kAlfa = kSharedEnd,
  kBeta,
  kBetaRatio,
  kPhibar,
  kPhibarBefore,
  kC,
  kS,
  kDbar,
  kEpsilon,
  kEpsilonBefore,
  kDelta,
  kGamma,
  kPhi,
  kMinresEnd
};
constexpr int kLanczosSteps = 32;  // of which the tridiagonal matrix is kept: diagonal and off-diagonal in turn
constexpr int kLanczos = kMinresEnd, kNumbers = kLanczos + 2 * kLanczosSteps;
static_assert(kConjugateGradientEnd <= kLanczos, "the Lanczos matrix stands behind the numbers of either method");

enum Status { kRunning, kReached, kSingular, kCurved, kBroken };  // of a row

// A preconditioner is applied in the middle of a step, which is then two calls.
enum Part { kWhole, kBeforePreconditioner, kAfterPreconditioner };

template <class T>
struct ConjugateGradientStep {
  using Type = T;
  T *x, *best, *r, *p;  // in and out: (rows, n)
  const T* z;           // in: (rows, n), the preconditioned r of the step before, or the new one; r itself without
  const T* product;     // in: (rows, n)
  double* numbers;      // in and out: (kNumbers, rows)
  Part part;
  int64_t rows, n;
  void* workspace;  // overwritten; CUDA only
};

template <class T>
struct MinresStep {
  using Type = T;
  double *x, *w_old;   // in and out: (rows, n); w_old becomes the next w
  const double* w;     // in: (rows, n)
  T *v, *r, *product;  // in and out: (rows, n); product becomes the next u
  const T *u, *u_old;  // in: (rows, n)
  const T* z;          // in: (rows, n), the next u preconditioned; product itself without
  double* numbers;     // in and out: (kNumbers, rows)
  Part part;
  int64_t rows, n;
  void* workspace;  // overwritten; CUDA only
};

template <class T>
struct KrylovKernels {
  CpuKernel<LinearCombination<T>> linear_combination;
  CpuKernel<RowDots<T>> row_dots;
  CpuKernel<ConjugateGradientStep<T>> conjugate_gradient_step;
  CpuKernel<MinresStep<T>> minres_step;
};
template <class T>
struct KrylovCudaKernels {
  CudaKernel<LinearCombination<T>> linear_combination;
  CudaKernel<RowDots<T>> row_dots;
  CudaKernel<ConjugateGradientStep<T>> conjugate_gradient_step;
  CudaKernel<MinresStep<T>> minres_step;
};

}  // namespace auxfast
