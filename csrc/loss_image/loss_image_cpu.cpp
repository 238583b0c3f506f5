// The loss image on the CPU: chunks of tiles go through row pipelines, and their sums are added in order.
#include "loss_image/loss_image.h"
#include "loss_image/pipeline.h"

namespace auxfast::AUXFAST_ISA {
namespace {

// The workspace: where everything is in it, and the weights in the kernels' order.
template <class T>
struct Workspace {
  double* value_sums;  // (bands, batch)
  double* phi_sums;    // (num_tangents or 1, chunks, num_parameters), in the kernels' order
  PackedWeights<T> packed[kMaxConvolutions][2];

  explicit Workspace(const LossImageParams<T>& net) {
    value_sums = static_cast<double*>(net.workspace);
    phi_sums = value_sums + net.tiles.bands * net.batch;
    const int64_t tangents = net.tangents ? net.num_tangents : 1;
    T* to = reinterpret_cast<T*>(phi_sums + (net.grad_phi ? tangents * net.tiles.chunks * net.num_parameters : 0));
    T pool_scale = T(1);  // the scale of the pool below
    for (int i = 0; i < net.depth; ++i) {
      const int inputs = net.channels[i], outputs = net.channels[i + 1];
      const T* matrix = net.phi + net.weight[i];
      packed[i][0] = pack_weights(matrix, inputs, outputs, to);
      packed[i][1] = pack_transposed(matrix, inputs, outputs, pool_scale, to + net.num_parameters);
      to += int64_t(inputs) * outputs * kTaps;
      pool_scale = T(1) / T(pool_extent(net.height[i]) * pool_extent(net.width[i]));
    }
  }
};

template <class T, class Act, int kStreams>
void run_chunk(const LossImageParams<T>& net, const Workspace<T>& workspace, const Wanted<T>& wanted, int64_t chunk,
               const Executor& executor) {
  if (wanted.phi_sums) std::memset(wanted.phi_sums, 0, size_t(net.num_parameters) * sizeof(double));
  Pipeline<T, Act, kStreams> pipeline(net, workspace.packed, wanted, executor);
  const LossImageTiles& tiles = net.tiles;
  for (int64_t tile = chunk * tiles.count / tiles.chunks; tile < (chunk + 1) * tiles.count / tiles.chunks; ++tile)
    pipeline.run(tile);
  pipeline.finish();
}

// Adds the chunks' sums for phi in order, and puts them into phi's order. chunk_sums: in, (chunks, num_parameters), in
// the kernels' order; out: (num_parameters).
template <class T>
void add_chunks(const LossImageParams<T>& net, const double* chunk_sums, T* out) {
  const auto sum = [&](int64_t at) {
    double total = 0;
    for (int64_t chunk = 0; chunk < net.tiles.chunks; ++chunk) total += chunk_sums[chunk * net.num_parameters + at];
    return T(total);
  };
  for (int i = 0; i < net.depth; ++i) {
    const int inputs = net.channels[i], outputs = net.channels[i + 1];
    for_each_weight(inputs, outputs, [&](int64_t at, int output, int input, int tap) {
      out[net.weight[i] + (int64_t(output) * inputs + input) * kTaps + tap] = sum(net.weight[i] + at);
    });
    for (int c = 0; c < outputs; ++c) out[net.bias[i] + c] = sum(net.bias[i] + c);
  }
  for (int64_t at = net.weight[net.depth]; at < net.num_parameters; ++at) out[at] = sum(at);
}

template <class T, class Act>
void forward(const LossImageParams<T>& net, const Executor& executor) {
  const Workspace<T> workspace(net);
  executor.run(net.tiles.chunks, [&](int64_t chunk) {
    run_chunk<T, Act, 1>(net, workspace, {nullptr, workspace.value_sums, net.grad_losses, nullptr}, chunk, executor);
  });
  double total = 0;
  for (int64_t b = 0; b < net.batch; ++b) {
    double value = 0;
    for (int64_t band = 0; band < net.tiles.bands; ++band) value += workspace.value_sums[band * net.batch + b];
    if (net.per_sample) net.value[b] = T(value);
    total += value;
  }
  if (!net.per_sample) *net.value = T(total * net.scale);
}

template <class T, class Act>
void backward_phi(const LossImageParams<T>& net, const Executor& executor) {
  const Workspace<T> workspace(net);
  executor.run(net.tiles.chunks, [&](int64_t chunk) {
    double* sums = workspace.phi_sums + chunk * net.num_parameters;
    run_chunk<T, Act, 1>(net, workspace, {nullptr, nullptr, nullptr, sums}, chunk, executor);
  });
  add_chunks(net, workspace.phi_sums, net.grad_phi);
}

template <class T, class Act>
void second_order(const LossImageParams<T>& net, const Executor& executor) {
  const Workspace<T> workspace(net);
  const int64_t chunks = net.tiles.chunks;
  const int64_t size = net.batch * net.channels[0] * net.height[0] * net.width[0];
  executor.run(net.num_tangents * chunks, [&](int64_t index) {
    const int64_t at = index / chunks * size;
    double* sums = net.grad_phi ? workspace.phi_sums + index * net.num_parameters : nullptr;
    run_chunk<T, Act, 2>(net, workspace, {net.tangents + at, nullptr, net.grad_losses + at, sums}, index % chunks,
                         executor);
  });
  if (!net.grad_phi) return;
  for (int64_t tangent = 0; tangent < net.num_tangents; ++tangent)
    add_chunks(net, workspace.phi_sums + tangent * chunks * net.num_parameters,
               net.grad_phi + tangent * net.num_parameters);
}

#define AUXFAST_BY_ACTIVATION(function)                         \
  [](const LossImageParams<T>& net, const Executor& executor) { \
    if (net.activation == Activation::softplus)                 \
      function<T, Softplus>(net, executor);                     \
    else                                                        \
      function<T, Identity>(net, executor);                     \
  }
template <class T>
constexpr LossImageKernels<T> kKernels{AUXFAST_BY_ACTIVATION(forward), AUXFAST_BY_ACTIVATION(backward_phi),
                                       AUXFAST_BY_ACTIVATION(second_order)};

}  // namespace

extern const LossImageKernels<float> loss_image_f32 = kKernels<float>;
extern const LossImageKernels<double> loss_image_f64 = kKernels<double>;

}  // namespace auxfast::AUXFAST_ISA
