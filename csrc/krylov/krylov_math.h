// One operand's share of one element, or of a SIMD vector of elements, of a linear combination.
//
// clang-format off
// Conjugate gradients are three linear combinations, with alpha = r.r / p.Hp and beta = r'.r' / r.r. The second of them
// also gives r'.r':
//   x <- x + alpha p,   r <- r - alpha H p,   p <- beta p + r
// The Lanczos recurrence of MINRES, and that of its directions, have three operands:
//   v'' = H v' - a v' - b v,   w'' = (v - d w' - e w) / g
// clang-format on
#pragma once

#include "common/host_device.h"
#include "krylov/krylov.h"

namespace auxfast::AUXFAST_ISA {

// Row `row` of operand `index`: out is operand 0, the terms follow.
template <class T>
AUXFAST_HD const T* operand_row(const LinearCombination<T>& work, int index, int64_t row) {
  return (index == 0 ? work.out : work.terms[index - 1]) + row * work.n;
}

// The factor of that row. It is 0 exactly where the operand must not be touched: 0 * NaN would be NaN.
template <class T>
AUXFAST_HD T row_coefficient(const LinearCombination<T>& work, int index, int64_t row) {
  return T(work.coefficients[index * work.rows + row]);
}

// Called with a sum of 0 first, then in the order of the operands.
template <class V, class T>
AUXFAST_HD void add_operand(V& sum, T coefficient, V operand) {
  sum = sum + coefficient * operand;
}

}  // namespace auxfast::AUXFAST_ISA
