// What a convolution, its activation and its pool work on: how wide the rows of a tile are, and which rows are kept.
#pragma once

#include "loss_image/convolution.h"
#include "loss_image/rows.h"

namespace auxfast::AUXFAST_ISA {

// Hands out memory, one array after the other; from null on it measures how much that will be.
struct Arena {
  uintptr_t next;

  template <class E>
  E* take(int64_t count) {
    const uintptr_t begin = next;
    next += (uintptr_t(count) * sizeof(E) + 63) / 64 * 64;
    return reinterpret_cast<E*>(begin);
  }
};

// Layer i makes z_{i+1} and h_{i+1} from h_i. It works row by row of h_{i+1}: its row u takes rows 2 u and 2 u + 1 of
// z, and these take rows 2 u - 1 to 2 u + 2 of h_i. A window is the 2 x 2 pixels of z that become one of h_{i+1}.
template <class T>
struct Layer {
  Layer *below, *above;
  int rows;       // of h_{i+1}
  int vectors;    // that a phase of a row has
  int pitch;      // columns of h_{i+1} from one image of the tile to the next
  int width;      // columns of h_{i+1} that an image has
  RowRing<T> in;  // h_i and, as second stream, hd_i
  RowRing<T> z;   // state and zd; later, in their place, e alone or kappa and e
  T* pooled;      // (streams, outputs, pooled_length): a row of h_{i+1} and hd_{i+1}, in plain order
  int64_t pooled_length;
  Mask<T>* columns;          // (vectors): columns of h_{i+1} that are an image's
  Neighbours<T> neighbours;  // for a tile without columns of zeros between images
  Mask<T> kept[2][2];        // (row, phase): all bits where the pool takes that pixel of a window
  T pool_scale;              // 1 / (pixels of a window)
  PackedWeights<T> weights, transposed;
  const T* bias;
  int64_t weight_sums, bias_sums;  // where their sums for phi are
  int owned_begin, owned_end;      // rows that belong to the band; those beyond are computed for their neighbours
  int forward_done, adjoint_done;  // rows before these are made

  bool owns(int u) const { return u >= owned_begin && u < owned_end; }
};

// The forward pass must be so many rows ahead of the oldest row whose adjoint is being made. Rows 2 m - 1 and 2 m of
// a layer's adjoint need the next layer's up to row m; that layer is ahead by its own lead, and row n of it needs
// rows up to 2 n + 2 from here.
constexpr int lead_of_layer(int layers_above) {
  return layers_above == 0 ? 0 : 2 * lead_of_layer(layers_above - 1) + 3;
}

// The rows of a ring, with pads before and behind every phase, which are zero.
template <class T>
RowRing<T> make_ring(Arena& arena, int height, int slots, int streams, int channels, int vectors) {
  const int64_t length = (vectors + 1) * kLanes<T>, stream_stride = 2 * channels * length;
  T* memory = arena.take<T>(slots * streams * stream_stride + kLanes<T>);
  return {height, slots, length, stream_stride, streams * stream_stride, memory + kLanes<T>, nullptr};
}

// Sizes and memory of layer i in tiles of `images` images of `pitch` columns each.
template <class T>
Layer<T> make_layer(Arena& arena, const LossImageParams<T>& net, int i, int images, int pitch, int streams,
                    bool backward) {
  Layer<T> layer{};
  layer.rows = net.height[i + 1];
  layer.width = net.width[i + 1];
  layer.pitch = pitch >> (i + 1);
  layer.vectors = (images * layer.pitch + kLanes<T> - 1) / kLanes<T>;
  const int lead = backward ? lead_of_layer(net.depth - 1 - i) : 0;
  layer.in = make_ring<T>(arena, net.height[i], 2 * lead + 4, streams, net.channels[i], layer.vectors);
  if (backward)
    layer.z = make_ring<T>(arena, 2 * layer.rows, 2 * (lead + 2), streams, net.channels[i + 1], layer.vectors);
  layer.pooled_length = (layer.vectors + 1) / 2 * 2 * kLanes<T>;
  layer.pooled = arena.take<T>(streams * net.channels[i + 1] * layer.pooled_length);
  layer.columns = arena.take<Mask<T>>(layer.vectors);
  if (images > 1 && pitch == net.width[0])  // else all layers have columns of zeros there
    layer.neighbours = {arena.take<Mask<T>>(layer.vectors), arena.take<Mask<T>>(layer.vectors)};
  const int tall = pool_extent(net.height[i]), wide = pool_extent(net.width[i]);
  for (int row = 0; row < 2; ++row)
    for (int phase = 0; phase < 2; ++phase) layer.kept[row][phase] = Mask<T>{} - (row < tall && phase < wide);
  layer.pool_scale = T(1) / T(tall * wide);
  layer.bias = net.phi + net.bias[i];
  layer.weight_sums = net.weight[i];
  layer.bias_sums = net.bias[i];
  return layer;
}

// Sums for phi in the kernels' order: they are made lane by lane for some rows, then in double.
template <class T>
struct PhiSums {
  Vec<T>* lanes;   // (vectors(count))
  double* totals;  // (count), or nullptr
  int64_t count;
  int pending;

  static int64_t vectors(int64_t count) { return count + kLanes<T>; }

  // The lanes are emptied after so many rows that they lose no digits to large sums.
  void row_done() {
    constexpr int kMostPending = 32;
    if (++pending == kMostPending) flush();
  }

  void flush() {
    pending = 0;
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      T sums[kLanes<T>];
      store<T>(sums, sum_each<T>(lanes + i));
      for (int64_t j = 0; j < kLanes<T> && i + j < count; ++j) totals[i + j] += double(sums[j]);
    }
    std::memset(static_cast<void*>(lanes), 0, size_t(vectors(count)) * sizeof(Vec<T>));
  }

  // Adds what row u of a layer leaves for its weights: the outer products of what is in its two rings, over pixels.
  void add_weights(const Layer<T>& layer, int u, int streams) {
    in_panels<kConvolutionPanel>(layer.weights.outputs, [&](auto height, int first) {
      constexpr int kOut = decltype(height)::value;
      Vec<T>* to = lanes + layer.weight_sums + int64_t(first) * layer.weights.inputs * kTaps;
      for (int input = 0; input < layer.weights.inputs; ++input)
        for (int dy = 0; dy < 3; ++dy, to += 3 * kOut) {
          Vec<T> sums[3][kOut] = {};
          for (int q = 0; q < 2; ++q) {
            const int y = 2 * u + q + dy - 1;
            if (y < 0 || y >= layer.in.height) continue;
            for (int s = 0; s < streams; ++s)
              correlate(layer.in.row(y, s) + 2 * input * layer.in.length,
                        layer.z.row(2 * u + q, s) + 2 * first * layer.z.length, layer.z.length, layer.vectors,
                        layer.neighbours, sums);
          }
#pragma GCC unroll 12
          for (int i = 0; i < 3 * kOut; ++i) to[i] += sums[i / kOut][i % kOut];
        }
    });
  }
};

}  // namespace auxfast::AUXFAST_ISA
