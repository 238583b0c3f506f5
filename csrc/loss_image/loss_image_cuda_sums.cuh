// The loss image's sums on a GPU, over pixels and images, for the value and for phi. Their order is always the same,
// and they are float64 beyond a thread's own pixels.
#pragma once

#include "loss_image/loss_image_cuda_convolution.cuh"

namespace auxfast::cuda {

// What the gradient of a layer's weights and biases is made of: products of kappa and h, and of e and hd; without a
// tangent, of e and h.
template <class T>
struct WeightGradient {
  Planes<const T> outer, inner;
  const T *outer2, *inner2;  // of the same layouts; nullptr if there is but one product
  int inputs, outputs;
  Tiling tiling;
  int64_t tiles;  // of all images together

  __device__ __forceinline__ int64_t weights() const { return int64_t(outputs) * inputs * kTaps; }
};

// A thread's pixels in the planes of one input and a panel of outputs.
template <class T, int kPanel>
struct ProductPlaces {
  int64_t outer, inner;  // the first pixel; the first one of its 4 x 4 surroundings
  int64_t outer_stride;  // from one output to the next
  int32_t outer_pitch, inner_pitch;
  int outputs;                     // that there are, from the panel's first one on
  bool has_row[4], has_column[4];  // of the surroundings
  bool second_row, second_column;

  __device__ __forceinline__ ProductPlaces(const WeightGradient<T>& work, const Pixels& pixels, int first_output,
                                           int input)
      : outer(work.outer.offset(pixels.image, first_output, pixels.y) + pixels.x),
        inner(work.inner.offset(pixels.image, input, pixels.y - 1) + pixels.x - 1),
        outer_stride(work.outer.channel_stride),
        outer_pitch(work.outer.pitch),
        inner_pitch(work.inner.pitch),
        outputs(work.outputs - first_output),
        second_row(pixels.has(1, 0)),
        second_column(pixels.has(0, 1)) {
    AUXFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int32_t y = pixels.y + i - 1, x = pixels.x + i - 1;
      has_row[i] = y >= work.inner.rows.begin && y < work.inner.rows.end;
      has_column[i] = x >= 0 && x < work.inner.width;
    }
  }

  // Adds the sum over the pixels p of outer[o, p] inner[p + tap], and if wanted that of outer[o, p], to products and
  // outer_sums: in and out.
  __device__ __forceinline__ void add(const T* outer_data, const T* inner_data, bool with_outer_sums,
                                      T (&products)[kPanel][kTaps], T (&outer_sums)[kPanel]) const {
    // Outputs whose pixels are read before they are used: registers allow no more. Code for older GPUs takes a few more
    // of them, and would spill two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    constexpr int kAtOnce = 2;
#else
    constexpr int kAtOnce = 4;
#endif
    T in[4][4];
    AUXFAST_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int64_t at = inner + i / 4 * int64_t(inner_pitch) + i % 4;
      in[i / 4][i % 4] = has_row[i / 4] && has_column[i % 4] ? inner_data[at] : T(0);
    }
    AUXFAST_UNROLL
    for (int begin = 0; begin < kPanel; begin += kAtOnce) {
      if (begin >= outputs) break;
      Pair<T> out[kAtOnce][2];
      AUXFAST_UNROLL
      for (int i = 0; i < 2 * kAtOnce; ++i) {
        const int o = begin + i / 2, q = i % 2;
        const int64_t at = outer + o * outer_stride + q * outer_pitch;
        out[i / 2][q] = o < outputs && (q == 0 || second_row) ? Pair<T>::load(outer_data + at) : Pair<T>{};
      }
      AUXFAST_UNROLL
      for (int i = 0; i < 4 * kAtOnce; ++i) {
        const int o = begin + i / 4, q = i / 2 % 2, r = i % 2;
        const T factor = r == 0 || second_column ? out[i / 4][q].at[r] : T(0);
        AUXFAST_UNROLL
        for (int tap = 0; tap < kTaps; ++tap) products[o][tap] += factor * in[q + tap / 3][r + tap % 3];
        if (with_outer_sums) outer_sums[o] += factor;
      }
    }
  }
};

