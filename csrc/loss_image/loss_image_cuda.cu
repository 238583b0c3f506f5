// The loss image on a GPU: chunk by chunk and layer by layer, every layer a few launches. All sums have an order that
// the sizes and the device's memory determine, so that a call gives the same bits each time; nothing waits for the
// device.
#include <type_traits>

#include "loss_image/loss_image_cuda_chunks.cuh"
#include "loss_image/loss_image_cuda_convolution.cuh"
#include "loss_image/loss_image_cuda_sums.cuh"

namespace auxfast::cuda {

// Launches on a stream until one fails.
struct Launcher {
  void* stream;
  const char* error = nullptr;

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), dim3 grid, const Arguments&... arguments) {
    if (error) return;
    LAUNCH(kernel, grid, dim3(kSumThreads), 0, stream, arguments...);
    error = launch_error();
  }
  // Runs a thread for each of `count`.
  template <class... Parameters, class... Arguments>
  void run_over(int64_t count, void (*kernel)(Parameters...), const Arguments&... arguments) {
    run(kernel, grid_of((count + kSumThreads - 1) / kSumThreads), arguments...);
  }
};

// The network with a chunk's images alone.
template <class T>
LossImageParams<T> images_from(LossImageParams<T> net, int64_t first) {
  const int64_t at = first * net.channels[0] * net.height[0] * net.width[0];
  net.losses += at;
  if (net.main_weights) net.main_weights += first;
  if (net.grad) net.grad += first * net.grad_stride;
  if (net.tangents) net.tangents += at;
  if (net.grad_losses) net.grad_losses += at;
  return net;
}

// The steps of the passes, for one chunk.
template <class T, class Act>
struct ChunkSteps {
  const LossImageParams<T> net;  // with the chunk's images
  const Chunk& chunk;
  const Workspace<T>& workspace;
  Launcher& launcher;
  ChunkPlanes<T> planes;

  ChunkSteps(const LossImageParams<T>& all, const Chunk& chunk, const Workspace<T>& workspace, Launcher& launcher)
      : net(images_from(all, chunk.first_image)),
        chunk(chunk),
        workspace(workspace),
        launcher(launcher),
        planes(net, chunk, workspace.planes) {}

  T pool_scale(int i) const { return T(1) / T(pool_extent(net.height[i]) * pool_extent(net.width[i])); }
  // Factor of one entry of h_depth in g, without w.
  T pixel_scale() const { return net.position_scale / pool_scale(net.depth - 1); }

  // Calls run(panel) with how many of the outputs a thread shall compute, known to the compiler.
  template <class Run>
  static void with_panel(int outputs, const Run& run) {
    if (outputs == kManyOutputs<T>)
      run(std::integral_constant<int, kManyOutputs<T>>());
    else
      run(std::integral_constant<int, kFewOutputs>());
  }

  // Many outputs a thread share what it reads of the inputs; few make more blocks where there are not enough.
  template <class Finish>
  void run_convolution(const Convolution<T>& work, const Finish& finish) {
    const int64_t tiles = chunk.images * work.tiling.tiles();
    const int most = panel<T>(work.outputs);
    const bool busy = tiles * panels_of(work.outputs, most) >= kBusyBlocks;
    with_panel(busy ? most : kFewOutputs, [&](auto panel) {
      launcher.run(convolution_kernel<T, panel.value, Finish>, grid_of(tiles, panels_of(work.outputs, panel.value)),
                   work, finish);
    });
  }

  // Convolves `in`, which is h_{i-1} or hd_{i-1}, and finishes z_i or zd_i.
  template <class Finish>
  void convolve(int i, const Planes<const T>& in, const Finish& finish) {
    const int inputs = net.channels[i - 1];
    const Weights<T> weights{net.phi + net.weight[i - 1], inputs * kTaps, kTaps, false};
    const Rows rows = planes.h[i].rows.times(pool_extent(net.height[i - 1]));
    const int32_t width = pool_extent(net.width[i - 1]) * net.width[i];
    run_convolution({in, weights, inputs, net.channels[i], {rows, width}}, finish);
  }

  // Convolves `in`, which is e_i or kappa_i, with the transposed kernels, and finishes what reaches `rows` of h_{i-1}.
  template <class Finish>
  void convolve_back(int i, const Planes<T>& in, Rows rows, const Finish& finish) {
    const int outputs = net.channels[i - 1];
    const Weights<T> weights{net.phi + net.weight[i - 1], kTaps, outputs * kTaps, true};
    const Planes<const T> known = in.only(planes.back[i].times(pool_extent(net.height[i - 1]))).to_read();
    run_convolution({known, weights, net.channels[i], outputs, {rows, net.width[i - 1]}}, finish);
  }

