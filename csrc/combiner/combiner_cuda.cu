// The combiner on a GPU: one launch a pass, and one more where the blocks' sums are added. Block x walks the tiles of
// samples x, x + blocks, ...; combiner_cuda_tile.cuh says how it works on one, and combiner_cuda_small.cuh for small
// networks in float32, which have kernels of their own. All sums have an order that the sizes alone determine, so that
// a call gives the same bits each time; nothing waits for the device.
//
// workspace: first the blocks' sums, doubles (blocks) in the forward pass, T (num_tangents, blocks, num_parameters) for
// phi, rounded up to 256 bytes; then, if they do not fit into shared memory, the tiles: T (tangent_blocks, blocks,
// rows, samples + 1). Either stays below kWorkspaceLimit, as far as one block does.
#include <algorithm>

#include "combiner/combiner_cuda_small.cuh"
#include "combiner/combiner_cuda_tile.cuh"

namespace auxfast::cuda {

constexpr int kMaxThreads = 256;
constexpr int kBlocksAtOnce = 2;                  // leaves 128 registers; ptxas by itself aims at fewer, and spills
constexpr int kMaxBlocks = 1024;                  // more than any GPU works on at a time
constexpr int kMaxSmallThreads = 128;             // of a block for a small network
constexpr int kSmallBlocksAtOnce = 4;             // leaves 128 registers, see kBlocksAtOnce
constexpr int kSmallTiles = 4;                    // of a block share one layout of phi, where there are many blocks
constexpr int64_t kManySamples = 1 << 14;         // fill a GPU with one lane a sample
constexpr int64_t kSharedLimit = 48 << 10;        // of a block, without asking the device for more
constexpr int64_t kWorkspaceLimit = 64 << 20;     // for the blocks' sums, and for the tiles: fewer blocks keep to it
constexpr int64_t kMaxLosses = int64_t(1) << 26;  // so that indices within a tile fit into 32 bits
static_assert(kMaxLosses * ((kMaxWidth + kPanel - 1) / kPanel) + kMaxThreads <= INT32_MAX, "panels of W_1");
static_assert(kMaxLosses * ((32 + kPanel - 1) / kPanel) + kMaxThreads <= INT32_MAX, "panels of a tile's losses");

// Few samples are spread over many blocks, many samples fill warps. Summing for phi reads across samples, which only
// shared memory is good at: tiles then shrink to fit.
template <class T>
Launch make_launch(const CombinerParams<T>& net) {
  const bool with_phi = net.grad_phi != nullptr, second_order = net.num_tangents > 0,
             narrow = net.num_losses <= kMostStagedLosses;
  Launch launch{};
  launch.rows = 3 * net.units + (narrow ? int(net.num_losses) : 0);  // state, delta, value; staged losses
  if (second_order) launch.rows += with_phi ? 2 * net.units + net.width[0] : net.units;  // kappa; hd, first_delta
  const auto tile_bytes = [&](int samples) { return int64_t(sizeof(T)) * launch.rows * (samples + 1); };
  const int samples = net.batch <= 2048 ? 8 : net.batch <= 4096 ? 16 : 32;
  launch.samples = samples;
  while (with_phi && launch.samples > 8 && tile_bytes(launch.samples) > kSharedLimit) launch.samples /= 2;
  const bool shared = tile_bytes(launch.samples) <= kSharedLimit;
  if (!shared) launch.samples = samples;
  launch.shared_bytes = shared ? tile_bytes(launch.samples) : 0;
  launch.threads = narrow ? kMaxThreads / 2 : kMaxThreads;
  launch.tiles = (net.batch + launch.samples - 1) / launch.samples;

  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t most = shared ? kMaxBlocks : least(kMaxBlocks, kWorkspaceLimit / tile_bytes(launch.samples));
  const int64_t tangents = second_order ? net.num_tangents : 1;
  const int64_t block_sums = with_phi ? tangents * net.num_parameters * int64_t(sizeof(T)) : int64_t(sizeof(double));
  const int64_t affordable = kWorkspaceLimit / block_sums;
  launch.blocks = int(least(least(launch.tiles, most), affordable > 1 ? affordable : 1));
  launch.tangent_blocks = int(least(tangents, most / launch.blocks));
  if (with_phi || (!second_order && !net.per_sample))
    launch.partial_bytes = (launch.blocks * block_sums + 255) / 256 * 256;
  return launch;
}

// Writes the blocks' sums of values to the workspace, (blocks), unless every sample has a value of its own.
template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce)
    forward_kernel(const CombinerParams<T> net, const Launch launch) {
  DYNAMIC_SHARED(T, shared);
  Tile<T, Act> tile(net, launch, shared);
  const int main_loss = int(net.main_loss);
  double total = 0;
  for (int64_t index = blockIdx.x; index < launch.tiles; index += launch.blocks) {
    tile.begin(index);
    tile.activate();
    if (tile.has_sample()) {
      T g = tile.math.output(tile.own(tile.value));
      if (net.main_loss >= 0) g += tile.rows_of(net.losses)[threadIdx.x * net.num_losses + net.main_loss];
      if (net.per_sample) net.value[tile.first + threadIdx.x] = g;
      total += double(g);
    }
    __syncthreads();
    if (net.saved) tile.template copy_saved<true>(3 * net.units);
    T* weights = net.grad_losses + tile.first * net.num_losses;
    tile.for_each_loss(tile.delta, [&](int sample, int k, T sum) {
      weights[sample * net.num_losses + k] = net.scale * (k == main_loss ? sum + T(1) : sum);
    });
  }
  if (net.per_sample || threadIdx.x >= 32) return;
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_down_sync(kAllLanes, total, distance);
  if (threadIdx.x == 0) static_cast<double*>(net.workspace)[blockIdx.x] = total;
}

