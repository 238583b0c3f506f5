// The 3x3 convolution on a GPU, and what is done at once with its results: five kernels of one making.
//
// A block has a tile of 32 x 32 pixels and a panel of some output channels; each of its threads 2 x 2 pixels, which is
// what a pool takes. Inputs with their halo, and weights, go through shared memory one channel at a time: while the
// block works on one, its threads fetch the next into registers.
#pragma once

#include "loss_image/loss_image_cuda_chunks.cuh"

namespace auxfast::cuda {

constexpr int kTileSide = 32;     // in pixels
constexpr int kBlocksAtOnce = 2;  // leaves 128 registers; ptxas by itself aims at fewer, and spills
constexpr int kBusyBlocks = 256;  // with so many at once the largest GPUs are busy
constexpr int kTileThreads = kTileSide / 2;
static_assert(kTileThreads * kTileThreads == kSumThreads, "a thread has 2 x 2 pixels");

// The pixels of the images that are worked on, tile by tile: all columns of some rows.
struct Tiling {
  Rows rows;
  int32_t width;

  AUXFAST_HD int32_t across() const { return (width + kTileSide - 1) / kTileSide; }
  AUXFAST_HD int64_t tiles() const { return int64_t((rows.end - rows.begin + kTileSide - 1) / kTileSide) * across(); }
};

// The pixels of a thread: (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1), as far as they are the tiling's.
struct Pixels {
  int64_t image;
  int32_t y, x, end_y, end_x;

  // 32 bits count the tiles of a chunk: each takes memory, of which a chunk has a share only.
  __device__ __forceinline__ Pixels(const Tiling& tiling, uint32_t tile) {
    const uint32_t tiles = uint32_t(tiling.tiles()), across = uint32_t(tiling.across()), in_image = tile % tiles;
    image = tile / tiles;
    y = tiling.rows.begin + int32_t(in_image / across) * kTileSide + int32_t(threadIdx.x) / kTileThreads * 2;
    x = int32_t(in_image % across) * kTileSide + int32_t(threadIdx.x) % kTileThreads * 2;
    end_y = tiling.rows.end;
    end_x = tiling.width;
  }
  __device__ __forceinline__ bool has(int row, int column) const { return y + row < end_y && x + column < end_x; }
};

// The weights (output, input, tap) of a convolution, or of its transposed one.
template <class T>
struct Weights {
  const T* first;
  int64_t output_stride, input_stride;
  bool flipped;

  __device__ __forceinline__ const T* at(int output, int tap) const {
    return first + output * output_stride + (flipped ? kTaps - 1 - tap : tap);
  }
};

template <class T>
struct Convolution {
  Planes<const T> in;
  Weights<T> weights;
  int inputs, outputs;
  Tiling tiling;
};

// What a block needs of one input channel: in shared memory as arrays, and a thread's share of them on the way there.
template <class T, int kPanel>
struct InputTile {
  static constexpr int kSide = kTileSide + 2, kPixels = kSide * kSide, kWeights = kTaps * kPanel;
  static constexpr int kShare = (kPixels + kSumThreads - 1) / kSumThreads;  // of the pixels
  static_assert(kWeights <= kSumThreads, "a thread fetches one weight");

  const T *channel, *weight;  // of the input that is fetched next
  int64_t pixels[kShare];     // where they are in the channel
  bool has_pixel[kShare], has_weight;

  __device__ __forceinline__ InputTile(const Convolution<T>& work, const Pixels& mine, int first_output)
      : channel(work.in.row(mine.image, 0, work.in.rows.begin)) {
    const uint32_t height = uint32_t(work.in.rows.end - work.in.rows.begin), width = uint32_t(work.in.width);
    const int32_t top = mine.y - int32_t(threadIdx.x) / kTileThreads * 2 - 1 - work.in.rows.begin;
    const int32_t left = mine.x - int32_t(threadIdx.x) % kTileThreads * 2 - 1;
    AUXFAST_UNROLL
    for (int k = 0; k < kShare; ++k) {
      const int i = int(threadIdx.x) + k * kSumThreads, y = top + i / kSide, x = left + i % kSide;
      has_pixel[k] = i < kPixels && uint32_t(y) < height && uint32_t(x) < width;
      pixels[k] = int64_t(y) * work.in.pitch + x;
    }
    const int output = first_output + int(threadIdx.x) % kPanel, tap = int(threadIdx.x) / kPanel;
    has_weight = tap < kTaps && output < work.outputs;
    weight = work.weights.at(has_weight ? output : 0, has_weight ? tap : 0);
  }

