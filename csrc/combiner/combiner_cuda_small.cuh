// What a block does with a tile of samples of a small network: float32, at most kMostSmall losses and units a layer.
//
// kLanes lanes of a warp share a sample, and each has kUnits units of every layer: the sums of a layer's products stay
// in its registers, where they are independent of each other, while weights and the layer below are read from shared
// memory. One lane a sample with all units (kLanes = 1) takes the fewest instructions; more lanes a sample take less
// time where the samples are too few to fill the GPU. A warp keeps to samples of its own, so that __syncwarp() is the
// only barrier within a tile, but for the sums over samples for phi.
//
// Lane l has sample l % kSamples of its warp and the units from l / kSamples * kUnits on.
#pragma once

#include "combiner/combiner.h"
#include "common/activations.h"
#include "common/async_copy.cuh"
#include "common/panels.h"

namespace auxfast::cuda {

constexpr int kMostSmall = 32;

// i / divisor is i * inverse_of(divisor) >> 16, for 0 <= i < 2048 and 1 <= divisor <= kMostSmall: the inverse exceeds
// 2^16 / divisor by e <= 1, and i * e < 2^16 / divisor.
constexpr int inverse_of(int divisor) { return (1 << 16) / divisor + 1; }
static_assert(kMostSmall * kMostSmall < 2048 && kMostSmall * 2048 <= 1 << 16);

// How the samples of a small network are spread over a launch's blocks, and what lies where in shared memory;
// make_small_launch decides it. Places are in
// floats from the beginning of shared memory.
struct SmallLaunch {
  int units, lanes;  // kUnits, kLanes; lanes is 0 if the network is not small
  int64_t tiles;
  int samples;            // of a tile; samples * lanes threads are a block
  int stride;             // of a row of the tile's memory, which has a number for each sample
  int blocks;             // grid.x: block x has the tiles x, x + blocks, x + 2 blocks, ...
  int tangent_blocks;     // grid.y: block y has the tangents y, y + tangent_blocks, ...
  int64_t shared_bytes;   // of a block
  int64_t partial_bytes;  // of the blocks' sums in the workspace

  // W_i^T with a row of weights for each input, and W_i with a row for each unit; rows are padded, see
  // SmallTile::place.
  int up[kMaxDepth], down[kMaxDepth];
  int inverse[kMaxDepth];    // of the number of a layer's inputs
  int first_row;             // floats of a row of W_1, which may have more columns than a layer has units
  int bias[kMaxDepth], out;  // padded like a row of weights
  int phi;                   // phi as it comes
  int arrays, widest;        // the tile's arrays; most units of a layer
  int staged;  // (samples, losses | 1): odd rows, so that lanes with different samples use different banks
};

constexpr int padded_units(int units) { return (units + 3) / 4 * 4; }

template <int kUnits, int kLanes>
struct SmallTile {
  static constexpr int kSamples = 32 / kLanes;  // of a warp
  static constexpr int kPadded = padded_units(kUnits), kRow = kLanes * kPadded;
  // Weights of 4 units come with one load.
  struct alignas(16) Four {
    float number[4];
  };

  const CombinerParams<float>& net;
  const SmallLaunch& launch;
  float* const shared;
  const int stride, losses, lane, column, part;
  // The tile's memory. "-> x": x overwrites the array.
  // clang-format off
  //   pass                      state       delta               value         kappa      hd                  first_delta
  //   forward                   out         value -> out        is delta      unused     unused              unused
  //   backward_phi              in -> hd    in -> kappa         in            unused     unused              unused
  //   second_order without phi  in          in -> kappa         is delta      is delta   of the last layers  unused
  //   second_order              in          in                  in            out        out                 out: c * delta
  // clang-format on
  // "in" is from `saved` or made again. In backward_phi, kappa is c * delta, and hd is c * value. Without phi there is
  // hd of two layers alone, which take turns, or of one where a lane has read it all before it writes.
  float *state, *delta, *value, *kappa, *hd;  // (units, stride): see combiner_math.h
  float *first_delta, *staged;                // (width of the first layer, stride), (samples, losses | 1)
  int64_t first, warp_first;                  // sample of this tile, and of this warp's share
  int samples, warp_samples;                  // in them; fewer, perhaps none, in the last tile