// Adds a tile's derivatives in phi to the block's sums, in and out: (num_parameters), or begins them:
//   W_i: kappa h_{i-1}^T + delta hd_{i-1}^T, b_i: kappa, w: the last layer's hd, each summed over the tile's samples.
// Without tangents, kappa is c delta and hd's last layer c value. For W_1, h_0 are the losses, hd_0 are the tangents,
// and first_delta stands for delta.
template <class T, class AnyTile>
__device__ __forceinline__ void add_to_phi(const AnyTile& tile, const T* kappa, const T* hd, const T* tangents, T* sums,
                                           bool begin) {
  const CombinerParams<T>& net = tile.net;
  const int stride = tile.stride, samples = tile.samples;
  unsigned turn = 0;
  const auto add = [&](int64_t at, T sum) { sums[at] = begin ? sum : sums[at] + sum; };
  const auto add_units = [&](const T* units, int width, int64_t at) {
    for_each_panel(1, width, turn, [&](const Panel& panel) {
      T sum = 0;
      for (int s = 0; s < samples; ++s) sum += units[panel.column * stride + s];
      add(at + panel.column, sum);
    });
  };
  // right, right2: h_{i-1} and hd_{i-1}, an input's numbers of all samples being a column.
  const auto add_layer = [&](int layer, int inputs, const Matrix<T>& right, const Matrix<T>& right2) {
    const int width = net.width[layer], at = net.first_unit[layer] * stride;
    const Matrix<T> left{kappa + at, stride, 1}, left2{layer ? tile.delta + at : tile.first_delta, stride, 1};
    for_each_panel(width, inputs, turn, [&](const Panel& panel) {
      T sum[kPanel] = {};
      panel.multiply(left, right, samples, sum);
      if (tangents) panel.multiply(left2, right2, samples, sum);
#pragma unroll
      for (int r = 0; r < kPanel; ++r)
        if (panel.has(r)) add(net.weight[layer] + int64_t(panel.at(r)) * inputs + panel.column, sum[r]);
    });
    if (net.bias[layer] >= 0) add_units(kappa + at, width, net.bias[layer]);
  };
  // The first layer apart: the compiler knows then that the other ones read shared memory, number by number.
  add_layer(0, tile.losses, {tile.rows_of(net.losses), tile.losses, 1}, {tangents, tile.losses, 1});
  for (int layer = 1; layer < net.depth; ++layer) {
    const int below = net.first_unit[layer - 1] * stride;
    add_layer(layer, net.width[layer - 1], {tile.value + below, 1, stride}, {hd + below, 1, stride});
  }
  const int last = net.depth - 1;
  add_units(hd + net.first_unit[last] * stride, net.width[last], net.weight[net.depth]);
}

