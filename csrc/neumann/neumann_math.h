// One step of the Neumann series on one element, or on a SIMD vector of elements.
//
// clang-format off
// Where it converges, (I + M + M^2 + ...) b with M = I - a H is (a H)^-1 b. With v_0 = p_0 = b,
//     v_{j+1} = M v_j = v_j - a H v_j         p_{j+1} = p_j + v_{j+1}         x_j = a p_j
// By induction v_{j+1} = b - H x_j: v_1 = b - a H b = b - H x_0, and
//     v_{j+1} = v_j - a H v_j = b - H x_{j-1} - H a v_j = b - H x_j,   as x_j = x_{j-1} + a v_j.
// So the new v is the residual of the solution that p held before this step, and its norm certifies that solution.
// clang-format on
#pragma once

#include "common/host_device.h"

namespace auxfast::AUXFAST_ISA {

template <class V, class T>
AUXFAST_HD void neumann_element(V& v, V hv, V& p, T step_size) {
  v = v - step_size * hv;
  p = p + v;
}

}  // namespace auxfast::AUXFAST_ISA