  __device__ __forceinline__ SmallTile(const CombinerParams<float>& params, const SmallLaunch& how, float* memory)
      : net(params),
        launch(how),
        shared(memory),
        stride(how.stride),
        losses(int(params.num_losses)),
        lane(int(threadIdx.x % 32)),
        column(int(threadIdx.x / 32) * kSamples + lane % kSamples),
        part(lane / kSamples) {
    const int array = net.units * stride;
    state = shared + launch.arrays;
    delta = state + array;
    value = net.grad_phi ? delta + array : delta;
    kappa = net.grad_phi ? value + array : delta;
    hd = kappa + array;
    first_delta = hd + array;
    staged = shared + launch.staged;
  }

  // The place of a unit's weight in a row: each lane's share begins where four numbers can be loaded at once.
  __device__ __forceinline__ static int place(int unit) { return unit / kUnits * kPadded + unit % kUnits; }
  __device__ __forceinline__ int unit(int u) const { return part * kUnits + u; }
  __device__ __forceinline__ float staged_loss(int64_t k) const { return staged[column * (losses | 1) + k]; }

  // Begins to copy phi to shared memory.
  __device__ __forceinline__ void fetch_phi() const {
    for (int i = threadIdx.x; i < net.num_parameters; i += blockDim.x) begin_copy(shared + launch.phi + i, net.phi + i);
  }

  // Lays out phi's parts as the products read them, all threads together. What pads a row is never used.
  __device__ __forceinline__ void arrange_phi() const {
    __syncthreads();
    const float* phi = shared + launch.phi;
    for (int layer = 0; layer < net.depth; ++layer) {
      const int width = net.width[layer], inputs = layer ? net.width[layer - 1] : losses;
      const int down_row = layer ? kRow : launch.first_row;
      for (int i = threadIdx.x; i < width * inputs; i += blockDim.x) {
        const int unit = (i * launch.inverse[layer]) >> 16, input = i - unit * inputs;
        const float weight = phi[net.weight[layer] + i];
        shared[launch.up[layer] + input * kRow + place(unit)] = weight;
        shared[launch.down[layer] + unit * down_row + place(input)] = weight;
      }
      if (int(threadIdx.x) < width)
        shared[launch.bias[layer] + place(threadIdx.x)] =
            net.bias[layer] < 0 ? 0.0f : phi[net.bias[layer] + threadIdx.x];
    }
    if (int(threadIdx.x) < net.width[net.depth - 1])
      shared[launch.out + place(threadIdx.x)] = phi[net.weight[net.depth] + threadIdx.x];
    __syncthreads();
  }

  __device__ __forceinline__ void begin(int64_t index) {
    first = index * launch.samples;
    warp_first = first + column - lane % kSamples;
    samples = int(net.batch - first < launch.samples ? net.batch - first : launch.samples);
    const int64_t left = net.batch - warp_first;
    warp_samples = int(left < 0 ? 0 : left < kSamples ? left : kSamples);
  }
  __device__ __forceinline__ bool has_sample() const { return lane % kSamples < warp_samples; }
  __device__ __forceinline__ const float* rows_of(const float* matrix) const { return matrix + first * net.num_losses; }
  __device__ __forceinline__ float incoming() const {
    return has_sample() ? net.scale * net.grad[(first + column) * net.grad_stride] : 0.0f;
  }

  // Calls visit(number in `staged`, number in global memory) for the losses of this warp's samples.
  template <class Visit>
  __device__ __forceinline__ void for_staged(int64_t rows, const Visit& visit) const {
    float* mine = staged + (column - lane % kSamples) * (losses | 1);
    for (int i = lane; i < warp_samples * losses; i += 32) {
      const int sample = (i * launch.inverse[0]) >> 16;
      visit(mine + sample * (losses | 1) + i - sample * losses, rows + i);
    }
  }

  // Begins to copy the losses, or a tangent of them, of this warp's samples. matrix: in, (batch, losses) in global
  // memory.
  __device__ __forceinline__ void stage(const float* matrix) const {
    for_staged(warp_first * losses, [&](float* here, int64_t at) { begin_copy(here, matrix + at); });
  }
  __device__ __forceinline__ void wait_for_stage() const {
    wait_for_copies();
    __syncwarp();
  }

