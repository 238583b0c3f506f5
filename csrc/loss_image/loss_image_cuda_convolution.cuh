// The 3x3 convolution on a GPU, and what is done at once with its results: five kernels of one making.
//
// A block has a tile of 32 x 32 pixels and a panel of kOutputs channels; each of its threads 2 x 2 pixels, which is
// what a pool takes. Inputs with their halo, and weights, go through shared memory a few channels at a time.
#pragma once

#include "loss_image/loss_image_cuda_chunks.cuh"

namespace auxfast::cuda {

constexpr int kTileSide = 32;     // in pixels
constexpr int kBlocksAtOnce = 2;  // leaves 128 registers; ptxas by itself aims at fewer, and spills
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

  __device__ __forceinline__ Pixels(const Tiling& tiling, int64_t tile) {
    const int64_t in_image = tile % tiling.tiles();
    image = tile / tiling.tiles();
    y = tiling.rows.begin + int32_t(in_image / tiling.across()) * kTileSide + int32_t(threadIdx.x) / kTileThreads * 2;
    x = int32_t(in_image % tiling.across()) * kTileSide + int32_t(threadIdx.x) % kTileThreads * 2;
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

  __device__ __forceinline__ T get(int output, int input, int tap) const {
    return first[output * output_stride + input * input_stride + (flipped ? kTaps - 1 - tap : tap)];
  }
};

template <class T>
struct Convolution {
  Planes<const T> in;
  Weights<T> weights;
  int inputs, outputs;
  Tiling tiling;
};

// Calls finish(pixels, channel, sums) for every thread's pixels and each of its channels. Blocks: (images * tiles,
// panels).
template <class T, class Finish>
__global__ void __launch_bounds__(kSumThreads, kBlocksAtOnce)
    convolution_kernel(const Convolution<T> work, const Finish finish) {
  constexpr int kInputs = 16 / sizeof(T), kSide = kTileSide + 2;
  STATIC_SHARED(T, tile_inputs, [kInputs][kSide][kSide]);
  STATIC_SHARED(T, weights, [kInputs][kTaps][kOutputs]);
  const Pixels pixels(work.tiling, blockIdx.x);
  const int first_output = blockIdx.y * kOutputs;
  const int local_y = threadIdx.x / kTileThreads * 2, local_x = threadIdx.x % kTileThreads * 2;
  T sums[kOutputs][2][2] = {};
  for (int first = 0; first < work.inputs; first += kInputs) {
    const int inputs = work.inputs - first < kInputs ? work.inputs - first : kInputs;
    __syncthreads();
    for (int i = threadIdx.x; i < inputs * kSide * kSide; i += kSumThreads) {
      const int input = i / (kSide * kSide), y = i / kSide % kSide, x = i % kSide;
      tile_inputs[input][y][x] =
          work.in.at_or_zero(pixels.image, first + input, pixels.y - local_y + y - 1, pixels.x - local_x + x - 1);
    }
    for (int i = threadIdx.x; i < inputs * kTaps * kOutputs; i += kSumThreads) {
      const int input = i / (kTaps * kOutputs), tap = i / kOutputs % kTaps, output = first_output + i % kOutputs;
      weights[input][tap][i % kOutputs] = output < work.outputs ? work.weights.get(output, first + input, tap) : T(0);
    }
    __syncthreads();
    for (int input = 0; input < inputs; ++input) {
      T in[4][4];
      AUXFAST_UNROLL
      for (int i = 0; i < 16; ++i) in[i / 4][i % 4] = tile_inputs[input][local_y + i / 4][local_x + i % 4];
      AUXFAST_UNROLL
      for (int tap = 0; tap < kTaps; ++tap) AUXFAST_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        const T weight = weights[input][tap][o];
        AUXFAST_UNROLL
        for (int j = 0; j < 4; ++j) sums[o][j / 2][j % 2] += weight * in[j / 2 + tap / 3][j % 2 + tap % 3];
      }
    }
  }
  if (!pixels.has(0, 0)) return;
  AUXFAST_UNROLL
  for (int o = 0; o < kOutputs; ++o)
    if (first_output + o < work.outputs) finish(pixels, first_output + o, sums[o]);
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

// Finishes z, which is without its bias. out: h, and the state and e if they have data; e may be the state's planes,
// and then overwrites it. Only the last layer knows its e by now.
template <class T, class Act>
struct Activate {
  LossImageParams<T> net;
  const T* bias;
  T pool_scale;
  Planes<T> h, state, e;