  // What a thread has fetched: pixels, and a weight.
  struct Fetched {
    T pixels[kShare], weight;
  };
  __device__ __forceinline__ Fetched fetch() const {
    Fetched fetched;
    AUXFAST_UNROLL
    for (int k = 0; k < kShare; ++k) fetched.pixels[k] = has_pixel[k] ? channel[pixels[k]] : T(0);
    fetched.weight = has_weight ? *weight : T(0);
    return fetched;
  }
  static __device__ __forceinline__ void store(const Fetched& fetched, T* shared_pixels, T* shared_weights) {
    AUXFAST_UNROLL
    for (int k = 0; k < kShare; ++k) {
      const int i = int(threadIdx.x) + k * kSumThreads;
      if (i < kPixels) shared_pixels[i] = fetched.pixels[k];
    }
    if (threadIdx.x < kWeights) shared_weights[threadIdx.x] = fetched.weight;
  }
};

// Calls finish(pixels, channel, sums, given) for every thread's pixels and each of its kPanel channels. `given` is what
// finish.load(pixels, channel) has read, of Finish::kAtOnce channels before any of them is written: no load can pass a
// store, and a thread that waits for each by itself waits most of the time. Blocks: (images * tiles, panels). An input
// has one of two places in shared memory, so that one barrier for each input is enough: who writes to a place has
// passed the barrier behind which all have read what was there before.
template <class T, int kPanel, class Finish>
__global__ void __launch_bounds__(kSumThreads, kBlocksAtOnce)
    convolution_kernel(const Convolution<T> work, const Finish finish) {
  using Tile = InputTile<T, kPanel>;
  STATIC_SHARED(T, tile_pixels, [2][Tile::kSide][Tile::kSide]);
  STATIC_SHARED(T, weights, [2][kTaps][kPanel]);
  const Pixels pixels(work.tiling, blockIdx.x);
  const int first_output = int(blockIdx.y) * kPanel;
  const int local_y = int(threadIdx.x) / kTileThreads * 2, local_x = int(threadIdx.x) % kTileThreads * 2;
  Tile tile(work, pixels, first_output);
  T sums[kPanel][2][2] = {};
  auto fetched = tile.fetch();
  for (int input = 0; input < work.inputs; ++input) {
    const int place = input % 2;
    Tile::store(fetched, &tile_pixels[place][0][0], &weights[place][0][0]);
    __syncthreads();
    if (input + 1 < work.inputs) {
      tile.channel += work.in.channel_stride;
      tile.weight += work.weights.input_stride;
    }
    fetched = tile.fetch();  // the last one once more: without a branch no thread waits for what it fetches
    T in[4][4];
    AUXFAST_UNROLL
    for (int i = 0; i < 16; ++i) in[i / 4][i % 4] = tile_pixels[place][local_y + i / 4][local_x + i % 4];
    AUXFAST_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) AUXFAST_UNROLL
    for (int o = 0; o < kPanel; ++o) {
      const T weight = weights[place][tap][o];
      AUXFAST_UNROLL
      for (int j = 0; j < 4; ++j) sums[o][j / 2][j % 2] += weight * in[j / 2 + tap / 3][j % 2 + tap % 3];
    }
  }
  if (!pixels.has(0, 0)) return;
  AUXFAST_UNROLL
  for (int o = 0; o < kPanel; o += Finish::kAtOnce) {
    typename Finish::Given given[Finish::kAtOnce];
    AUXFAST_UNROLL
    for (int i = 0; i < Finish::kAtOnce; ++i)
      if (first_output + o + i < work.outputs) given[i] = finish.load(pixels, first_output + o + i);
    AUXFAST_UNROLL
    for (int i = 0; i < Finish::kAtOnce; ++i)
      if (first_output + o + i < work.outputs) finish(pixels, first_output + o + i, sums[o + i], given[i]);
  }
}

// The gradient that reaches an image's value, and the factor of its sum of the main loss. `net` has the chunk's images.
template <class T>
__device__ __forceinline__ T incoming(const LossImageParams<T>& net, int64_t image) {
  return net.grad ? net.scale * net.grad[image * net.grad_stride] : net.scale;
}
template <class T>
__device__ __forceinline__ T main_weight(const LossImageParams<T>& net, int64_t image) {
  return net.main_weights ? net.main_weights[image] : net.main_scale;
}