// block_sums: out, (gridDim.x, weights and biases). Blocks: (weight_blocks(), panels of outputs, inputs).
template <class T, int kPanel>
__global__ void __launch_bounds__(kSumThreads, sizeof(T) == 4 ? kBlocksAtOnce : 1)
    weight_gradient_kernel(const WeightGradient<T> work, double* block_sums) {
  constexpr int kSums = kTaps + 1, kShares = 16;  // sums of an output, threads that add up one of them
  static_assert(kSums * kShares % 32 == 0 && kSums * kShares <= kSumThreads, "whole warps");
  STATIC_SHARED(T, sums, [kSums][kSumThreads]);
  const int first_output = int(blockIdx.y) * kPanel, input = int(blockIdx.z);
  T products[kPanel][kTaps] = {}, outer_sums[kPanel] = {};
  for (int64_t tile = blockIdx.x; tile < work.tiles; tile += gridDim.x) {
    const Pixels pixels(work.tiling, uint32_t(tile));
    if (!pixels.has(0, 0)) continue;
    const ProductPlaces<T, kPanel> places(work, pixels, first_output, input);
    for (int product = 0; product < (work.outer2 ? 2 : 1); ++product)
      places.add(product ? work.outer2 : work.outer.data, product ? work.inner2 : work.inner.data, product == 0,
                 products, outer_sums);
  }
  double* sums_of_block = block_sums + blockIdx.x * (work.weights() + work.outputs);
  const int tap = threadIdx.x / kShares, share = threadIdx.x % kShares;
  AUXFAST_UNROLL
  for (int o = 0; o < kPanel; ++o) {
    const int output = first_output + o;
    __syncthreads();
    AUXFAST_UNROLL
    for (int i = 0; i < kTaps; ++i) sums[i][threadIdx.x] = products[o][i];
    sums[kTaps][threadIdx.x] = outer_sums[o];
    __syncthreads();
    if (tap >= kSums) continue;
    double sum = 0;
    for (int i = share; i < kSumThreads; i += kShares) sum += double(sums[tap][i]);
    for (int distance = kShares / 2; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
    if (share > 0 || output >= work.outputs) continue;
    if (tap < kTaps)
      sums_of_block[(int64_t(output) * work.inputs + input) * kTaps + tap] = sum;
    else if (input == 0)
      sums_of_block[work.weights() + output] = sum;
  }
}

// Adds block_sums, in: (blocks, count), to sums, in and out: (count,), or begins them, a warp for each sum.
static __global__ void __launch_bounds__(kSumThreads)
    add_blocks_kernel(const double* block_sums, int blocks, int64_t count, bool begin, double* sums) {
  const int64_t at = (int64_t(blockIdx.x) * kSumThreads + threadIdx.x) / 32;
  if (at >= count) return;
  double sum = 0;
  for (int block = int(threadIdx.x) % 32; block < blocks; block += 32) sum += block_sums[block * count + at];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) sums[at] = begin ? sum : sums[at] + sum;
}

// Sums the planes' rows, each plane in gridDim.y parts of consecutive pixels. sums: out, (images, channels, parts).
// Blocks: (images * channels, parts).
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    plane_sums_kernel(const Planes<const T> planes, int channels, double* sums) {
  const T* row = planes.row(blockIdx.x / channels, int(blockIdx.x % channels), planes.rows.begin);
  const int64_t count = int64_t(planes.rows.end - planes.rows.begin) * planes.width;
  const int64_t most = (count + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * most;
  const int64_t end = begin + most < count ? begin + most : count;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) sum += double(row[i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x * int64_t(gridDim.y) + blockIdx.y] = sum;
}

// What plane_sums_kernel leaves of a layer's planes.
struct PlaneSums {
  double* sums;  // (images, channels, parts)
  int parts;
};

// Adds a band to values, in and out: (images), or begins them, a warp for each image. of_h: in, the band's sums of
// h_depth; of_main: in, those of the main loss (one channel); pixel_scale: the factor of an entry of h in the value,
// without w.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    image_values_kernel(const LossImageParams<T> net, int64_t images, const PlaneSums of_h, const PlaneSums of_main,
                        T pixel_scale, bool begin, double* values) {
  const int64_t image = (int64_t(blockIdx.x) * kSumThreads + threadIdx.x) / 32;
  if (image >= images) return;
  const int lane = threadIdx.x % 32, count = net.channels[net.depth] * of_h.parts;
  double value = 0;
  for (int i = lane; i < count; i += 32)
    value += double(net.phi[net.weight[net.depth] + i / of_h.parts]) * of_h.sums[image * count + i];
  value *= double(pixel_scale);
  if (net.main_loss >= 0)
    for (int i = lane; i < of_main.parts; i += 32)
      value += double(main_weight(net, image)) * of_main.sums[image * of_main.parts + i];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  if (lane == 0) values[image] = begin ? value : values[image] + value;
}

// Adds a chunk to the gradient of the output weights, or begins it, a block for each. of_h: in, the sums of h_depth, or
// of hd_depth; sums: in and out, (channels).
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    output_gradient_kernel(const LossImageParams<T> net, int64_t images, const PlaneSums of_h, T pixel_scale,
                           bool begin, double* sums) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < images * of_h.parts; i += kSumThreads) {
    const int64_t image = i / of_h.parts, part = i % of_h.parts;
    sum += double(incoming(net, image)) * of_h.sums[(image * gridDim.x + blockIdx.x) * of_h.parts + part];
  }
  sum = double(pixel_scale) * block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = begin ? sum : sums[blockIdx.x] + sum;
}

// Writes scale times the sum of the numbers, in: (count), to out: (1).
template <class T>
__global__ void __launch_bounds__(kSumThreads) reduce_kernel(const double* numbers, int64_t count, T scale, T* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += numbers[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = T(double(scale) * sum);
}

// Converts numbers, in: (count), to out: (count).
template <class T>
__global__ void __launch_bounds__(kSumThreads) store_kernel(const double* numbers, int64_t count, T* out) {
  const int64_t at = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (at < count) out[at] = T(numbers[at]);
}

}  // namespace auxfast::cuda