  // sum[u] += sum over k < count of weights[k, u] in[k * step]. weights: rows of `row` floats, this lane's share of
  // them.
  __device__ __forceinline__ void multiply(const float* weights, int row, const float* in, int step, int count,
                                           float (&sum)[kUnits]) const {
    weights += part * kPadded;
    in_panels<6>(count, [&](auto height, int first_input) {
      constexpr int kHeight = decltype(height)::value;
      float x[kHeight];
      Four w[kHeight][kPadded / 4];
      AUXFAST_UNROLL
      for (int k = 0; k < kHeight; ++k) {
        x[k] = in[(first_input + k) * step];
        AUXFAST_UNROLL
        for (int i = 0; i < kPadded / 4; ++i)
          w[k][i] = reinterpret_cast<const Four*>(weights + (first_input + k) * row)[i];
      }
      AUXFAST_UNROLL
      for (int k = 0; k < kHeight; ++k) AUXFAST_UNROLL
      for (int u = 0; u < kUnits; ++u) sum[u] += w[k][u / 4].number[u % 4] * x[k];
    });
  }

  // The products with W_i (layer i's sums from what is below) and W_i^T (from layer i). `array` has all layers.
  __device__ __forceinline__ void up(int layer, const float* below, float (&sum)[kUnits]) const {
    const float* weights = shared + launch.up[layer];
    if (layer == 0)
      multiply(weights, kRow, staged + column * (losses | 1), 1, losses, sum);
    else
      multiply(weights, kRow, below + column, stride, net.width[layer - 1], sum);
  }
  __device__ __forceinline__ void down(int layer, const float* array, float (&sum)[kUnits]) const {
    multiply(shared + launch.down[layer], kRow, array + net.first_unit[layer] * stride + column, stride,
             net.width[layer], sum);
  }

  // This lane's units of a layer: how many exist, perhaps none or more than kUnits, and the index of the first one's
  // number for this sample in an array.
  struct Units {
    int count, at;
  };
  __device__ __forceinline__ Units units_of(int layer) const {
    return {net.width[layer] - part * kUnits, (net.first_unit[layer] + part * kUnits) * stride + column};
  }

  // Their numbers from or to an array, all at once, so that no unit waits for another one; 0 for those that do not
  // exist.
  __device__ __forceinline__ void load(const Units& units, const float* array, float (&numbers)[kUnits]) const {
    AUXFAST_UNROLL
    for (int u = 0; u < kUnits; ++u) numbers[u] = u < units.count ? array[units.at + u * stride] : 0.0f;
  }
  __device__ __forceinline__ void store(const Units& units, float* array, const float (&numbers)[kUnits]) const {
    AUXFAST_UNROLL
    for (int u = 0; u < kUnits; ++u)
      if (u < units.count) array[units.at + u * stride] = numbers[u];
  }
  // The same to an array of `saved`.
  __device__ __forceinline__ void save(int layer, int array, const float (&numbers)[kUnits]) const {
    if (!has_sample()) return;
    const int64_t sample = first + column;
    const int row = array * net.units + net.first_unit[layer] + part * kUnits, count = units_of(layer).count;
    float* out = net.saved + (sample / kTileSamples * 3 * net.units + row) * kTileSamples + sample % kTileSamples;
    AUXFAST_UNROLL
    for (int u = 0; u < kUnits; ++u)
      if (u < count) out[u * kTileSamples] = numbers[u];
  }
  // From what is padded like a row of weights.
  __device__ __forceinline__ void load_padded(int place, float (&numbers)[kUnits]) const {
    AUXFAST_UNROLL
    for (int u = 0; u < kUnits; ++u) numbers[u] = shared[place + part * kPadded + u];
  }

  // Makes state and value of every unit from the staged losses, and writes them to `saved` if asked for; returns g
  // without the main loss.
  __device__ __forceinline__ float activate(bool saves) const {
    const int last = net.depth - 1;
    float h[kUnits], s[kUnits], w[kUnits], g = 0;
    for (int layer = 0; layer <= last; ++layer) {
      float z[kUnits];
      load_padded(launch.bias[layer], z);
      up(layer, value + (layer ? net.first_unit[layer - 1] * stride : 0), z);
      if (net.activation == Activation::softplus) {
        AUXFAST_UNROLL
        for (int u = 0; u < kUnits; ++u) Softplus::apply(z[u], h[u], s[u]);
      } else {
        AUXFAST_UNROLL
        for (int u = 0; u < kUnits; ++u) Identity::apply(z[u], h[u], s[u]);
      }
      store(units_of(layer), value, h);
      store(units_of(layer), state, s);
      if (saves) {
        save(layer, 2, h);
        save(layer, 0, s);
      }
      __syncwarp();
    }
    load_padded(launch.out, w);
    AUXFAST_UNROLL
    for (int u = 0; u < kUnits; ++u) g += u < units_of(last).count ? w[u] * h[u] : 0.0f;
    AUXFAST_UNROLL
    for (int distance = kSamples; distance < 32; distance *= 2) g += __shfl_xor_sync(0xffffffffu, g, distance);
    return g;
  }

