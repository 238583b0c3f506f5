// One step of the Neumann series on one element, or on a SIMD vector of elements.
//
// clang-format off
// Where it converges, (I + M + M^2 + ...) b with M = I - a H is (a H)^-1 b. With v_0 = p_0 = b,
//     v_{j+1} = M v_j = v_j - a H v_j         p_{j+1} = p_j + v_{j+1}         x_j = a p_j
// By induction v_{j+1} = b - H x_j: v_1 = b - a H b = b - H x_0, and
//     v_{j+1} = v_j - a H v_j = b - H x_{j-1} - H a v_j = b - H x_j,   as x_j = x_{j-1} + a v_j.
// So the new v is the residual of the solution that p held before this step, and its norm certifies that solution.
//
// A series that stops by itself must end with the sum whose residual is the smallest one. If v_{j+1} is the first whose
// norm grew, that is p_{j-1}, with the residual v_j. So the guarded step lets p lag: it adds the term before v while it
// makes the next one in its place, p_{j-2} + v_{j-1} = p_{j-1} beside v_{j+1}, and every later step leaves all as it is.
// clang-format on
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "neumann/neumann.h"

namespace auxfast::AUXFAST_ISA {

template <class V, class T>
AUXFAST_HD void neumann_element(V& v, V hv, V& p, T step_size) {
  v = v - step_size * hv;
  p = p + v;
}

template <class V, class T>
AUXFAST_HD void guarded_element(V v, V& v_before, V hv, V& p, T step_size) {
  p = p + v_before;
  v_before = v - step_size * hv;
}

// A squared norm must rise by this factor to count as growing: less may be rounding.
constexpr double kGrowth = 1.002;

// Goes on with the numbers of a series that has not grown, by the squared norms of its new v and of the product.
AUXFAST_HD void note_step(double* numbers, double square, double of_product) {
  const double smallest = numbers[kSmallestSquare];
  const bool is_finite = square - square == 0;
  numbers[kSquareBefore] = numbers[kSquare];
  numbers[kSquare] = square;
  numbers[kSmallestSquare] = fmin(square, smallest);  // the one that is not a NaN
  numbers[kSquareOfProduct] = of_product;
  numbers[kGrew] = is_finite && square <= kGrowth * smallest ? 0 : 1;
  numbers[kSteps] += 1;
}

}  // namespace auxfast::AUXFAST_ISA
