// What a block does with a tile of samples. Two ways of working take turns, with barriers between them:
// - per sample: thread s has sample s of the tile to itself and runs the formulas of combiner_math.h on single numbers;
// - together: all threads share a product of small matrices, each of them a panel. So go the first layer, which reads
// the
//   losses, the derivatives in the losses, and the sums over samples for phi.
//
// A tile's memory is rows of `stride` numbers, one for each sample: the arrays over hidden units, then staged losses.
// stride is odd, so that neither neighbouring samples of a row nor neighbouring rows of a sample share a bank.
#pragma once

#include "combiner/combiner.h"
#include "combiner/combiner_math.h"
#include "common/launch.cuh"

namespace auxfast::cuda {

constexpr int kPanel = 4;              // rows of a product that one thread sums at a time: 4 multiply-adds for 5 loads
constexpr int kMostStagedLosses = 32;  // up to so many a tile's rows are staged; beyond it lanes run along the losses
constexpr unsigned kAllLanes = 0xffffffffu;

// How the samples are spread over a launch's blocks; make_launch in combiner_cuda.cu decides it.
struct Launch {
  int64_t tiles;
  int samples;            // of a tile: 8, 16 or 32
  int rows;               // of a tile's memory
  int threads;            // of a block
  int blocks;             // grid.x: block x has the tiles x, x + blocks, x + 2 blocks, ...
  int tangent_blocks;     // grid.y: block y has the tangents y, y + tangent_blocks, ...
  int64_t shared_bytes;   // of a tile's memory; 0 if it lies in the workspace
  int64_t partial_bytes;  // of the blocks' sums, with which the workspace begins; the tiles' memory follows
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

// Rows row, row + step, ... (kPanel of them) of one column of a product: neighbouring threads have neighbouring entries
// of its rows. Beyond the last row the last one is worked out again, and not used.
struct Panel {
  int row, step, rows, column;
  __device__ __forceinline__ bool has(int r) const { return row + r * step < rows; }
  __device__ __forceinline__ int at(int r) const { return has(r) ? row + r * step : rows - 1; }

  // sum += left right, over the `count` columns of left. sum: in and out.
  template <class T>
  __device__ __forceinline__ void multiply(const Matrix<T>& left, const Matrix<T>& right, int count,
                                           T (&sum)[kPanel]) const {
    const T *a[kPanel], *b = right.data + column * right.column;
#pragma unroll
    for (int r = 0; r < kPanel; ++r) a[r] = left.data + at(r) * left.row;
    for (int n = 0; n < count; ++n) {
      const T x = b[n * right.row];
#pragma unroll
      for (int r = 0; r < kPanel; ++r) sum[r] += a[r][n * left.column] * x;
    }
  }
};

// Calls work(panel) for every panel of a (rows, columns) product, dealt by turns to the block's threads, of which there
// are a power of two. turn: in and out, the thread whose turn it is, so that several products in a row keep all threads
// busy.
template <class Work>
__device__ __forceinline__ void for_each_panel(int rows, int columns, unsigned& turn, const Work& work) {
  const int panels = (rows + kPanel - 1) / kPanel, count = panels * columns;
  for (int i = (threadIdx.x - turn) & (blockDim.x - 1); i < count; i += blockDim.x)
    work(Panel{i / columns, panels, rows, i % columns});
  turn = (turn + count) & (blockDim.x - 1);
}

// Sums each of kCount numbers, a power of two, over a warp's lanes. Lane l returns the total of number l / (32 /
// kCount). With each step every lane hands half of its numbers to another one, for half of that one's. numbers:
// overwritten.
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
  // The tile's memory. "-> x": x overwrites the array.
  // clang-format off
  //   pass                      state       delta          value       kappa   hd      first_delta
  //   forward                   out         out            out         unused  unused  unused
  //   backward_phi              in -> hd    in -> kappa    in          unused  unused  unused
  //   second_order without phi  in          in             -> hd       out     unused  unused
  //   second_order              in          in             in          out     out     out: c * delta
  // clang-format on
  // "in" is from `saved` or made again. In backward_phi, kappa is c * delta, and hd is c * value.
  T *state, *delta, *value, *kappa, *hd;  // (units, stride): see combiner_math.h
  T *first_delta, *staged;                // (width of the first layer, stride), (losses, stride)
  int64_t first;                          // sample of this tile
  int samples;                            // in this tile; fewer in the last one

