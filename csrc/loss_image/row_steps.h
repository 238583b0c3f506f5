// The steps of one row of a layer: its convolution, activation and pool, and the way back.
#pragma once

#include "loss_image/layer.h"
#include "loss_image/loss_image_math.h"

namespace auxfast::AUXFAST_ISA {

// What a pass is to leave behind, and the tangent of the second order; nullptr where there is none.
template <class T>
struct Wanted {
  const T* tangent;    // in: (batch, num_losses, H, W)
  double* value_sums;  // out: (bands, batch)
  T* grad_losses;      // out: (batch, num_losses, H, W)
  double* phi_sums;    // in and out: (num_parameters), added to

  bool backward() const { return grad_losses || phi_sums; }
};

// kStreams: 1 for the value and its gradient, 2 for the second order, which carries a tangent beside it.
template <class T, class Act, int kStreams>
struct RowSteps {
  using V = Vec<T>;
  using Math = PixelMath<Act, V>;
  using Window = V[2][2];            // (row, phase) of one channel
  using RowPair = T* [2][kStreams];  // rows 2 u and 2 u + 1 in z's ring
  static constexpr int kN = kLanes<T>;

  const LossImageParams<T>& net;
  const Wanted<T> wanted;
  PhiSums<T> sums;
  Window* window[kStreams];  // (channels): z and zd of one vector of column pairs
  T* spread;                 // see spread_row()
  V* top;                    // (vectors of the last layer): what reaches act(z), but for w
  V* value_lanes;            // (vectors of the last layer): what a row adds to the value, before the mean
  V* row_sums[2];            // (channels of the last layer): what a row adds to its biases, and to the output weights

  // longest: elements of the longest row with all its channels.
  void lay_out(Arena& arena, int64_t longest, int most_channels, int last_vectors) {
    const int64_t parameters = wanted.phi_sums ? net.num_parameters : 0;
    sums = {arena.take<V>(PhiSums<T>::vectors(parameters)), wanted.phi_sums, parameters, 0};
    for (Window*& stream : window) stream = arena.take<Window>(most_channels);
    spread = arena.take<T>(2 * kStreams * longest);
    top = arena.take<V>(last_vectors);
    value_lanes = arena.take<V>(last_vectors);
    for (V*& row : row_sums) row = arena.take<V>(net.channels[net.depth]);
  }

  // Makes rows 2 u and 2 u + 1 of z, and row u of the layer above or, in the last one, what it leaves for the value.
  void forward(const Layer<T>& layer, int u) {
    const T* rows[kStreams][4];
    for (int s = 0; s < kStreams; ++s)
      for (int k = 0; k < 4; ++k) rows[s][k] = layer.in.row_or_zeros(2 * u - 1 + k, s);
    RowPair z = {};
    if (wanted.backward()) find_rows(layer, u, z);
    for (int v = 0; v < layer.vectors; ++v) {
      for (int s = 0; s < kStreams; ++s)
        convolve(rows[s], v, layer.in.length, layer.neighbours, layer.weights, s ? nullptr : layer.bias, window[s]);
      if (layer.above)
        activate_and_pool(layer, z, v);
      else
        finish_last_layer(layer, z, v);
    }
    if (!layer.above) return;
    const RowRing<T>& next = layer.above->in;
    for (int s = 0; s < kStreams; ++s)
      for (int c = 0; c < layer.weights.outputs; ++c) {
        T* even = next.row(u, s) + 2 * c * next.length;
        split_columns(pooled_row(layer, s, c), next.length - kN, even, even + next.length);
      }
  }

  // A plain row that transposed_convolution() of `layer` has left: q = 0 or 1 of its two.
  T* spread_row(const Layer<T>& layer, int q, int stream, int channel) const {
    return spread + (int64_t(q * kStreams + stream) * layer.weights.inputs + channel) * (2 * layer.vectors * kN);
  }

  // Makes rows 2 m - 1 and 2 m of what reaches h (times the pool's scale, which is in the weights) and hd, in plain
  // order. in: z's ring, e or kappa and e; out: spread; overwritten: window[0].
  void transposed_convolution(const Layer<T>& layer, int m, int streams) {
    for (int s = 0; s < streams; ++s) {
      const T* rows[4];
      for (int k = 0; k < 4; ++k) rows[k] = layer.z.row_or_zeros(2 * m - 2 + k, s);
      for (int v = 0; v < layer.vectors; ++v) {
        convolve<T>(rows, v, layer.z.length, layer.neighbours, layer.transposed, nullptr, window[0]);
        for (int c = 0; c < layer.weights.inputs; ++c)
          for (int q = 0; q < 2; ++q)
            store_interleaved(spread_row(layer, q, s, c) + 2 * v * kN, window[0][c][q][0], window[0][c][q][1]);
      }
    }
  }

