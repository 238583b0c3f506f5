// What a block does with a tile of samples of a small network: float32, at most kMostSmall losses and units a layer.
//
// kLanes lanes of a warp share a sample, and each has kUnits units of every layer: the sums of a layer's products stay
// in its registers, where they are independent of each other, while weights and the layer below are read from shared
// memory. One lane a sample with all units (kLanes = 1) takes the fewest instructions; more lanes a sample take less
// time where the samples are too few to fill the GPU. A warp keeps to samples of its own, so that __syncwarp() is the
// only barrier within a tile, but for the sums over samples for phi.
//
// Lane l has sample l % kSamples of its warp and the units from l / kSamples * kUnits on.
//
// The formulas, and the names of the arrays, are those of combiner_math.h, which does one unit after the other. Here
// all units of a lane take each step together.
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
// make_small_launch decides it. Places are in floats from the beginning of shared memory.
struct SmallLaunch {
  int units, lanes;  // kUnits, kLanes; lanes is 0 if the network is not small
  int64_t tiles;
  int samples;            // of a tile; samples * lanes threads are a block
  int stride;             // for phi: floats of a row of the tile's memory
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
  int arrays;                // the tile's arrays
  int staged;                // (samples, losses | 1), odd so that lanes with different samples use different banks
};

constexpr int padded_units(int units) { return (units + 3) / 4 * 4; }

// Floats of a row of a warp's own memory, which has a number for each of its samples. With what pads it, kLanes lanes
// that read four units each of a sample find them in different banks.
constexpr int small_stride(int lanes) { return 32 / lanes + (lanes == 1 ? 0 : lanes == 4 ? 2 : 1); }
AUXFAST_HD constexpr int hd_layers(int lanes) { return lanes == 1 ? 1 : 2; }

// The memory of a tile: arrays of rows of numbers, a row for each unit, a number for each sample. For the sums for phi,
// all warps of a block share the rows. Else each warp has its own, and every layer has rows for kUnits * kLanes units:
// what its padding is made of is never used, but it need not be looked for, and all addresses within an array are known
// to the compiler.
template <int kUnits, int kLanes, bool kPhi>
struct SmallTile {
  static constexpr int kSamples = 32 / kLanes;  // of a warp
  static constexpr int kWidest = kUnits * kLanes, kStride = small_stride(kLanes);
  static constexpr int kPadded = padded_units(kUnits), kRow = kLanes * kPadded;  // of weights
  // Weights of 4 units come with one load.
  struct alignas(16) Four {
    float number[4];
  };

  const CombinerParams<float>& net;
  const SmallLaunch& launch;
  float* const shared;
  const int stride, losses, lane;
  const int sample, column;  // of this lane: in the tile, in a row
  const int part;            // which units of the sample are this lane's
  // "-> x": x overwrites the array.
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
        stride(kPhi ? how.stride : kStride),
        losses(int(params.num_losses)),
        lane(int(threadIdx.x % 32)),
        sample(int(threadIdx.x / 32) * kSamples + lane % kSamples),
        column(kPhi ? sample : lane % kSamples),
        part(lane / kSamples) {
    const int array = (kPhi ? net.units : net.depth * kWidest) * stride;
    const int hd_array = (net.num_tangents > 0 ? hd_layers(kLanes) : 0) * kWidest * stride;
    state = shared + launch.arrays + (kPhi ? 0 : int(threadIdx.x / 32) * (2 * array + hd_array));
    delta = state + array;
    value = kPhi ? delta + array : delta;
    kappa = kPhi ? value + array : delta;
    hd = kappa + array;
    first_delta = hd + array;
    staged = shared + launch.staged + sample * (losses | 1);
  }