  // Lays out the arrays that a pass has (make_launch). Without phi, hd takes the place of value.
  __device__ __forceinline__ Tile(const CombinerParams<T>& params, const Launch& launch, T* shared)
      : net(params),
        math{params},
        samples_of_tile(launch.samples),
        stride(launch.samples + 1),
        losses(int(params.num_losses)) {
    const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x, array = int64_t(net.units) * stride;
    T* workspace = reinterpret_cast<T*>(static_cast<char*>(net.workspace) + launch.partial_bytes);
    state = launch.shared_bytes ? shared : workspace + block * launch.rows * stride;
    delta = state + array;
    value = delta + array;
    kappa = value + array;
    hd = net.grad_phi ? kappa + array : value;
    first_delta = hd + array;
    staged = state + (launch.rows - (losses <= kMostStagedLosses ? losses : 0)) * stride;
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

  // Writes z[unit, sample] = (W_1 rows^T), together. rows: in, (samples, losses) in global memory; z: out, (width of
  // the first layer, stride), which may be in use until here; staged: overwritten.
  __device__ __forceinline__ void project(const T* rows, T* z) const {
    if (losses <= kMostStagedLosses)
      for (int i = threadIdx.x; i < samples * losses; i += blockDim.x)
        staged[i % losses * stride + i / losses] = rows[i];
    __syncthreads();
    if (losses <= kMostStagedLosses) {
      unsigned turn = 0;
      for_each_panel(net.width[0], samples, turn, [&](const Panel& panel) {
        T sum[kPanel] = {};
        panel.multiply<T>({math.weight(0), losses, 1}, {staged, stride, 1}, losses, sum);
#pragma unroll
        for (int r = 0; r < kPanel; ++r)
          if (panel.has(r)) z[panel.at(r) * stride + panel.column] = sum[r];
      });
    } else {
      project_wide(rows, z);
    }
    __syncthreads();
  }

  // The same for many losses: a warp at a time multiplies kPanel rows of W_1 by two rows, its lanes along the losses.
  __device__ __forceinline__ void project_wide(const T* rows, T* z) const {
    constexpr int kRows = 2, kSums = kRows * kPanel;
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32, width = net.width[0];
    const int unit_panels = (width + kPanel - 1) / kPanel, row_panels = (samples + kRows - 1) / kRows;
    for (int task = threadIdx.x / 32; task < unit_panels * row_panels; task += warps) {
      const Panel units{task / row_panels, unit_panels, width, 0};
      const Panel tile_rows{task % row_panels, row_panels, samples, 0};
      T sum[kSums] = {};  // of unit r and row s: r * kRows + s
      const T* w[kSums];
      const T* x[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        w[i] = math.weight(0) + units.at(i / kRows) * net.num_losses;
        x[i] = rows + tile_rows.at(i % kRows) * net.num_losses;
      }
      for (int k = lane; k < losses; k += 32)
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] += w[i][k] * x[i][k];
      const T total = sum_over_lanes(sum);
      const int i = lane / (32 / kSums);
      if (lane % (32 / kSums) == 0 && units.has(i / kRows) && tile_rows.has(i % kRows))
        z[units.at(i / kRows) * stride + tile_rows.at(i % kRows)] = total;
    }
  }

  // Calls result(unit, factor * projected[unit] + bias[unit]) for the first layer of this thread's sample, a few units
  // at a time so that their activations do not wait for each other.
  template <class Result>
  __device__ __forceinline__ void first_layer(const T* projected, T factor, const T* bias, const Result& result) const {
    in_panels<3>(net.width[0], [&](auto height, int unit) {
      matvec_panel<decltype(height)::value, T>(unit, 1, projected + threadIdx.x, stride, 1, bias, Constant<T>{factor},
                                               result);
    });
  }

  // Makes state, value and delta of every unit.
  __device__ __forceinline__ void activate() const {
    project(rows_of(net.losses), state);
    if (!has_sample()) return;
    const auto first_units = [&](const auto& result) { first_layer(state, T(1), math.bias(0), result); };
    math.forward(first_units, own(state), own(value));
    math.backward(own(state), own(delta));
  }

  // Makes hd and kappa of every unit, from state and delta. tangents: in, (samples, losses) in global memory.
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

  // Reads the first `arrays` of state, delta and value from `saved`, or makes them again. This memory may be in use
  // until here.
  __device__ __forceinline__ void restore(int arrays) const {
    if (!net.saved) return activate();
    __syncthreads();
    copy_saved<false>(arrays * net.units);
    __syncthreads();
  }

  // Calls result(sample, k, (W_1^T units)) for the units of the first layer, together. units: in, (width of the first
  // layer, stride).
  template <class Result>
  __device__ __forceinline__ void for_each_loss(const T* units, const Result& result) const {
    unsigned turn = 0;
    for_each_panel(samples, losses, turn, [&](const Panel& panel) {
      T sum[kPanel] = {};
      panel.multiply<T>({units, 1, stride}, {math.weight(0), net.num_losses, 1}, net.width[0], sum);
#pragma unroll
      for (int r = 0; r < kPanel; ++r)
        if (panel.has(r)) result(panel.at(r), panel.column, sum[r]);
    });
  }
};

}  // namespace auxfast::cuda
