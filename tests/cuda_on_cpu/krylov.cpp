// The Krylov solvers' vector work for ctypes.
#include "krylov/krylov.h"

#include <algorithm>
#include <limits>
#include <vector>

using namespace auxfast;

static std::vector<double> workspace_for(int64_t rows, int64_t n) {
  return std::vector<double>(size_t(cuda::krylov_workspace(rows, n)), std::numeric_limits<double>::quiet_NaN());
}

// out and the terms: (rows, n); coefficients: (1 + num_terms, rows); squares: (rows,).
extern "C" const char* linear_combination(int64_t is_double, int64_t rows, int64_t n, void* out, int64_t num_terms,
                                          void* const* terms, const double* coefficients, double* squares) {
  LinearCombination work{out, {}, int(num_terms), coefficients, rows, n};
  std::copy_n(terms, num_terms, work.terms);
  std::vector<double> workspace = workspace_for(rows, n);
  return (is_double ? cuda::linear_combination_double : cuda::linear_combination_float)(work, workspace.data(), squares,
                                                                                        nullptr);
}

// a, b: (rows, n); dots: (rows,).
extern "C" const char* row_dots(int64_t is_double, int64_t rows, int64_t n, const void* a, const void* b,
                                double* dots) {
  std::vector<double> workspace = workspace_for(rows, n);
  return (is_double ? cuda::row_dots_double : cuda::row_dots_float)({a, b, rows, n}, workspace.data(), dots, nullptr);
}
