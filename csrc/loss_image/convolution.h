// The 3x3 convolution of rows that are held as two phases, even columns and odd columns: element x of channel c, phase
// p is column 2 x + p, at row[(2 c + p) * length + x]. The element before a phase's first is zero, as is the one
// behind.
#pragma once

#include "common/panels.h"
#include "common/simd.h"
#include "loss_image/loss_image.h"
#include "loss_image/rows.h"

namespace auxfast::AUXFAST_ISA {

// Output channels whose sums (2 rows x 2 phases of them) stay in registers: of 32 or 16, with two inputs and a weight.
constexpr int kConvolutionPanel = kVectorBytes == 64 ? 4 : kVectorBytes == 32 ? 3 : 2;

// Weights in the order in which convolve() reads them: by panel of output channels, and in a panel by input channel,
// tap and output.
template <class T>
struct PackedWeights {
  int inputs, outputs;
  const T* weights;

  // The panel that begins with output channel `first`.
  AUXFAST_HD const T* panel(int first) const { return weights + int64_t(first) * inputs * kTaps; }
};

// Calls at(packed index, output, input, tap) for every weight.
template <class Visit>
void for_each_weight(int inputs, int outputs, const Visit& visit) {
  int64_t at = 0;
  in_panels<kConvolutionPanel>(outputs, [&](auto height, int first) {
    for (int input = 0; input < inputs; ++input)
      for (int tap = 0; tap < kTaps; ++tap)
        for (int o = 0; o < decltype(height)::value; ++o) visit(at++, first + o, input, tap);
  });
}

// matrix: in, W (outputs, inputs, 3, 3); packed: out, as many numbers.
template <class T>
PackedWeights<T> pack_weights(const T* matrix, int inputs, int outputs, T* packed) {
  for_each_weight(inputs, outputs, [&](int64_t at, int output, int input, int tap) {
    packed[at] = matrix[(int64_t(output) * inputs + input) * kTaps + tap];
  });
  return {inputs, outputs, packed};
}

// Packs the transposed convolution, from W's outputs back to its inputs: kernels transposed and flipped, times `scale`.
template <class T>
PackedWeights<T> pack_transposed(const T* matrix, int inputs, int outputs, T scale, T* packed) {
  for_each_weight(outputs, inputs, [&](int64_t at, int input, int output, int tap) {
    packed[at] = scale * matrix[(int64_t(output) * inputs + input) * kTaps + kTaps - 1 - tap];
  });
  return {outputs, inputs, packed};
}

// The lanes whose column pair has a left, or right, neighbour in the same image, (vectors) each, for images that lie
// side by side with no zeros between them; else nullptr.
template <class T>
struct Neighbours {
  Mask<T>*left, *right;
};

// Convolves two rows of outputs at both columns of vector v of column pairs, from four rows of inputs:
// sums[o][row][phase], out, for a panel of kOut output channels.
template <class T, int kOut, bool kMasked>
AUXFAST_HD void convolve_panel(const T* const* rows, int64_t v, int64_t length, const Neighbours<T>& neighbours,
                               int inputs, const T* weights, const T* bias, Vec<T> (*sums)[2][2]) {
  Vec<T> sum[2][2][kOut];
#pragma GCC unroll 4
  for (int o = 0; o < kOut; ++o) {
    const Vec<T> start = bias ? broadcast(bias[o]) : Vec<T>{};
    sum[0][0][o] = sum[0][1][o] = sum[1][0][o] = sum[1][1][o] = start;
  }
  const int64_t x = v * kLanes<T>;
  const T* row[4] = {rows[0] + x, rows[1] + x, rows[2] + x, rows[3] + x};
  for (int input = 0; input < inputs; ++input, weights += kTaps * kOut) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      // Columns 2 x - 1 to 2 x + 2: the taps of both phases. Loaded when needed, for want of registers.
      const T* at[4] = {row[k] + length - 1, row[k], row[k] + length, row[k] + 1};
      const T* taps = opaque(weights);
      Vec<T> left = in_register(kMasked ? load_masked(at[0], neighbours.left[v]) : load(at[0]));
#pragma GCC unroll 3
      for (int dx = 0; dx < 3; ++dx) {
        const bool beyond = kMasked && dx == 2;
        const Vec<T> right = in_register(beyond ? load_masked(at[3], neighbours.right[v]) : load(at[dx + 1]));
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q) {
          const int dy = k - q;
          if (dy < 0 || dy > 2) continue;
#pragma GCC unroll 4
          for (int o = 0; o < kOut; ++o) {
            const Vec<T> weight = in_register(broadcast(taps[(3 * dy + dx) * kOut + o]));
            sum[q][0][o] += weight * left;
            sum[q][1][o] += weight * right;
          }
        }
        left = right;
      }
      row[k] += 2 * length;
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[o][j / 2][j % 2] = sum[j / 2][j % 2][o];
}

// convolve_panel for all output channels. bias: (outputs) or nullptr; sums: out, (outputs, 2 rows, 2 phases).
template <class T>
AUXFAST_HD void convolve(const T* const* rows, int64_t v, int64_t length, const Neighbours<T>& neighbours,
                         const PackedWeights<T>& packed, const T* bias, Vec<T> (*sums)[2][2]) {
  const auto all_panels = [&](auto masked) AUXFAST_INLINE {
    in_panels<kConvolutionPanel>(packed.outputs, [&](auto height, int first) AUXFAST_INLINE {
      convolve_panel<T, decltype(height)::value, decltype(masked)::value>(
          rows, v, length, neighbours, packed.inputs, packed.panel(first), bias ? bias + first : nullptr, sums + first);
    });
  };
  if (neighbours.left)
    all_panels(std::true_type{});
  else
    all_panels(std::false_type{});
}

// sums[dx][o] += sum over the row's columns of outer[o] at the column times inner at column + dx - 1.
template <class T, int kOut>
AUXFAST_HD void correlate(const T* inner, const T* outer, int64_t length, int vectors, const Neighbours<T>& neighbours,
                          Vec<T> (&sums)[3][kOut]) {
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t x = v * kLanes<T>;
    Vec<T> in[4] = {load(inner + length - 1 + x), in_register(load(inner + x)), in_register(load(inner + length + x)),
                    load(inner + 1 + x)};
    if (neighbours.left) {
      in[0] = masked<T>(in[0], neighbours.left[v]);
      in[3] = masked<T>(in[3], neighbours.right[v]);
    }
    in[0] = in_register(in[0]);
    in[3] = in_register(in[3]);
#pragma GCC unroll 2
    for (int phase = 0; phase < 2; ++phase)
#pragma GCC unroll 4
      for (int o = 0; o < kOut; ++o) {
        const Vec<T> out = in_register(load(outer + (2 * o + phase) * length + x));
#pragma GCC unroll 3
        for (int dx = 0; dx < 3; ++dx) sums[dx][o] += out * in[phase + dx];
      }
  }
}

}  // namespace auxfast::AUXFAST_ISA
