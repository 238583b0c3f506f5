// The row pipeline: rows of losses go in, rows of their gradient come out, and of what lies between only the few rows
// that are still needed exist, in rings. Every layer makes its next row when the layer behind it asks for it, so
// nothing is computed twice.
#pragma once

#include "loss_image/row_steps.h"

namespace auxfast::AUXFAST_ISA {

template <class T, class Act, int kStreams>
class Pipeline {
  using V = Vec<T>;
  static constexpr int kN = kLanes<T>;

 public:
  // `packed`: weights and transposed weights of every layer.
  Pipeline(const LossImageParams<T>& params, const PackedWeights<T> (*packed)[2], const Wanted<T>& what,
           const Executor& executor)
      : net(params), wanted(what), images(int(params.tiles.images)), steps{params, what, {}, {}, {}, {}, {}, {}} {
    pitch = int(net.tiles.pitch);
    Arena measure{0};
    lay_out(measure);
    void* memory = executor.scratch(measure.next);
    std::memset(memory, 0, measure.next);
    Arena arena{reinterpret_cast<uintptr_t>(memory)};
    lay_out(arena);
    for (int i = 0; i < net.depth; ++i) {
      layers[i].weights = packed[i][0];
      layers[i].transposed = packed[i][1];
      mark_neighbours(layers[i]);
    }
  }

  void run(int64_t tile) {
    begin_tile(tile);
    Layer<T>& first = layers[0];
    if (!wanted.backward()) return need_forward(last(), last().owned_end);
    if (!wanted.grad_losses) return need_adjoint(first, first.owned_end);
    for (int m = row_begin / 2; m <= row_end / 2; ++m) {
      need_adjoint(first, m < first.rows ? m + 1 : first.rows);
      steps.transposed_convolution(first, m, 1);
      write_gradient(m);
    }
  }

  // Must be called after the last tile.
  void finish() {
    if (wanted.phi_sums) steps.sums.flush();
  }

 private:
  Layer<T>& last() { return layers[net.depth - 1]; }

  void lay_out(Arena& arena) {
    int64_t longest = 0;  // row of all channels
    int32_t most_channels = 0;
    for (int i = 0; i < net.depth; ++i) {
      layers[i] = make_layer(arena, net, i, images, pitch, kStreams, wanted.backward());
      const int32_t channels = net.channels[i] > net.channels[i + 1] ? net.channels[i] : net.channels[i + 1];
      const int64_t row = 2 * channels * layers[i].in.length;
      if (channels > most_channels) most_channels = channels;
      if (row > longest) longest = row;
    }
    for (int i = 1; i < net.depth; ++i) {
      layers[i].below = &layers[i - 1];
      layers[i - 1].above = &layers[i];
    }
    const T* zeros = arena.take<T>(longest + kN) + kN;
    for (Layer<T>& layer : layers) layer.in.zeros = layer.z.zeros = zeros;
    steps.lay_out(arena, longest, most_channels, last().vectors);
  }

  void begin_tile(int64_t tile) {
    const int64_t band = tile % net.tiles.bands;
    const bool last_band = band == net.tiles.bands - 1;
    image_begin = tile / net.tiles.bands * images;
    image_end = image_begin + images < net.batch ? image_begin + images : net.batch;
    row_begin = int(band * net.tiles.band_rows);
    row_end = last_band ? net.height[0] : row_begin + int(net.tiles.band_rows);
    int needed = row_begin / 2 - 1;  // the first row whose adjoint is needed, of layer 0, then of the layers above
    for (int i = 0; i < net.depth; ++i, needed = (needed + 1) / 2 - 1) {
      Layer<T>& layer = layers[i];
      layer.owned_begin = row_begin >> (i + 1);
      layer.owned_end = last_band ? layer.rows : row_end >> (i + 1);
      if (needed < 0) needed = 0;
      layer.adjoint_done = needed;
      layer.forward_done = wanted.backward() ? needed : layer.owned_begin;
      mark_columns(layer);
    }
    for (Layer<T>* layer = &last(); layer->below; layer = layer->below) {
      const int start = 2 * layer->forward_done - 1;
      if (start < layer->below->forward_done) layer->below->forward_done = start > 0 ? start : 0;
    }
    rows_loaded = 2 * layers[0].forward_done - 1 > 0 ? 2 * layers[0].forward_done - 1 : 0;
    set_top();
    if (!wanted.value_sums) return;
    value_sums = wanted.value_sums + band * net.batch;
    for (int64_t b = image_begin; b < image_end; ++b) value_sums[b] = 0;
  }

  // Fills masks, out: (vectors), of a row of `layer` by test(image, column of h_{i+1} in it).
  template <class Test>
  static void mark(Mask<T>* masks, const Layer<T>& layer, const Test& test) {
    using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    auto* lanes = reinterpret_cast<T*>(masks);
    for (int x = 0; x < layer.vectors * kN; ++x) {
      const Lane mark = test(x / layer.pitch, x % layer.pitch) ? -1 : 0;
      std::memcpy(lanes + x, &mark, sizeof mark);
    }
  }

  static void mark_neighbours(const Layer<T>& layer) {
    if (!layer.neighbours.left) return;
    mark(layer.neighbours.left, layer, [&](int, int x) { return x > 0; });
    mark(layer.neighbours.right, layer, [&](int, int x) { return x < layer.pitch - 1; });
  }

  void mark_columns(Layer<T>& layer) const {
    const int count = int(image_end - image_begin);
    mark(layer.columns, layer, [&](int image, int x) { return image < count && x < layer.width; });
  }