// Writes the blocks' sums of c d g / d phi to the workspace, (blocks, num_parameters).
template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce)
    backward_phi_kernel(const CombinerParams<T> net, const Launch launch) {
  DYNAMIC_SHARED(T, shared);
  Tile<T, Act> tile(net, launch, shared);
  T* sums = static_cast<T*>(net.workspace) + blockIdx.x * net.num_parameters;
  for (int64_t index = blockIdx.x; index < launch.tiles; index += launch.blocks) {
    tile.begin(index);
    tile.restore(3);
    T *kappa = tile.delta, *hd = tile.state;  // they take the place of what is no longer needed
    if (tile.has_sample()) {
      const T c = tile.incoming();
      for (int unit = 0; unit < net.units; ++unit) tile.own(kappa)[unit] = c * tile.own(tile.delta)[unit];
      for (int unit = net.first_unit[net.depth - 1]; unit < net.units; ++unit)
        tile.own(hd)[unit] = c * tile.own(tile.value)[unit];
    }
    __syncthreads();
    add_to_phi<T>(tile, kappa, hd, nullptr, sums, index == blockIdx.x);
  }
}

// Writes the blocks' sums of c d <d g / d l, t> / d phi to the workspace, (num_tangents, blocks, num_parameters), if
// asked for.
template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce)
    second_order_kernel(const CombinerParams<T> net, const Launch launch) {
  DYNAMIC_SHARED(T, shared);
  const bool with_phi = net.grad_phi != nullptr;
  Tile<T, Act> tile(net, launch, shared);
  for (int64_t index = blockIdx.x; index < launch.tiles; index += launch.blocks) {
    tile.begin(index);
    tile.restore(with_phi ? 3 : 2);
    if (with_phi && tile.has_sample()) {  // c delta: the one place where the tangent's own c is still missing
      const T c = tile.incoming();
      for (int unit = 0; unit < net.width[0]; ++unit) tile.own(tile.first_delta)[unit] = c * tile.own(tile.delta)[unit];
    }
    for (int64_t tangent = blockIdx.y; tangent < net.num_tangents; tangent += launch.tangent_blocks) {
      const int64_t at = (tangent * net.batch + tile.first) * net.num_losses;
      tile.second_order(net.tangents + at);
      __syncthreads();
      T* grad_losses = net.grad_losses + at;
      tile.for_each_loss(tile.kappa, [&](int sample, int k, T sum) { grad_losses[sample * net.num_losses + k] = sum; });
      if (!with_phi) continue;
      T* sums = static_cast<T*>(net.workspace) + (tangent * launch.blocks + blockIdx.x) * net.num_parameters;
      add_to_phi<T>(tile, tile.kappa, tile.hd, net.tangents + at, sums, index == blockIdx.x);
    }
  }
}

// -------------------------------------------------------------------------------------------- the same, small networks

// Does what forward_kernel does.
template <int kUnits, int kLanes>
__global__ void __launch_bounds__(kMaxSmallThreads, kSmallBlocksAtOnce)
    small_forward_kernel(const CombinerParams<float> net, const SmallLaunch launch) {
  DYNAMIC_SHARED(float, shared);
  STATIC_SHARED(double, warp_totals, [kMaxSmallThreads / 32]);
  SmallTile<kUnits, kLanes, false> tile(net, launch, shared);
  tile.fetch_phi();
  double total = 0;
  for (int64_t index = blockIdx.x; index < launch.tiles; index += launch.blocks) {
    tile.begin(index);
    tile.stage(net.losses);
    tile.wait_for_stage();
    if (index == blockIdx.x) tile.arrange_phi();
    const float g = tile.activate(net.saved) + (net.main_loss >= 0 ? tile.staged[net.main_loss] : 0.0f);
    if (tile.part == 0 && tile.has_sample()) {
      if (net.per_sample) net.value[tile.first + tile.sample] = g;
      total += double(g);
    }
    tile.backward(net.saved);
    tile.write_losses(tile.delta, net.grad_losses,
                      [&](int k, float sum) { return net.scale * (k == net.main_loss ? sum + 1.0f : sum); });
  }
  if (net.per_sample) return;
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_down_sync(kAllLanes, total, distance);
  if (tile.lane == 0) warp_totals[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) total += warp_totals[warp];
  static_cast<double*>(net.workspace)[blockIdx.x] = total;
}

