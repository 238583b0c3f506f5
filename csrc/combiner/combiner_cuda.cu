// The combiner on a GPU: one launch a pass, and one more where the blocks' sums are added. Block x walks the tiles of
// samples x, x + blocks, ...; combiner_cuda_tile.cuh says how it works on one. All sums have an order that the sizes
// alone determine, so that a call gives the same bits each time; nothing waits for the device.
//
// workspace: first the blocks' sums, doubles (blocks) in the forward pass, T (num_tangents, blocks, num_parameters) for
// phi, rounded up to 256 bytes; then, if they do not fit into shared memory, the tiles: T (tangent_blocks, blocks,
// rows, samples + 1). Either stays below kWorkspaceLimit, as far as one block does.
#include "combiner/combiner_cuda_tile.cuh"

namespace auxfast::cuda {

constexpr int kMaxThreads = 256;
constexpr int kBlocksAtOnce = 2;                  // leaves 128 registers; ptxas by itself aims at fewer, and spills
constexpr int kMaxBlocks = 1024;                  // more than any GPU works on at a time
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
template <class T, class Act>
__device__ __forceinline__ void add_to_phi(const Tile<T, Act>& tile, const T* kappa, const T* hd, const T* tangents,
                                           T* sums, bool begin) {
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
  for (int layer = 0; layer < net.depth; ++layer) {
    const int width = net.width[layer], at = net.first_unit[layer] * stride;
    const int inputs = layer ? net.width[layer - 1] : tile.losses;
    const int below = layer ? net.first_unit[layer - 1] * stride : 0;
    const Matrix<T> left{kappa + at, stride, 1}, left2{layer ? tile.delta + at : tile.first_delta, stride, 1};
    const Matrix<T> right =
        layer ? Matrix<T>{tile.value + below, 1, stride} : Matrix<T>{tile.rows_of(net.losses), inputs, 1};
    const Matrix<T> right2 = layer ? Matrix<T>{hd + below, 1, stride} : Matrix<T>{tangents, inputs, 1};
    for_each_panel(width, inputs, turn, [&](const Panel& panel) {
      T sum[kPanel] = {};
      panel.multiply(left, right, samples, sum);
      if (tangents) panel.multiply(left2, right2, samples, sum);
#pragma unroll
      for (int r = 0; r < kPanel; ++r)
        if (panel.has(r)) add(net.weight[layer] + int64_t(panel.at(r)) * inputs + panel.column, sum[r]);
    });
    if (net.bias[layer] >= 0) add_units(kappa + at, width, net.bias[layer]);
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
    add_to_phi<T, Act>(tile, kappa, hd, nullptr, sums, index == blockIdx.x);
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
      add_to_phi<T, Act>(tile, tile.kappa, tile.hd, net.tangents + at, sums, index == blockIdx.x);
    }
  }
}

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

template <class T>
using Kernel = void (*)(CombinerParams<T>, Launch);

template <class T>
const char* launch_pass(Kernel<T> softplus, Kernel<T> identity, const CombinerParams<T>& net, const Launch& launch,
                        void* stream) {
  if (net.num_losses > kMaxLosses) return "more than 2^26 losses";
  const Kernel<T> kernel = net.activation == Activation::softplus ? softplus : identity;
  LAUNCH(kernel, grid_of(launch.blocks, launch.tangent_blocks), dim3(unsigned(launch.threads)),
         size_t(launch.shared_bytes), stream, net, launch);
  return launch_error();
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
  const Launch launch = make_launch(net);
  const int64_t tile_bytes = int64_t(sizeof(T)) * launch.rows * (launch.samples + 1);
  return launch.partial_bytes + (launch.shared_bytes ? 0 : int64_t(launch.blocks) * launch.tangent_blocks * tile_bytes);
}

template <class T>
const char* forward(const CombinerParams<T>& net, void* stream) {
  const Launch launch = make_launch(net);
  const char* error = launch_pass<T>(forward_kernel<T, Softplus>, forward_kernel<T, Identity>, net, launch, stream);
  if (error || net.per_sample) return error;
  return add_blocks(static_cast<const double*>(net.workspace), 1, launch.blocks, 1, net.scale, net.value, stream);
}

template <class T>
const char* backward_phi(const CombinerParams<T>& net, void* stream) {
  const Launch launch = make_launch(net);
  const char* error =
      launch_pass<T>(backward_phi_kernel<T, Softplus>, backward_phi_kernel<T, Identity>, net, launch, stream);
  if (error) return error;
  return add_blocks(static_cast<const T*>(net.workspace), 1, launch.blocks, net.num_parameters, T(1), net.grad_phi,
                    stream);
}

template <class T>
const char* second_order(const CombinerParams<T>& net, void* stream) {
  const Launch launch = make_launch(net);
  const char* error =
      launch_pass<T>(second_order_kernel<T, Softplus>, second_order_kernel<T, Identity>, net, launch, stream);
  if (error || !net.grad_phi) return error;
  return add_blocks(static_cast<const T*>(net.workspace), net.num_tangents, launch.blocks, net.num_parameters, T(1),
                    net.grad_phi, stream);
}

template <class T>
constexpr CombinerCudaKernels<T> kKernels{
    {workspace_bytes<T>, forward<T>}, {workspace_bytes<T>, backward_phi<T>}, {workspace_bytes<T>, second_order<T>}};
extern const CombinerCudaKernels<float> combiner_f32 = kKernels<float>;
extern const CombinerCudaKernels<double> combiner_f64 = kKernels<double>;

}  // namespace auxfast::cuda