  __device__ __forceinline__ void operator()(const Pixels& pixels, int channel, const T (&z)[2][2]) const {
    const T w = e.data ? net.phi[net.weight[net.depth] + channel] : T(0);
    const T top = w * net.position_scale * incoming(net, pixels.image);
    T pooled = 0;
    AUXFAST_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int q = j / 2, r = j % 2;
      if (!pixels.has(q, r)) continue;
      T value, new_state;
      Act::apply(z[q][r] + bias[channel], value, new_state);
      pooled += value;
      if (state.data) state.at(pixels.image, channel, pixels.y + q, pixels.x + r) = new_state;
      if (e.data) e.at(pixels.image, channel, pixels.y + q, pixels.x + r) = PixelMath<Act, T>::delta(new_state, top);
    }
    h.at(pixels.image, channel, pixels.y / 2, pixels.x / 2) = pool_scale * pooled;
  }
};

// Finishes zd. in: state, and in the last layer e; out: hd, and zd, which in the last layer gets kappa instead.
template <class T, class Act>
struct ActivateTangent {
  T pool_scale;
  bool is_last;
  Planes<T> hd, zd;
  Planes<const T> state, e;

  __device__ __forceinline__ void operator()(const Pixels& pixels, int channel, const T (&tangent)[2][2]) const {
    T pooled = 0;
    AUXFAST_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int q = j / 2, r = j % 2;
      if (!pixels.has(q, r)) continue;
      const int32_t y = pixels.y + q, x = pixels.x + r;
      const T s = state.at(pixels.image, channel, y, x);
      pooled += PixelMath<Act, T>::delta(s, tangent[q][r]);
      zd.at(pixels.image, channel, y, x) =
          is_last ? PixelMath<Act, T>::kappa(s, tangent[q][r], e.at(pixels.image, channel, y, x)) : tangent[q][r];
    }
    hd.at(pixels.image, channel, pixels.y / 2, pixels.x / 2) = pool_scale * pooled;
  }
};

// Finishes what reaches h. Without a tangent, in: state; out: e, which may be the state's planes and then overwrites
// it. With a tangent (zd has data), in: state, e and zd; out: zd, which gets kappa. The pool's extents are known to the
// compiler: with divisions by them, and addresses of their own for every pixel, this would be most of the kernel.
template <class T, class Act, int kPoolRows, int kPoolColumns>
struct Unpool {
  T pool_scale;
  Planes<T> state, e, zd;  // of one layout

  __device__ __forceinline__ void operator()(const Pixels& pixels, int channel, const T (&gradient)[2][2]) const {
    const int64_t first =
        state.row(pixels.image, channel, pixels.y * kPoolRows) - state.data + int64_t(pixels.x) * kPoolColumns;
    AUXFAST_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (!pixels.has(j / 2, j % 2)) continue;
      const T each = pool_scale * gradient[j / 2][j % 2];
      AUXFAST_UNROLL
      for (int i = 0; i < kPoolRows * kPoolColumns; ++i) {
        const int64_t at = first + int64_t(j / 2 * kPoolRows + i / kPoolColumns) * state.width +
                           (j % 2 * kPoolColumns + i % kPoolColumns);
        const T s = state.data[at];
        if (zd.data)
          zd.data[at] = PixelMath<Act, T>::kappa(s, zd.data[at], e.data[at], each);
        else
          e.data[at] = PixelMath<Act, T>::delta(s, each);
      }
    }
  }
};

// Finishes what reaches the losses. out: their gradient.
template <class T>
struct StoreGradient {
  LossImageParams<T> net;
  Planes<T> gradient;
  int main_loss;  // the main loss adds its own gradient there, or -1

  __device__ __forceinline__ void operator()(const Pixels& pixels, int channel, const T (&sums)[2][2]) const {
    const T main = channel == main_loss ? main_weight(net, pixels.image) * incoming(net, pixels.image) : T(0);
    AUXFAST_UNROLL
    for (int j = 0; j < 4; ++j)
      if (pixels.has(j / 2, j % 2))
        gradient.at(pixels.image, channel, pixels.y + j / 2, pixels.x + j % 2) = sums[j / 2][j % 2] + main;
  }
};

}  // namespace auxfast::cuda