// Makes state, delta and value of a tile, or begins to fetch the first `arrays` of them from `saved`; the first tile of
// a block waits for phi too.
template <class Tile>
__device__ __forceinline__ void restore_small(const Tile& tile, int arrays, bool is_first) {
  if (tile.net.saved)
    tile.fetch_saved(arrays);
  else
    tile.stage(tile.net.losses);
  if (!is_first && tile.net.saved) return;
  tile.wait_for_stage();
  if (is_first) tile.arrange_phi();
  if (tile.net.saved) return;
  tile.activate(false);
  tile.backward(false);
}

// Does what backward_phi_kernel does.
template <int kUnits, int kLanes>
__global__ void __launch_bounds__(kMaxSmallThreads, kSmallBlocksAtOnce)
    small_backward_phi_kernel(const CombinerParams<float> net, const SmallLaunch launch) {
  DYNAMIC_SHARED(float, shared);
  SmallTile<kUnits, kLanes, true> tile(net, launch, shared);
  float *kappa = tile.delta, *hd = tile.state;  // they take the place of what is no longer needed
  float* sums = static_cast<float*>(net.workspace) + blockIdx.x * net.num_parameters;
  tile.fetch_phi();
  for (int64_t index = blockIdx.x; index < launch.tiles; index += launch.blocks) {
    tile.begin(index);
    const float c = tile.incoming();
    restore_small(tile, 3, index == blockIdx.x);
    tile.wait_for_stage();
    tile.scale(c, 0, net.depth, tile.delta, kappa);
    tile.scale(c, net.depth - 1, net.depth, tile.value, hd);
    __syncthreads();
    add_to_phi<float>(tile, kappa, hd, nullptr, sums, index == blockIdx.x);
    __syncthreads();
  }
}