  // Makes e, or kappa and e, of rows 2 u and 2 u + 1 from what reaches row u of h_{i+1}.
  // clang-format off
  //   in          spread      (2, kStreams, channels, columns), as transposed_convolution() of the layer above left it
  //   in -> out   z's ring    state -> e or, in second order, state -> kappa and zd -> e
  //   in and out  sums.lanes  of the layer's biases, if row u belongs to the band
  // clang-format on
  void unpool(const Layer<T>& layer, int u, int q_above) {
    const Layer<T>& above = *layer.above;
    RowPair z;
    find_rows(layer, u, z);
    const bool for_phi = wanted.phi_sums && layer.owns(u);
    for (int c = 0; c < layer.weights.outputs; ++c) {
      V bias_sum{};
      for (int v = 0; v < layer.vectors; ++v) {
        const V gradient = load(spread_row(above, q_above, 0, c) + v * kN);
        const V gradient_zd = load(spread_row(above, q_above, kStreams - 1, c) + v * kN);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const int q = j / 2, phase = j % 2;
          const int64_t at = (2 * c + phase) * layer.z.length + v * kN;
          const Mask<T> mask = layer.columns[v] & layer.kept[q][phase];
          T *first = z[q][0] + at, *second = z[q][kStreams - 1] + at;
          const V state = load(first);
          V adjoint = masked<T>(Math::delta(state, gradient_zd), mask);
          if constexpr (kStreams == 2) {
            const V e = adjoint;
            adjoint = masked<T>(Math::kappa(state, load(second), e, gradient), mask);
            store<T>(second, e);
          }
          store<T>(first, adjoint);
          bias_sum += adjoint;
        }
      }
      if (for_phi) sums.lanes[layer.bias_sums + c] += bias_sum;
    }
  }

 private:
  static void find_rows(const Layer<T>& layer, int u, RowPair& rows) {
    for (int q = 0; q < 2; ++q)
      for (int s = 0; s < kStreams; ++s) rows[q][s] = layer.z.row(2 * u + q, s);
  }

  T* pooled_row(const Layer<T>& layer, int stream, int channel) const {
    return layer.pooled + (int64_t(stream) * layer.weights.outputs + channel) * layer.pooled_length;
  }

  // Applies the activation and the pool to one vector of column pairs.
  // clang-format off
  //   in   window    z and zd
  //   out  pooled    h and hd
  //   out  z's ring  state and zd, for a way back
  // clang-format on
  void activate_and_pool(const Layer<T>& layer, const RowPair& z, int v) {
    for (int c = 0; c < layer.weights.outputs; ++c) {
      V h{}, hd{};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int q = j / 2, phase = j % 2;
        const int64_t at = (2 * c + phase) * layer.z.length + v * kN;
        V value, state;
        Act::apply(window[0][c][q][phase], value, state);
        h += masked<T>(value, layer.kept[q][phase]);
        if (wanted.backward()) store<T>(z[q][0] + at, state);
        if constexpr (kStreams == 2) {
          const V zd = window[1][c][q][phase];
          hd += masked<T>(Math::delta(state, zd), layer.kept[q][phase]);
          store<T>(z[q][1] + at, zd);
        }
      }
      store<T>(pooled_row(layer, 0, c) + v * kN, masked<T>(layer.pool_scale * h, layer.columns[v]));
      if constexpr (kStreams == 2)
        store<T>(pooled_row(layer, 1, c) + v * kN, masked<T>(layer.pool_scale * hd, layer.columns[v]));
    }
  }

  // Applies the last layer's activation, pool and output weights to one vector of column pairs, and goes back to z.
  // clang-format off
  //   in   window, top            z and zd; what reaches act(z), but for w
  //   out  z's ring               e or, in second order, kappa and e, for a way back
  //   out  value_lanes, row_sums  added up over the columns, from v = 0 on
  // clang-format on
  void finish_last_layer(const Layer<T>& layer, const RowPair& z, int v) {
    const T* output = net.phi + net.weight[net.depth];
    V total{};
    for (int c = 0; c < layer.weights.outputs; ++c) {
      V bias_sum{}, output_sum{};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int q = j / 2, phase = j % 2;
        const int64_t at = (2 * c + phase) * layer.z.length + v * kN;
        const Mask<T> mask = layer.columns[v] & layer.kept[q][phase];
        V value, state;
        Act::apply(window[0][c][q][phase], value, state);
        if constexpr (kStreams == 1) {
          output_sum += masked<T>(value, mask);
          if (!wanted.backward()) continue;
          const V e = masked<T>(Math::delta(state, output[c] * top[v]), mask);
          store<T>(z[q][0] + at, e);
          bias_sum += e;
        } else {
          const V zd = window[1][c][q][phase], e = masked<T>(Math::delta(state, output[c] * top[v]), mask);
          const V kappa = masked<T>(Math::kappa(state, zd, e), mask);
          store<T>(z[q][0] + at, kappa);
          store<T>(z[q][1] + at, e);
          output_sum += masked<T>(Math::delta(state, zd), mask);
          bias_sum += kappa;
        }
      }
      total += output[c] * output_sum;
      row_sums[0][c] = (v ? row_sums[0][c] : V{}) + bias_sum;
      row_sums[1][c] = (v ? row_sums[1][c] : V{}) + top[v] * output_sum;
    }
    value_lanes[v] = total;
  }
};

}  // namespace auxfast::AUXFAST_ISA