// Finishes z, which is without its bias. out: h, and the state and e where they are not nullptr. Only the last layer
// knows its e by now, and then no state is written where that takes the state's place.
template <class T, class Act>
struct Activate {
  LossImageParams<T> net;
  const T* bias;
  T pool_scale;
  Planes<T> h, z;  // of z the layout alone
  T *state, *e;

  static constexpr int kAtOnce = 4;
  struct Given {
    T bias, top;  // top: the gradient that reaches act(z) in the last layer
  };
  __device__ __forceinline__ Given load(const Pixels& pixels, int channel) const {
    const T w = e ? net.phi[net.weight[net.depth] + channel] : T(0);
    return {bias[channel], w * net.position_scale * incoming(net, pixels.image)};
  }
  __device__ __forceinline__ void operator()(const Pixels& pixels, int channel, const T (&sums)[2][2],
                                             const Given& given) const {
    const int64_t first = z.offset(pixels.image, channel, pixels.y) + pixels.x;
    T pooled = 0;
    AUXFAST_UNROLL
    for (int q = 0; q < 2; ++q) {
      if (!pixels.has(q, 0)) continue;
      Pair<T> new_state, new_e;
      AUXFAST_UNROLL
      for (int r = 0; r < 2; ++r) {
        T value;
        Act::apply(sums[q][r] + given.bias, value, new_state.at[r]);
        if (r == 0 || pixels.has(q, 1)) pooled += value;
        new_e.at[r] = PixelMath<Act, T>::delta(new_state.at[r], given.top);
      }
      const int64_t at = first + q * z.pitch;
      if (state) new_state.store(state + at);
      if (e) new_e.store(e + at);
    }
    h.at(pixels.image, channel, pixels.y / 2, pixels.x / 2) = pool_scale * pooled;
  }
};

// The last layer's e, out, from its state: what Activate makes of a convolution. Blocks: (images * channels, any
// number).
template <class T, class Act>
__global__ void __launch_bounds__(kSumThreads)
    last_e_kernel(const LossImageParams<T> net, const Planes<const T> state, int64_t plane_size, T* e) {
  const int channels = net.channels[net.depth], channel = int(blockIdx.x % channels);
  const int64_t image = blockIdx.x / channels, first = image * state.image_stride + channel * state.channel_stride;
  const T top = net.phi[net.weight[net.depth] + channel] * net.position_scale * incoming(net, image);
  for (int64_t i = blockIdx.y * int64_t(kSumThreads) + threadIdx.x; i < plane_size; i += gridDim.y * kSumThreads)
    e[first + i] = PixelMath<Act, T>::delta(state.data[first + i], top);
}

// Finishes zd. in: state, and in the last layer e; out: hd, and zd, which in the last layer gets kappa instead.
template <class T, class Act>
struct ActivateTangent {
  T pool_scale;
  bool is_last;
  Planes<T> hd, zd;
  const T *state, *e;

  static constexpr int kAtOnce = 4;
  struct Given {
    Pair<T> state[2], e[2];
  };
  __device__ __forceinline__ Given load(const Pixels& pixels, int channel) const {
    const int64_t first = zd.offset(pixels.image, channel, pixels.y) + pixels.x;
    Given given;
    AUXFAST_UNROLL
    for (int q = 0; q < 2; ++q) {
      if (!pixels.has(q, 0)) continue;
      given.state[q] = Pair<T>::load(state + first + q * zd.pitch);
      if (is_last) given.e[q] = Pair<T>::load(e + first + q * zd.pitch);
    }
    return given;
  }
  __device__ __forceinline__ void operator()(const Pixels& pixels, int channel, const T (&tangent)[2][2],
                                             const Given& given) const {
    const int64_t first = zd.offset(pixels.image, channel, pixels.y) + pixels.x;
    T pooled = 0;
    AUXFAST_UNROLL
    for (int q = 0; q < 2; ++q) {
      if (!pixels.has(q, 0)) continue;
      Pair<T> out;
      AUXFAST_UNROLL
      for (int r = 0; r < 2; ++r) {
        const T s = given.state[q].at[r];
        if (r == 0 || pixels.has(q, 1)) pooled += PixelMath<Act, T>::delta(s, tangent[q][r]);
        out.at[r] = is_last ? PixelMath<Act, T>::kappa(s, tangent[q][r], given.e[q].at[r]) : tangent[q][r];
      }
      out.store(zd.data + first + q * zd.pitch);
    }
    hd.at(pixels.image, channel, pixels.y / 2, pixels.x / 2) = pool_scale * pooled;
  }
};