// Does what second_order_kernel does.
template <int kUnits, int kLanes, bool kPhi>
__global__ void __launch_bounds__(kMaxSmallThreads, kSmallBlocksAtOnce)
    small_second_order_kernel(const CombinerParams<float> net, const SmallLaunch launch) {
  DYNAMIC_SHARED(float, shared);
  SmallTile<kUnits, kLanes, kPhi> tile(net, launch, shared);
  tile.fetch_phi();
  for (int64_t index = blockIdx.x; index < launch.tiles; index += launch.blocks) {
    tile.begin(index);
    const float c = tile.incoming();
    for (int64_t tangent = blockIdx.y; tangent < net.num_tangents; tangent += launch.tangent_blocks) {
      const int64_t at = tangent * net.batch * net.num_losses;
      const bool is_first = tangent == blockIdx.y;
      if (net.saved) tile.stage(net.tangents + at);
      if (!kPhi || is_first) restore_small(tile, kPhi ? 3 : 2, is_first && index == blockIdx.x);
      if (!net.saved) tile.stage(net.tangents + at);
      tile.wait_for_stage();
      if (kPhi && is_first)  // the one place where the tangent's own c is still missing
        tile.scale(c, 0, 1, tile.delta, tile.first_delta);
      tile.second_order(c);
      tile.write_losses(tile.kappa, net.grad_losses + at, [](int, float sum) { return sum; });
      if constexpr (!kPhi) continue;
      __syncthreads();
      float* sums = static_cast<float*>(net.workspace) + (tangent * launch.blocks + blockIdx.x) * net.num_parameters;
      add_to_phi<float>(tile, tile.kappa, tile.hd, net.tangents + at + tile.first * net.num_losses, sums,
                        index == blockIdx.x);
      __syncthreads();
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ launches

// out[row, e] = scale * the sum over the blocks of block_sums[row, block, e]. block_sums: in, (rows, blocks, count);
// out: (rows, count). 32 threads share an entry.
template <class Sum, class T>
__global__ void __launch_bounds__(1024)
    sum_kernel(const Sum* block_sums, int64_t rows, int blocks, int64_t count, T scale, T* out) {
  STATIC_SHARED(double, sums, [32][33]);
  const int64_t entry = int64_t(blockIdx.x) * 32 + threadIdx.x;
  double sum = 0;
  if (entry < rows * count) {
    const Sum* from = block_sums + entry / count * blocks * count + entry % count;
    for (int block = threadIdx.y; block < blocks; block += 32) sum += double(from[block * count]);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || entry >= rows * count) return;
  for (int share = 1; share < 32; ++share) sum += sums[share][threadIdx.x];
  out[entry] = T(double(scale) * sum);
}

// The launch of a pass by the kernels for small networks; lanes is 0 if they do not take it.
SmallLaunch make_small_launch(const CombinerParams<float>& net) {
  SmallLaunch launch{};
  const int widest = *std::max_element(net.width, net.width + net.depth);
  if (net.num_losses > kMostSmall || widest > kMostSmall) return launch;
  const bool with_phi = net.grad_phi != nullptr, second_order = net.num_tangents > 0;
  const int losses = int(net.num_losses);
  const bool one_lane = widest <= 16 && !with_phi && net.batch >= kManySamples;
  const int lanes = one_lane ? 1 : widest <= 16 ? 4 : 8;
  launch.units = !one_lane || widest <= 4 ? 4 : widest <= 10 ? 10 : 16;

  int floats = 0;
  const auto take = [&](int64_t count) {
    const int at = floats;
    floats += int((count + 3) / 4 * 4);
    return at;
  };
  const int row = lanes * padded_units(launch.units), units = lanes * launch.units;
  launch.first_row = (losses + units - 1) / units * row;
  for (int layer = 0; layer < net.depth; ++layer) {
    const int inputs = layer ? net.width[layer - 1] : losses;
    launch.inverse[layer] = inverse_of(inputs);
    launch.up[layer] = take(inputs * row);
    launch.down[layer] = take(net.width[layer] * (layer ? row : launch.first_row));
    launch.bias[layer] = take(row);
  }
  launch.out = take(row);
  launch.phi = take(net.num_parameters);
  launch.arrays = floats;
  for (int threads = kMaxSmallThreads; threads >= 32; threads /= 2) {
    floats = launch.arrays;
    launch.samples = threads / lanes;
    launch.stride = launch.samples + 8 / lanes;  // see small_stride
    if (with_phi)                                // state, delta, value; kappa, hd, first_delta
      take(int64_t(launch.stride) * (3 * net.units + (second_order ? 2 * net.units + net.width[0] : 0)));
    else  // state, delta; hd
      take(threads / 32 * small_stride(lanes) * int64_t(units) * (2 * net.depth + second_order * hd_layers(lanes)));
    launch.staged = take(launch.samples * (losses | 1));
    launch.shared_bytes = int64_t(sizeof(float)) * floats;
    if (launch.shared_bytes <= kSharedLimit - kMaxSmallThreads / 32 * int64_t(sizeof(double))) {
      launch.lanes = lanes;
      break;
    }
  }
  if (launch.lanes == 0) return launch;

  launch.tiles = (net.batch + launch.samples - 1) / launch.samples;
  const int64_t tangents = second_order ? net.num_tangents : 1;
  const int64_t block_sums =
      with_phi ? tangents * net.num_parameters * int64_t(sizeof(float)) : int64_t(sizeof(double));
  const int64_t most = with_phi ? std::min<int64_t>(kMaxBlocks, kWorkspaceLimit / block_sums)
                                : std::max<int64_t>(kMaxBlocks, launch.tiles / kSmallTiles);
  launch.blocks = int(std::max<int64_t>(1, std::min(launch.tiles, most)));
  launch.tangent_blocks = int(std::min<int64_t>(tangents, std::max<int64_t>(1, most / launch.blocks)));
  if (with_phi || (!second_order && !net.per_sample))
    launch.partial_bytes = (launch.blocks * block_sums + 255) / 256 * 256;
  return launch;
}

const char* launch_small(Pass pass, const CombinerParams<float>& net, const SmallLaunch& launch, void* stream) {
  void (*kernel)(CombinerParams<float>, SmallLaunch) = nullptr;
  const auto choose = [&](auto units, auto lanes) {
    constexpr int kUnits = decltype(units)::value, kLanes = decltype(lanes)::value;
    if constexpr (kLanes > 1) {
      if (pass == Pass::backward_phi) kernel = small_backward_phi_kernel<kUnits, kLanes>;
      if (pass == Pass::second_order && net.grad_phi) kernel = small_second_order_kernel<kUnits, kLanes, true>;
    }
    if (pass == Pass::forward) kernel = small_forward_kernel<kUnits, kLanes>;
    if (!kernel) kernel = small_second_order_kernel<kUnits, kLanes, false>;
  };
  using std::integral_constant;
  if (launch.lanes == 8)
    choose(integral_constant<int, 4>{}, integral_constant<int, 8>{});
  else if (launch.lanes == 4)
    choose(integral_constant<int, 4>{}, integral_constant<int, 4>{});
  else if (launch.units == 4)
    choose(integral_constant<int, 4>{}, integral_constant<int, 1>{});
  else if (launch.units == 10)
    choose(integral_constant<int, 10>{}, integral_constant<int, 1>{});
  else
    choose(integral_constant<int, 16>{}, integral_constant<int, 1>{});
  LAUNCH(kernel, grid_of(launch.blocks, launch.tangent_blocks), dim3(unsigned(launch.samples * launch.lanes)),
         size_t(launch.shared_bytes), stream, net, launch);
  return launch_error();
}

template <class T>
using Kernel = void (*)(CombinerParams<T>, Launch);

struct Launched {
  const char* error;  // nullptr, or CUDA's message
  int blocks;         // that left sums in the workspace
};

// Launches the kernels for small networks, or else one of these two.
template <class T>
Launched launch_pass(Pass pass, Kernel<T> softplus, Kernel<T> identity, const CombinerParams<T>& net, void* stream) {
  const bool is_softplus = net.activation == Activation::softplus;
  if constexpr (std::is_same_v<T, float>)
    if (const SmallLaunch small = make_small_launch(net); small.lanes > 0)
      return {launch_small(pass, net, small, stream), small.blocks};
  if (net.num_losses > kMaxLosses) return {"more than 2^26 losses", 0};
  const Launch launch = make_launch(net);
  const Kernel<T> kernel = is_softplus ? softplus : identity;
  LAUNCH(kernel, grid_of(launch.blocks, launch.tangent_blocks), dim3(unsigned(launch.threads)),
         size_t(launch.shared_bytes), stream, net, launch);
  return {launch_error(), launch.blocks};
}

// Launches sum_kernel.
template <class Sum, class T>
const char* add_blocks(const Sum* block_sums, int64_t rows, int blocks, int64_t count, T scale, T* out, void* stream) {
  LAUNCH((sum_kernel<Sum, T>), grid_of((rows * count + 31) / 32), dim3(32, 32), 0, stream, block_sums, rows, blocks,
         count, scale, out);
  return launch_error();
}

template <class T>
int64_t workspace_bytes(const CombinerParams<T>& net) {
  if constexpr (std::is_same_v<T, float>)
    if (const SmallLaunch small = make_small_launch(net); small.lanes > 0) return small.partial_bytes;
  const Launch launch = make_launch(net);
  const int64_t tile_bytes = int64_t(sizeof(T)) * launch.rows * (launch.samples + 1);
  return launch.partial_bytes + (launch.shared_bytes ? 0 : int64_t(launch.blocks) * launch.tangent_blocks * tile_bytes);
}

template <class T>
const char* forward(const CombinerParams<T>& net, void* stream) {
  const auto [error, blocks] =
      launch_pass<T>(Pass::forward, forward_kernel<T, Softplus>, forward_kernel<T, Identity>, net, stream);
  if (error || net.per_sample) return error;
  return add_blocks(static_cast<const double*>(net.workspace), 1, blocks, 1, net.scale, net.value, stream);
}

template <class T>
const char* backward_phi(const CombinerParams<T>& net, void* stream) {
  const auto [error, blocks] = launch_pass<T>(Pass::backward_phi, backward_phi_kernel<T, Softplus>,
                                              backward_phi_kernel<T, Identity>, net, stream);
  if (error) return error;
  return add_blocks(static_cast<const T*>(net.workspace), 1, blocks, net.num_parameters, T(1), net.grad_phi, stream);
}

template <class T>
const char* second_order(const CombinerParams<T>& net, void* stream) {
  const auto [error, blocks] = launch_pass<T>(Pass::second_order, second_order_kernel<T, Softplus>,
                                              second_order_kernel<T, Identity>, net, stream);
  if (error || !net.grad_phi) return error;
  return add_blocks(static_cast<const T*>(net.workspace), net.num_tangents, blocks, net.num_parameters, T(1),
                    net.grad_phi, stream);
}

template <class T>
constexpr CombinerCudaKernels<T> kKernels{
    {workspace_bytes<T>, forward<T>}, {workspace_bytes<T>, backward_phi<T>}, {workspace_bytes<T>, second_order<T>}};
extern const CombinerCudaKernels<float> combiner_f32 = kKernels<float>;
extern const CombinerCudaKernels<double> combiner_f64 = kKernels<double>;

}  // namespace auxfast::cuda
