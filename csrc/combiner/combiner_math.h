// The combiner's formulas for one sample, or for a pack of samples: V is a CUDA thread's number or a pack of SIMD
// vectors. Arrays over hidden units are anything with operator[]: packs side by side on the CPU, strided on the GPU.
//
// clang-format off
// First order. Go backwards from g = w . h_L, with e_i = d g / d z_i, which the code calls delta:
//   e_L     = s'(z_L) w
//   e_{i-1} = s'(z_{i-1}) W_i^T e_i
//   d g / d l = W_1^T e_1
//
// Second order, for a tangent t of the losses. F = <d g / d l, t> is the derivative of g along t, so carry the tangent
// beside the value,
//   hd_0 = t,   zd_i = W_i hd_{i-1},   hd_i = s'(z_i) zd_i,   F = w . hd_L,
// and reverse through both. The tangent's part is the first-order recursion, adj(zd_i) = e_i:
//   adj(hd_L) = w,   adj(zd_i) = s' adj(hd_i),   adj(hd_{i-1}) = W_i^T adj(zd_i)
// The value's part begins with adj(h_L) = 0; the code calls adj(z_i) kappa:
//   kappa_i      = s' adj(h_i) + s'' zd_i adj(hd_i) = s' adj(h_i) + (s''/s') zd_i e_i
//   adj(h_{i-1}) = W_i^T kappa_i,   which for i = 1 is d F / d l
// The derivatives in phi follow:
//   d F / d W_i = kappa_i h_{i-1}^T + e_i hd_{i-1}^T,   d F / d b_i = kappa_i,   d F / d w = hd_L
// The gradient c that reaches the sample multiplies zd_1. Everything after it is linear in zd_1 but e, and e only meets
// quantities that carry c already, except in e_1 t^T of d F / d W_1.
// clang-format on
#pragma once

#include "combiner/combiner.h"
#include "common/activations.h"
#include "common/panels.h"

namespace auxfast::AUXFAST_ISA {

// result(row, sum_k matrix[row, k] in[k] + bias[row]) for kRows rows from `first_row` on; the sums stay in registers.
template <int kRows, class V, class T, class In, class Result>
AUXFAST_HD void matvec_panel(int first_row, int count, const T* matrix, int64_t row_stride, int64_t column_stride,
                             const T* bias, const In& in, const Result& result) {
  V sum[kRows];
  AUXFAST_UNROLL
  for (int r = 0; r < kRows; ++r) sum[r] = bias ? V{} + bias[first_row + r] : V{};
  const T* entry = matrix + first_row * row_stride;
  for (int k = 0; k < count; ++k, entry += column_stride) {
    const V x = in[k];
    AUXFAST_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] += entry[r * row_stride] * x;
  }
  AUXFAST_UNROLL
  for (int r = 0; r < kRows; ++r) result(first_row + r, sum[r]);
}

// matvec_panel for all rows. With the strides exchanged it multiplies by the transpose.
template <class V, class T, class In, class Result>
AUXFAST_HD void matvec(int rows, int count, const T* matrix, int64_t row_stride, int64_t column_stride, const T* bias,
                       const In& in, const Result& result) {
  constexpr int kMost = std::is_arithmetic_v<V> ? 4 : 6;  // a GPU has no use for more code
  in_panels<kMost>(rows, [&](auto height, int first) AUXFAST_INLINE {
    matvec_panel<decltype(height)::value, V>(first, count, matrix, row_stride, column_stride, bias, in, result);
  });
}

// An array of units that begins at layer i's first.
template <class Units>
struct Shifted {
  Units units;
  int first;
  AUXFAST_HD decltype(auto) operator[](int unit) const { return units[first + unit]; }
};

template <class Act, class V, class T, class Units>
struct CombinerMath {
  const CombinerParams<T>& net;

