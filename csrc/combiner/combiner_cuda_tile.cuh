// What one block of threads does with a tile of samples. Two ways of working take turns, with barriers between them:
// - per sample: thread s has sample s of the tile to itself and runs the formulas of combiner_math.h on single numbers;
// - together: all threads share a product of small matrices, each of them a few entries. So go the first layer, which
//   reads the losses, the derivatives in the losses, and the sums over samples for phi.
//
// A tile's memory is rows of `stride` numbers, one for each sample: the arrays over hidden units, then staged losses.
// stride is odd, so that neither neighbouring samples of a row nor neighbouring rows of a sample share a bank.
#pragma once

#include "combiner/combiner.h"
#include "combiner/combiner_math.h"
#include "common/launch.cuh"

namespace auxfast::cuda {

constexpr int kPatch = 4;    // entries of a product that one thread sums at a time: four multiply-adds for five loads
constexpr int kNarrow = 32;  // up to so many losses a tile's rows are staged, above it lanes run along the losses
constexpr unsigned kAllLanes = 0xffffffffu;

// How the samples are spread; see make_plan in combiner_cuda.cu.
struct Plan {
  int64_t tiles;
  int samples;            // of a tile: 8, 16 or 32
  int rows;               // of a tile's memory
  int threads;            // of a block
  int blocks;             // grid.x: block x has the tiles x, x + blocks, x + 2 blocks, ...
  int tangent_blocks;     // grid.y: likewise for the tangents
  int64_t shared_bytes;   // of a tile's memory; 0 if it lies in the workspace
  int64_t partial_bytes;  // the workspace begins with what the blocks sum up; the tiles' memory follows
};

// A sample's numbers in an array over units.
template <class T>
struct Strided {
  T* first;
  int stride;
  AUXFAST_HD T& operator[](int unit) const { return first[int64_t(unit) * stride]; }
};

template <class T>
struct Constant {
  T number;
  AUXFAST_HD T operator[](int) const { return number; }
};

// Entry (i, k) is data[i * row + k * column].
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

// Entries row, row + step, ... (kPatch of them) of one column of a product: neighbouring threads have neighbouring
// entries of its rows. Beyond the last row the last one is worked out again, and not used.
struct Patch {
  int row, step, rows, column;
  __device__ __forceinline__ bool has(int r) const { return row + r * step < rows; }
  __device__ __forceinline__ int at(int r) const { return has(r) ? row + r * step : rows - 1; }

  // sum += left right, over the `count` columns of left.
  template <class T>
  __device__ __forceinline__ void multiply(const Matrix<T>& left, const Matrix<T>& right, int count,
                                           T (&sum)[kPatch]) const {
    const T *a[kPatch], *b = right.data + column * right.column;
#pragma unroll
    for (int r = 0; r < kPatch; ++r) a[r] = left.data + at(r) * left.row;
    for (int n = 0; n < count; ++n) {
      const T x = b[n * right.row];
#pragma unroll
      for (int r = 0; r < kPatch; ++r) sum[r] += a[r][n * left.column] * x;
    }
  }
};

// work(patch) for every patch of a (rows, columns) product, dealt to the block's threads by turns. `turn` is the thread
// whose turn it is: several products in a row keep all threads busy.
template <class Work>
__device__ __forceinline__ void for_each_patch(int rows, int columns, unsigned& turn, const Work& work) {
  const int panels = (rows + kPatch - 1) / kPatch, patches = panels * columns;
  for (int i = (threadIdx.x + blockDim.x - turn) % blockDim.x; i < patches; i += blockDim.x)
    work(Patch{i / columns, panels, rows, i % columns});
  turn = (turn + patches) % blockDim.x;
}

// The sum over a warp's lanes of number i, for a power of two of them: for lane i * (32 / kCount), and some more.
// With each step every lane hands half of its numbers to another one, for half of that one's.
template <class T, int kCount>
__device__ __forceinline__ T sum_over_lanes(T (&numbers)[kCount]) {
  int distance = 16;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T given = upper ? numbers[i] : numbers[i + half];
      numbers[i] = (upper ? numbers[i + half] : numbers[i]) + __shfl_xor_sync(kAllLanes, given, distance);
    }
  }
  for (; distance > 0; distance /= 2) numbers[0] += __shfl_xor_sync(kAllLanes, numbers[0], distance);
  return numbers[0];
}

template <class T, class Act>
struct Tile {
  const CombinerParams<T>& net;
  const CombinerMath<Act, T, T, Strided<T>> math;
  const int samples_of_tile, stride, losses;
  T *state, *delta, *value, *kappa, *hd;  // (units, stride): see combiner_math.h
  T *first_delta, *staged;                // (width of the first layer, stride), (losses, stride)
  int64_t first;                          // sample of this tile
  int samples;                            // in this tile; fewer in the last one

  // Memory for the arrays that a pass has (make_plan). Without phi, hd takes the place of value.
  __device__ __forceinline__ Tile(const CombinerParams<T>& params, const Plan& plan, T* shared)
      : net(params),
        math{params},
        samples_of_tile(plan.samples),
        stride(plan.samples + 1),
        losses(int(params.num_losses)) {
    const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x, array = int64_t(net.units) * stride;
    T* workspace = reinterpret_cast<T*>(static_cast<char*>(net.workspace) + plan.partial_bytes);
    state = plan.shared_bytes ? shared : workspace + block * plan.rows * stride;
    delta = state + array;
    value = delta + array;
    kappa = value + array;
    hd = net.grad_phi ? kappa + array : value;
    first_delta = hd + array;
    staged = state + (plan.rows - (losses <= kNarrow ? losses : 0)) * stride;
  }