// Finishes what reaches h. Without a tangent, in: state; out: e, which may be the state's planes and then overwrites
// it. With a tangent (zd is not nullptr), in: state, e and zd; out: zd, which gets kappa. The pool's extents are known
// to the compiler: with divisions by them, and addresses of their own for every pixel, this would be most of the
// kernel.
template <class T, class Act, int kPoolRows, int kPoolColumns>
struct Unpool {
  T pool_scale;
  Planes<T> state;
  T *e, *zd;

  static constexpr int kAtOnce = 1, kPixels = 16 / sizeof(T);  // kPixels: whose windows are read at once
  struct Given {};
  __device__ __forceinline__ Given load(const Pixels&, int) const { return {}; }

  __device__ __forceinline__ void operator()(const Pixels& pixels, int channel, const T (&gradient)[2][2],
                                             const Given&) const {
    if (zd)
      unpool<true>(pixels, channel, gradient, zd);
    else
      unpool<false>(pixels, channel, gradient, e);
  }

  template <bool kTangent>
  __device__ __forceinline__ void unpool(const Pixels& pixels, int channel, const T (&gradient)[2][2], T* out) const {
    const int64_t first = state.offset(pixels.image, channel, pixels.y * kPoolRows) + int64_t(pixels.x) * kPoolColumns;
    AUXFAST_UNROLL
    for (int begin = 0; begin < 4; begin += kPixels) {
      Pair<T> given[kTangent ? 3 : 1][kPixels][kPoolRows];  // state, e, zd
      const T* const from[] = {state.data, e, zd};
      AUXFAST_UNROLL
      for (int i = 0; i < kPixels * kPoolRows * (kTangent ? 3 : 1); ++i) {
        const int what = i / (kPixels * kPoolRows), pixel = i / kPoolRows % kPixels, row = i % kPoolRows;
        if (pixels.has((begin + pixel) / 2, (begin + pixel) % 2))
          given[what][pixel][row] = Pair<T>::load(from[what] + first + place(begin + pixel, row));
      }
      AUXFAST_UNROLL
      for (int i = 0; i < kPixels * kPoolRows; ++i) {
        const int pixel = i / kPoolRows, row = i % kPoolRows, j = begin + pixel;
        if (!pixels.has(j / 2, j % 2)) continue;
        const T each = pool_scale * gradient[j / 2][j % 2];
        Pair<T> result;
        AUXFAST_UNROLL
        for (int r = 0; r < 2; ++r) {
          const T s = given[0][pixel][row].at[r];
          if constexpr (kTangent)
            result.at[r] = PixelMath<Act, T>::kappa(s, given[2][pixel][row].at[r], given[1][pixel][row].at[r], each);
          else
            result.at[r] = PixelMath<Act, T>::delta(s, each);
        }
        result.store(out + first + place(j, row));
      }
    }
  }
  // Where a row of pixel j's window is, from that of the thread's first pixel on.
  __device__ __forceinline__ int64_t place(int j, int row) const {
    return int64_t(j / 2 * kPoolRows + row) * state.pitch + j % 2 * kPoolColumns;
  }
};

// Finishes what reaches the losses. out: their gradient.
template <class T>
struct StoreGradient {
  LossImageParams<T> net;
  Planes<T> gradient;
  int main_loss;  // the main loss adds its own gradient there, or -1

  static constexpr int kAtOnce = 4;
  struct Given {
    T main;
  };
  __device__ __forceinline__ Given load(const Pixels& pixels, int channel) const {
    return {channel == main_loss ? main_weight(net, pixels.image) * incoming(net, pixels.image) : T(0)};
  }
  __device__ __forceinline__ void operator()(const Pixels& pixels, int channel, const T (&sums)[2][2],
                                             const Given& given) const {
    AUXFAST_UNROLL
    for (int j = 0; j < 4; ++j)
      if (pixels.has(j / 2, j % 2))
        gradient.at(pixels.image, channel, pixels.y + j / 2, pixels.x + j % 2) = sums[j / 2][j % 2] + given.main;
  }
};

}  // namespace auxfast::cuda