  // The place of a unit's weight in a row: each lane's share begins where four numbers can be loaded at once.
  __device__ __forceinline__ static int place(int unit) { return unit / kUnits * kPadded + unit % kUnits; }
  __device__ __forceinline__ int unit(int u) const { return part * kUnits + u; }

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
    warp_first = first + sample - lane % kSamples;
    samples = int(net.batch - first < launch.samples ? net.batch - first : launch.samples);
    const int64_t left = net.batch - warp_first;
    warp_samples = int(left < 0 ? 0 : left < kSamples ? left : kSamples);
  }
  __device__ __forceinline__ bool has_sample() const { return lane % kSamples < warp_samples; }
  __device__ __forceinline__ const float* rows_of(const float* matrix) const { return matrix + first * net.num_losses; }
  __device__ __forceinline__ float incoming() const {
    return has_sample() ? net.scale * net.grad[(first + sample) * net.grad_stride] : 0.0f;
  }

  // Calls visit(number in `staged`, number in global memory) for the losses of this warp's samples.
  template <class Visit>
  __device__ __forceinline__ void for_staged(int64_t rows, const Visit& visit) const {
    float* first_row = staged - lane % kSamples * (losses | 1);
    for (int i = lane; i < warp_samples * losses; i += 32) {
      const int row = (i * launch.inverse[0]) >> 16;
      visit(first_row + row * (losses | 1) + i - row * losses, rows + i);
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

  // Where the layer's rows begin in an array.
  __device__ __forceinline__ int row_of(int layer) const { return kPhi ? net.first_unit[layer] : layer * kWidest; }
  __device__ __forceinline__ int hd_row_of(int layer) const {
    return kPhi ? net.first_unit[layer] : layer % hd_layers(kLanes) * kWidest;
  }

  // The products with W_i (layer i's sums from what is below) and W_i^T (from layer i). `array` has all layers.
  __device__ __forceinline__ void up(int layer, const float* below, float (&sum)[kUnits]) const {
    const float* weights = shared + launch.up[layer];
    if (layer == 0)
      multiply(weights, kRow, staged, 1, losses, sum);
    else
      multiply(weights, kRow, below + column, stride, net.width[layer - 1], sum);
  }
  __device__ __forceinline__ void down(int layer, const float* array, float (&sum)[kUnits]) const {
    multiply(shared + launch.down[layer], kRow, array + row_of(layer) * stride + column, stride, net.width[layer], sum);
  }

  // How many of this lane's units a layer has; perhaps none or more than kUnits.
  __device__ __forceinline__ int count_of(int layer) const { return net.width[layer] - part * kUnits; }

  // This lane's numbers of a layer, from or to the layer's rows of an array: all at once, so that no unit waits for
  // another one. Units that do not exist have no rows for phi, and are 0.
  __device__ __forceinline__ void load(int layer, const float* rows, float (&numbers)[kUnits]) const {
    rows += part * kUnits * stride + column;
    AUXFAST_UNROLL
    for (int u = 0; u < kUnits; ++u) numbers[u] = !kPhi || u < count_of(layer) ? rows[u * stride] : 0.0f;
  }
  __device__ __forceinline__ void store(int layer, float* rows, const float (&numbers)[kUnits]) const {
    rows += part * kUnits * stride + column;
    AUXFAST_UNROLL
    for (int u = 0; u < kUnits; ++u)
      if (!kPhi || u < count_of(layer)) rows[u * stride] = numbers[u];
  }
  // Where `saved` has this lane's numbers of a layer, of which consecutive units are kTileSamples apart, in the first
  // of its arrays; the next one is net.units units further.
  __device__ __forceinline__ float* saved_at(int layer) const {
    const int64_t at = first + sample, row = at / kTileSamples * 3 * net.units + net.first_unit[layer] + part * kUnits;
    return net.saved + row * kTileSamples + at % kTileSamples;
  }
  __device__ __forceinline__ void save(int array, int layer, const float (&numbers)[kUnits]) const {
    if (!has_sample()) return;
    float* out = saved_at(layer) + array * net.units * kTileSamples;
    AUXFAST_UNROLL
    for (int u = 0; u < kUnits; ++u)
      if (u < count_of(layer)) out[u * kTileSamples] = numbers[u];
  }
  // Begins to copy the first `arrays` of state, delta and value from `saved`.
  __device__ __forceinline__ void fetch_saved(int arrays) const {
    if (!has_sample()) return;
    for (int layer = 0; layer < net.depth; ++layer) {
      const int count = count_of(layer);
      const float* in = saved_at(layer);
      float* rows = state + (row_of(layer) + part * kUnits) * stride + column;
      for (int array = 0; array < arrays; ++array, in += net.units * kTileSamples, rows += delta - state) {
        if (count >= kUnits) {  // which is most of them, and needs no look at each
          AUXFAST_UNROLL
          for (int u = 0; u < kUnits; ++u) begin_copy(rows + u * stride, in + u * kTileSamples);
        } else {
          for (int u = 0; u < count; ++u) begin_copy(rows + u * stride, in + u * kTileSamples);
        }
      }
    }
  }

  // Loads a lane's numbers from what is padded like a row of weights.
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
      up(layer, value + (layer ? row_of(layer - 1) * stride : 0), z);
      if (net.activation == Activation::softplus) {
        AUXFAST_UNROLL
        for (int u = 0; u < kUnits; ++u) Softplus::apply(z[u], h[u], s[u]);
      } else {
        AUXFAST_UNROLL
        for (int u = 0; u < kUnits; ++u) Identity::apply(z[u], h[u], s[u]);
      }
      store(layer, value + row_of(layer) * stride, h);
      store(layer, state + row_of(layer) * stride, s);
      if (saves) {
        save(2, layer, h);
        save(0, layer, s);
      }
      __syncwarp();
    }
    load_padded(launch.out, w);
    AUXFAST_UNROLL
    for (int u = 0; u < kUnits; ++u) g += u < count_of(last) ? w[u] * h[u] : 0.0f;
    AUXFAST_UNROLL
    for (int distance = kSamples; distance < 32; distance *= 2) g += __shfl_xor_sync(0xffffffffu, g, distance);
    return g;
  }

  // Makes delta of every unit from state, and writes it to `saved` if asked for.
  __device__ __forceinline__ void backward(bool saves) const {
    const int last = net.depth - 1;
    for (int layer = last; layer >= 0; --layer) {
      float d[kUnits] = {}, s[kUnits];
      load(layer, state + row_of(layer) * stride, s);
      if (layer == last)
        load_padded(launch.out, d);
      else
        down(layer + 1, delta, d);
      AUXFAST_UNROLL
      for (int u = 0; u < kUnits; ++u) d[u] *= Softplus::slope(s[u]);
      store(layer, delta + row_of(layer) * stride, d);
      if (saves) save(1, layer, d);
      __syncwarp();
    }
  }

  // Makes hd and kappa of every unit, from state, delta and the staged tangent. c: the gradient that reaches the
  // sample.
  __device__ __forceinline__ void second_order(float c) const {
    float s[kUnits], k[kUnits];
    for (int layer = 0; layer < net.depth; ++layer) {
      const int at = row_of(layer) * stride;
      float zd[kUnits] = {};
      up(layer, hd + (layer ? hd_row_of(layer - 1) * stride : 0), zd);
      load(layer, state + at, s);
      load(layer, delta + at, k);
      AUXFAST_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        if (layer == 0) zd[u] *= c;
        k[u] *= Softplus::relative_curvature(s[u]) * zd[u];
        zd[u] *= Softplus::slope(s[u]);
      }
      store(layer, kappa + at, k);
      store(layer, hd + hd_row_of(layer) * stride, zd);
      __syncwarp();
    }
    for (int layer = net.depth - 2; layer >= 0; --layer) {
      const int at = row_of(layer) * stride;
      float sum[kUnits] = {};
      down(layer + 1, kappa, sum);
      load(layer, state + at, s);
      load(layer, kappa + at, k);
      AUXFAST_UNROLL
      for (int u = 0; u < kUnits; ++u) k[u] += Softplus::slope(s[u]) * sum[u];
      store(layer, kappa + at, k);
      __syncwarp();
    }
  }

  // out = c in, for the units of the layers from `from` to `to` - 1. in, out: arrays, which may be the same.
  __device__ __forceinline__ void scale(float c, int from, int to, const float* in, float* out) const {
    for (int layer = from; layer < to; ++layer) {
      float numbers[kUnits];
      load(layer, in + row_of(layer) * stride, numbers);
      AUXFAST_UNROLL
      for (int u = 0; u < kUnits; ++u) numbers[u] *= c;
      store(layer, out + row_of(layer) * stride, numbers);
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
        if (k < losses) staged[k] = result(k, sum[u]);
      }
    }
    __syncwarp();
    for_staged(warp_first * losses, [&](const float* here, int64_t at) { matrix[at] = *here; });
    __syncwarp();  // before copies to `staged` begin anew
  }
};

}  // namespace auxfast::cuda