  // Makes h and, for a way back, the state and the last layer's e.
  void activate() {
    const bool goes_back = net.grad_losses || net.grad_phi;
    for (int i = 1; i <= net.depth; ++i) {
      const T* bias = net.phi + net.bias[i - 1];
      T* e = goes_back && i == net.depth ? planes.e[i].data : nullptr;
      T* state = goes_back && e != planes.state[i].data ? planes.state[i].data : nullptr;
      convolve(i, planes.h[i - 1],
               Activate<T, Act>{net, bias, pool_scale(i - 1), planes.new_h[i], planes.state[i], state, e});
    }
  }

  // Makes what `activate` makes, of what the forward pass saved if it did.
  void activate_again() {
    if (!net.saved) return activate();
    const int depth = net.depth;
    const Planes<T>& state = planes.state[depth];
    const int channels = net.channels[depth];
    launcher.run(last_e_kernel<T, Act>, grid_of(chunk.images * channels, sum_parts(net, depth)), net, state.to_read(),
                 state_size(net, depth), planes.e[depth].data);
  }

  // Makes hd, zd, and the last layer's kappa.
  void activate_tangent() {
    for (int i = 1; i <= net.depth; ++i)
      convolve(i, planes.hd[i - 1],
               ActivateTangent<T, Act>{pool_scale(i - 1), i == net.depth, planes.new_hd[i], planes.zd[i],
                                       planes.state[i].data, planes.e[i].data});
  }

  // Makes the other layers' e, or their kappa.
  void go_back(bool with_tangent) {
    for (int i = net.depth; i > 1; --i) {
      const bool rows = pool_extent(net.height[i - 2]) > 1, columns = pool_extent(net.width[i - 2]) > 1;
      if (rows && columns)
        go_back_from<2, 2>(i, with_tangent);
      else if (rows)
        go_back_from<2, 1>(i, with_tangent);
      else if (columns)
        go_back_from<1, 2>(i, with_tangent);
      else
        go_back_from<1, 1>(i, with_tangent);
    }
  }
  template <int kPoolRows, int kPoolColumns>
  void go_back_from(int i, bool with_tangent) {
    T* zd = with_tangent ? planes.zd[i - 1].data : nullptr;
    convolve_back(
        i, with_tangent ? planes.zd[i] : planes.e[i], planes.back[i - 1],
        Unpool<T, Act, kPoolRows, kPoolColumns>{pool_scale(i - 2), planes.state[i - 1], planes.e[i - 1].data, zd});
  }

  void store_gradient(T* grad_losses, const Planes<T>& first, int main_loss) {
    const Planes<T> gradient = planes_of(grad_losses, net.channels[0], {0, net.height[0]}, net.width[0], net.width[0]);
    convolve_back(1, first, chunk.owned[0], StoreGradient<T>{net, gradient, main_loss});
  }

  // Sums layer i's planes, `from`, over the rows that the chunk owns.
  PlaneSums sum_planes(int i, const Planes<const T>& from, int channels, double* sums) {
    const int parts = sum_parts(net, i);
    launcher.run(plane_sums_kernel<T>, grid_of(chunk.images * channels, parts), from.only(chunk.owned[i]), channels,
                 sums);
    return {sums, parts};
  }

  void add_values() {
    const int depth = net.depth;
    const PlaneSums of_h = sum_planes(depth, planes.h[depth], net.channels[depth], workspace.plane_sums);
    PlaneSums of_main{};
    if (net.main_loss >= 0) {
      Planes<const T> main = planes.h[0];
      main.data += net.main_loss * main.channel_stride;
      of_main = sum_planes(0, main, 1, workspace.main_sums);
    }
    launcher.run_over(chunk.images * 32, image_values_kernel<T>, net, chunk.images, of_h, of_main, pixel_scale(),
                      chunk.band == 0, workspace.values + chunk.first_image);
  }

  void add_to_phi(bool with_tangent, double* sums) {
    for (int i = 1; i <= net.depth; ++i) {
      const Rows rows = chunk.owned[i].times(pool_extent(net.height[i - 1]));
      WeightGradient<T> work{planes.e[i].to_read(), planes.h[i - 1], nullptr, nullptr,
                             net.channels[i - 1],   net.channels[i], {},      0};
      if (with_tangent) {
        work.outer = planes.zd[i].to_read();
        work.outer2 = planes.e[i].data;
        work.inner2 = planes.hd[i - 1].data;
      }
      work.tiling = {rows, work.outer.width};
      work.tiles = chunk.images * work.tiling.tiles();
      const int most = weight_blocks(net, i - 1), blocks = work.tiles < most ? int(work.tiles) : most;
      with_panel(panel<T>(work.outputs), [&](auto panel) {
        const dim3 grid = grid_of(blocks, panels_of(work.outputs, panel.value), work.inputs);
        launcher.run(weight_gradient_kernel<T, panel.value>, grid, work, workspace.weight_sums);
      });
      const int64_t count = net.weight[i] - net.weight[i - 1];
      launcher.run_over(count * 32, add_blocks_kernel, workspace.weight_sums, blocks, count, chunk.is_first(),
                        sums + net.weight[i - 1]);
    }
    const int depth = net.depth, channels = net.channels[depth];
    const PlaneSums of_h =
        sum_planes(depth, (with_tangent ? planes.hd : planes.h)[depth], channels, workspace.plane_sums);
    launcher.run(output_gradient_kernel<T>, grid_of(channels), net, chunk.images, of_h, pixel_scale(), chunk.is_first(),
                 sums + net.weight[depth]);
  }
};