  // Makes delta of every unit from state, and writes it to `saved` if asked for.
  __device__ __forceinline__ void backward(bool saves) const {
    const int last = net.depth - 1;
    for (int layer = last; layer >= 0; --layer) {
      float d[kUnits] = {}, s[kUnits];
      load(units_of(layer), state, s);
      if (layer == last)
        load_padded(launch.out, d);
      else
        down(layer + 1, delta, d);
      AUXFAST_UNROLL
      for (int u = 0; u < kUnits; ++u) d[u] *= Softplus::slope(s[u]);
      store(units_of(layer), delta, d);
      if (saves) save(layer, 1, d);
      __syncwarp();
    }
  }

  // Begins to copy the first `arrays` of state, delta and value from `saved`.
  __device__ __forceinline__ void fetch_saved(int arrays) const {
    if (!has_sample()) return;
    const float* saved = net.saved + warp_first / kTileSamples * kTileSamples * 3 * net.units +
                         warp_first % kTileSamples + lane % kSamples;
#pragma unroll 4
    for (int row = part; row < arrays * net.units; row += kLanes)
      begin_copy(state + row * stride + column, saved + row * kTileSamples);
  }

  // Where the layer's rows of hd begin.
  __device__ __forceinline__ int hd_row(int layer) const {
    return net.grad_phi ? net.first_unit[layer] : kLanes == 1 ? 0 : layer % 2 * launch.widest;
  }

  // Makes hd and kappa of every unit, from state, delta and the staged tangent. c: the gradient that reaches the
  // sample.
  __device__ __forceinline__ void second_order(float c) const {
    float s[kUnits], k[kUnits];
    for (int layer = 0; layer < net.depth; ++layer) {
      const Units units = units_of(layer);
      float zd[kUnits] = {};
      up(layer, hd + (layer ? hd_row(layer - 1) * stride : 0), zd);
      load(units, state, s);
      load(units, delta, k);
      AUXFAST_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        if (layer == 0) zd[u] *= c;
        k[u] *= Softplus::relative_curvature(s[u]) * zd[u];
        zd[u] *= Softplus::slope(s[u]);
      }
      store(units, kappa, k);
      store({units.count, units.at + (hd_row(layer) - net.first_unit[layer]) * stride}, hd, zd);
      __syncwarp();
    }
    for (int layer = net.depth - 2; layer >= 0; --layer) {
      const Units units = units_of(layer);
      float sum[kUnits] = {};
      down(layer + 1, kappa, sum);
      load(units, state, s);
      load(units, kappa, k);
      AUXFAST_UNROLL
      for (int u = 0; u < kUnits; ++u) k[u] += Softplus::slope(s[u]) * sum[u];
      store(units, kappa, k);
      __syncwarp();
    }
  }

  // out = c in, for the units of the layers from `from` to `to` - 1. in, out: arrays, which may be the same.
  __device__ __forceinline__ void scale(float c, int from, int to, const float* in, float* out) const {
    for (int layer = from; layer < to; ++layer) {
      float numbers[kUnits];
      load(units_of(layer), in, numbers);
      AUXFAST_UNROLL
      for (int u = 0; u < kUnits; ++u) numbers[u] *= c;
      store(units_of(layer), out, numbers);
    }
  }

  // Writes result(k, (W_1^T units)[k]) for this warp's samples. units: in, an array; matrix: out, (batch, losses) in
  // global memory; staged: overwritten.
  template <class Result>
  __device__ __forceinline__ void write_losses(const float* units, float* matrix, const Result& result) const {
    for (int panel = 0; panel * kLanes * kUnits < losses; ++panel) {
      float sum[kUnits] = {};
      multiply(shared + launch.down[0] + panel * kRow, launch.first_row, units + column, stride, net.width[0], sum);
      AUXFAST_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        const int k = panel * kLanes * kUnits + unit(u);
        if (k < losses) staged[column * (losses | 1) + k] = result(k, sum[u]);
      }
    }
    __syncwarp();
    for_staged(warp_first * losses, [&](const float* here, int64_t at) { matrix[at] = *here; });
    __syncwarp();
  }
};

}  // namespace auxfast::cuda