  __device__ __forceinline__ void begin(int64_t index) {
    first = index * samples_of_tile;
    samples = int(net.batch - first < samples_of_tile ? net.batch - first : samples_of_tile);
  }
  __device__ __forceinline__ bool has_sample() const { return int(threadIdx.x) < samples; }
  __device__ __forceinline__ Strided<T> own(T* array) const { return {array + threadIdx.x, stride}; }
  __device__ __forceinline__ const T* rows_of(const T* matrix) const { return matrix + first * net.num_losses; }
  __device__ __forceinline__ T incoming() const {
    return net.scale * net.grad[(first + threadIdx.x) * net.grad_stride];
  }

  // z[unit, sample] = (W_1 rows^T), together; rows: (samples, losses) in global memory. z may be in use until here.
  __device__ __forceinline__ void project(const T* rows, T* z) const {
    if (losses <= kNarrow)
      for (int i = threadIdx.x; i < samples * losses; i += blockDim.x)
        staged[i % losses * stride + i / losses] = rows[i];
    __syncthreads();
    if (losses <= kNarrow) {
      unsigned turn = 0;
      for_each_patch(net.width[0], samples, turn, [&](const Patch& patch) {
        T sum[kPatch] = {};
        patch.multiply<T>({math.weight(0), losses, 1}, {staged, stride, 1}, losses, sum);
#pragma unroll
        for (int r = 0; r < kPatch; ++r)
          if (patch.has(r)) z[patch.at(r) * stride + patch.column] = sum[r];
      });
    } else {
      project_wide(rows, z);
    }
    __syncthreads();
  }

  // A warp at a time multiplies kPatch rows of W_1 by two rows, its lanes along the losses.
  __device__ __forceinline__ void project_wide(const T* rows, T* z) const {
    constexpr int kRows = 2, kSums = kRows * kPatch;
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32, width = net.width[0];
    const int panels = (width + kPatch - 1) / kPatch, groups = (samples + kRows - 1) / kRows;
    for (int task = threadIdx.x / 32; task < panels * groups; task += warps) {
      const Patch units{task / groups, panels, width, 0}, group{task % groups, groups, samples, 0};
      T sum[kSums] = {};  // of unit r and row s: r * kRows + s
      const T* w[kSums];
      const T* x[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        w[i] = math.weight(0) + units.at(i / kRows) * net.num_losses;
        x[i] = rows + group.at(i % kRows) * net.num_losses;
      }
      for (int k = lane; k < losses; k += 32)
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] += w[i][k] * x[i][k];
      const T total = sum_over_lanes(sum);
      const int i = lane / (32 / kSums);
      if (lane % (32 / kSums) == 0 && units.has(i / kRows) && group.has(i % kRows))
        z[units.at(i / kRows) * stride + group.at(i % kRows)] = total;
    }
  }

  // result(unit, factor * projected[unit] + bias[unit]) for the first layer of this thread's sample, a few units at a
  // time so that their activations do not wait for each other.
  template <class Result>
  __device__ __forceinline__ void first_layer(const T* projected, T factor, const T* bias, const Result& result) const {
    in_panels<3>(net.width[0], [&](auto height, int unit) {
      matvec_panel<decltype(height)::value, T>(unit, 1, projected + threadIdx.x, stride, 1, bias, Constant<T>{factor},
                                               result);
    });
  }

  // state, value and delta of every unit.
  __device__ __forceinline__ void activate() const {
    project(rows_of(net.losses), state);
    if (!has_sample()) return;
    const auto first_units = [&](const auto& result) { first_layer(state, T(1), math.bias(0), result); };
    math.forward(first_units, own(state), own(value));
    math.backward(own(state), own(delta));
  }

  // hd and kappa of every unit, for tangents (samples, losses).
  __device__ __forceinline__ void second_order(const T* tangents) const {
    project(tangents, hd);
    if (!has_sample()) return;
    const auto first_units = [&](const auto& result) { first_layer(hd, incoming(), nullptr, result); };
    math.second_order(first_units, own(state), own(delta), own(hd), own(kappa));
  }

  // Copies the first `rows` rows of this tile's memory, which are state, delta and value, to or from `saved`. That is
  // (batch / kTileSamples, 3 * units, kTileSamples), whatever a tile is here.
  template <bool kStore>
  __device__ __forceinline__ void copy_saved(int rows) const {
    T* saved = net.saved + first / kTileSamples * kTileSamples * 3 * net.units + first % kTileSamples;
    for (int i = threadIdx.x; i < rows * samples_of_tile; i += blockDim.x) {
      const int row = i / samples_of_tile, sample = i % samples_of_tile;
      if (sample >= samples) continue;
      T& here = state[row * stride + sample];
      T& there = saved[row * kTileSamples + sample];
      if (kStore)
        there = here;
      else
        here = there;
    }
  }

  // The first `arrays` of state, delta and value, by whichever way there is. This memory may be in use until here.
  __device__ __forceinline__ void restore(int arrays) const {
    if (!net.saved) return activate();
    __syncthreads();
    copy_saved<false>(arrays * net.units);
    __syncthreads();
  }

  // result(sample, k, (W_1^T units)) for the units of the first layer, together.
  template <class Result>
  __device__ __forceinline__ void for_each_loss(const T* units, const Result& result) const {
    unsigned turn = 0;
    for_each_patch(samples, losses, turn, [&](const Patch& patch) {
      T sum[kPatch] = {};
      patch.multiply<T>({units, 1, stride}, {math.weight(0), net.num_losses, 1}, net.width[0], sum);
#pragma unroll
      for (int r = 0; r < kPatch; ++r)
        if (patch.has(r)) result(patch.at(r), patch.column, sum[r]);
    });
  }
};

}  // namespace auxfast::cuda