// One call of a pass. for_each_chunk calls step(steps of a chunk) for every chunk.
template <class T, class Act>
struct Call {
  const LossImageParams<T>& net;
  const Chunking chunking;
  const Workspace<T> workspace;
  Launcher launcher;

  Call(const LossImageParams<T>& net, void* stream)
      : net(net), chunking(make_chunking(net)), workspace(net, chunking), launcher{stream} {}

  template <class Step>
  void for_each_chunk(const Step& step) {
    for (int64_t image = 0; image < net.batch; image += chunking.images)
      for (int band = 0; band < chunking.bands; ++band) {
        const Chunk chunk = chunking.chunk(net, image, band);
        ChunkSteps<T, Act> steps(net, chunk, workspace, launcher);
        step(steps);
      }
  }

  const char* forward() {
    for_each_chunk([&](auto& steps) {
      steps.activate();
      steps.add_values();
      if (!net.grad_losses) return;
      steps.go_back(false);
      steps.store_gradient(steps.net.grad_losses, steps.planes.e[1], int(net.main_loss));
    });
    if (net.per_sample)
      launcher.run_over(net.batch, store_kernel<T>, workspace.values, net.batch, net.value);
    else
      launcher.run(reduce_kernel<T>, dim3(1), workspace.values, net.batch, net.scale, net.value);
    return launcher.error;
  }

  const char* backward_phi() {
    for_each_chunk([&](auto& steps) {
      steps.activate_again();
      steps.go_back(false);
      steps.add_to_phi(false, workspace.phi_sums);
    });
    launcher.run_over(net.num_parameters, store_kernel<T>, workspace.phi_sums, net.num_parameters, net.grad_phi);
    return launcher.error;
  }

  const char* second_order() {
    const int64_t size = net.batch * net.channels[0] * net.height[0] * net.width[0];
    for_each_chunk([&](auto& steps) {
      steps.activate_again();
      steps.go_back(false);
      for (int64_t tangent = 0; tangent < net.num_tangents; ++tangent) {
        steps.planes.hd[0] = steps.planes.h[0];
        steps.planes.hd[0].data = steps.net.tangents + tangent * size;
        steps.activate_tangent();
        steps.go_back(true);
        steps.store_gradient(steps.net.grad_losses + tangent * size, steps.planes.zd[1], -1);
        if (net.grad_phi) steps.add_to_phi(true, workspace.phi_sums + tangent * net.num_parameters);
      }
    });
    const int64_t count = net.num_tangents * net.num_parameters;
    if (net.grad_phi) launcher.run_over(count, store_kernel<T>, workspace.phi_sums, count, net.grad_phi);
    return launcher.error;
  }
};

template <class T>
int64_t workspace_bytes(const LossImageParams<T>& net) {
  return Workspace<T>(net, make_chunking(net)).bytes;
}

template <class T>
const char* forward(const LossImageParams<T>& net, void* stream) {
  return net.activation == Activation::softplus ? Call<T, Softplus>(net, stream).forward()
                                                : Call<T, Identity>(net, stream).forward();
}

template <class T>
const char* backward_phi(const LossImageParams<T>& net, void* stream) {
  return net.activation == Activation::softplus ? Call<T, Softplus>(net, stream).backward_phi()
                                                : Call<T, Identity>(net, stream).backward_phi();
}

template <class T>
const char* second_order(const LossImageParams<T>& net, void* stream) {
  return net.activation == Activation::softplus ? Call<T, Softplus>(net, stream).second_order()
                                                : Call<T, Identity>(net, stream).second_order();
}

template <class T>
constexpr LossImageCudaKernels<T> kKernels{
    {workspace_bytes<T>, forward<T>}, {workspace_bytes<T>, backward_phi<T>}, {workspace_bytes<T>, second_order<T>}};
extern const LossImageCudaKernels<float> loss_image_f32 = kKernels<float>;
extern const LossImageCudaKernels<double> loss_image_f64 = kKernels<double>;

}  // namespace auxfast::cuda