  AUXFAST_HD const T* weight(int layer) const { return net.phi + net.weight[layer]; }
  AUXFAST_HD const T* bias(int layer) const { return net.bias[layer] < 0 ? nullptr : net.phi + net.bias[layer]; }
  AUXFAST_HD Shifted<Units> layer_of(Units units, int layer) const { return {units, net.first_unit[layer]}; }

  // W_i times (the layer below of) `in`, and W_i^T times (layer i of) `in`; layer i > 0.
  template <class Result>
  AUXFAST_HD void up(int layer, Units in, const T* bias, const Result& result) const {
    const int inputs = net.width[layer - 1];
    matvec<V>(net.width[layer], inputs, weight(layer), inputs, 1, bias, layer_of(in, layer - 1), result);
  }
  template <class Result>
  AUXFAST_HD void down(int layer, Units in, const Result& result) const {
    const int inputs = net.width[layer - 1];
    matvec<V>(inputs, net.width[layer], weight(layer), 1, inputs, static_cast<const T*>(nullptr), layer_of(in, layer),
              result);
  }

  // Fills the activation's state (activations.h) and the value h of every unit; both out, (units). first_layer(result)
  // calls result(unit, z) for the units of layer 0.
  template <class FirstLayer>
  AUXFAST_HD void forward(const FirstLayer& first_layer, Units state, Units value) const {
    for (int layer = 0; layer < net.depth; ++layer) {
      const int first = net.first_unit[layer];
      const auto activate = [&](int unit, V z) AUXFAST_INLINE {
        V h, s;
        Act::apply(z, h, s);
        value[first + unit] = h;
        state[first + unit] = s;
      };
      if (layer == 0)
        first_layer(activate);
      else
        up(layer, value, bias(layer), activate);
    }
  }

  // g without the main loss, from the last layer's values.
  AUXFAST_HD V output(Units value) const {
    const int last = net.depth - 1;
    V sum{};
    for (int unit = 0; unit < net.width[last]; ++unit)
      sum += weight(net.depth)[unit] * value[net.first_unit[last] + unit];
    return sum;
  }

  // Fills delta = d g / d z of every unit, from state; (units).
  AUXFAST_HD void backward(Units state, Units delta) const {
    const int last = net.depth - 1;
    for (int unit = 0; unit < net.width[last]; ++unit) {
      const int at = net.first_unit[last] + unit;
      delta[at] = weight(net.depth)[unit] * Act::slope(V(state[at]));
    }
    for (int layer = last; layer > 0; --layer) {
      const int first = net.first_unit[layer - 1];
      down(layer, delta,
           [&](int unit, V sum) AUXFAST_INLINE { delta[first + unit] = Act::slope(V(state[first + unit])) * sum; });
    }
  }

  // Fills hd and kappa of every unit, from state and delta; all (units). first_layer(result) calls result(unit, c zd)
  // for the units of layer 0.
  template <class FirstLayer>
  AUXFAST_HD void second_order(const FirstLayer& first_layer, Units state, Units delta, Units hd, Units kappa) const {
    for (int layer = 0; layer < net.depth; ++layer) {
      const int first = net.first_unit[layer];
      const auto activate = [&](int unit, V zd) AUXFAST_INLINE {
        const int at = first + unit;
        const V s = state[at];
        hd[at] = Act::slope(s) * zd;
        kappa[at] = Act::relative_curvature(s) * delta[at] * zd;
      };
      if (layer == 0)
        first_layer(activate);
      else
        up(layer, hd, static_cast<const T*>(nullptr), activate);
    }
    for (int layer = net.depth - 1; layer > 0; --layer) {
      const int first = net.first_unit[layer - 1];
      down(layer, kappa, [&](int unit, V sum) AUXFAST_INLINE {
        kappa[first + unit] = Act::slope(V(state[first + unit])) * sum + kappa[first + unit];
      });
    }
  }
};

}  // namespace auxfast::AUXFAST_ISA