  // The gradient that reaches each image.
  T incoming(int64_t b) const { return net.grad ? net.scale * net.grad[b * net.grad_stride] : net.scale; }
  T main_weight(int64_t b) const { return net.main_weights ? net.main_weights[b] : net.main_scale; }

  // Fills what reaches act(z) of the last layer, but for w.
  void set_top() {
    auto* lanes = reinterpret_cast<T*>(steps.top);
    for (int x = 0; x < last().vectors * kN; ++x) {
      const int64_t b = image_begin + x / last().pitch;
      lanes[x] = b < image_end ? net.position_scale * incoming(b) : T(0);
    }
  }

  // ------------------------------------------------------------------------------------------------- who needs what
  // Each of these makes all rows before `end`.

  void need_rows(int end) {
    for (; rows_loaded < end; ++rows_loaded) load_row(rows_loaded);
  }

  void need_forward(Layer<T>& layer, int end) {
    while (layer.forward_done < end) {
      const int u = layer.forward_done;
      const int rows = 2 * u + 3 < layer.in.height ? 2 * u + 3 : layer.in.height;
      if (layer.below)
        need_forward(*layer.below, rows);
      else
        need_rows(rows);
      steps.forward(layer, u);
      if (!layer.above) add_row(layer, u);
      layer.forward_done = u + 1;
      if (!layer.above && wanted.backward()) adjoint_made(layer, u);
    }
  }

  void need_adjoint(Layer<T>& layer, int end) {
    if (!layer.above) return need_forward(layer, end);
    Layer<T>& above = *layer.above;
    while (layer.adjoint_done < end) {
      const int m = (layer.adjoint_done + 1) / 2;  // rows 2 m - 1 and 2 m come together
      need_adjoint(above, m < above.rows ? m + 1 : above.rows);
      need_forward(layer, 2 * m < layer.rows ? 2 * m + 1 : layer.rows);
      steps.transposed_convolution(above, m, kStreams);
      for (int u = layer.adjoint_done; u <= 2 * m && u < layer.rows; ++u) {
        steps.unpool(layer, u, u - (2 * m - 1));
        adjoint_made(layer, u);
        layer.adjoint_done = u + 1;
      }
    }
  }

  void adjoint_made(const Layer<T>& layer, int u) {
    if (!wanted.phi_sums || !layer.owns(u)) return;
    steps.sums.add_weights(layer, u, kStreams);
    steps.sums.row_done();
  }

  // --------------------------------------------------------------------------------------------------- single steps

  int64_t pixel(int64_t b, int channel, int y) const {
    return ((b * net.channels[0] + channel) * net.height[0] + y) * net.width[0];
  }

  void load_row(int y) {
    const int width = net.width[0];
    const RowRing<T>& in = layers[0].in;
    for (int64_t b = image_begin; b < image_end; ++b) {
      for (int s = 0; s < kStreams; ++s)
        for (int c = 0; c < net.channels[0]; ++c) {
          T* even = in.row(y, s) + 2 * c * in.length + (b - image_begin) * (pitch / 2);
          split_row((s ? wanted.tangent : net.losses) + pixel(b, c, y), width, even, even + in.length);
        }
      if (wanted.value_sums && net.main_loss >= 0 && y >= row_begin && y < row_end)
        value_sums[b] += double(main_weight(b)) * double(sum_row(net.losses + pixel(b, int(net.main_loss), y), width));
    }
  }

  // Adds what row u of the last layer leaves for the value, and for phi's biases and output weights.
  void add_row(const Layer<T>& layer, int u) {
    if (!layer.owns(u)) return;
    if (wanted.phi_sums)
      for (int c = 0; c < layer.weights.outputs; ++c) {
        steps.sums.lanes[layer.bias_sums + c] += steps.row_sums[0][c];
        steps.sums.lanes[net.weight[net.depth] + c] += steps.row_sums[1][c];
      }
    if (!wanted.value_sums) return;
    const auto* lanes = reinterpret_cast<const T*>(steps.value_lanes);
    for (int64_t b = image_begin; b < image_end; ++b, lanes += layer.pitch)
      value_sums[b] += double(net.position_scale) * double(sum_row(lanes, layer.width));
  }

  // Writes rows 2 m - 1 and 2 m, as far as they are the band's.
  void write_gradient(int m) {
    for (int q = 0; q < 2; ++q) {
      const int y = 2 * m - 1 + q;
      if (y < row_begin || y >= row_end) continue;
      for (int64_t b = image_begin; b < image_end; ++b)
        for (int c = 0; c < net.channels[0]; ++c) {
          const T* from = steps.spread_row(layers[0], q, 0, c) + (b - image_begin) * pitch;
          T* to = wanted.grad_losses + pixel(b, c, y);
          const T main = kStreams == 1 && c == net.main_loss ? main_weight(b) * incoming(b) : T(0);
          for (int x = 0; x < net.width[0]; ++x) to[x] = from[x] + main;
        }
    }
  }

  const LossImageParams<T>& net;
  const Wanted<T> wanted;
  const int images;
  int pitch;  // columns from one image of the tile to the next
  Layer<T> layers[kMaxConvolutions];
  RowSteps<T, Act, kStreams> steps;
  // The tile that is worked on:
  int64_t image_begin, image_end;
  int row_begin, row_end;
  int rows_loaded;     // rows before this are in the first ring
  double* value_sums;  // out: (batch), the band's
};

}  // namespace auxfast::AUXFAST_ISA
